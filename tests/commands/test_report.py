"""The page against the files it was made of, read as a browser reads it."""

import csv
import json
import re
from dataclasses import fields
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import load_file

from prunetool.errors import plain
from prunetool.llama.parts import MATRICES
from prunetool.llama.weights import tensor_name
from prunetool.model import open_model
from prunetool.records import Header
from prunetool.steps import picture, report, sweep
from tests.conftest import error_of

HEADS, LAYERS = 4, 3  # of the tiny checkpoint
FIELDS = [field.name for field in fields(Header)]


class Page(HTMLParser):
    """Tables by caption: rows of cells (text, title, style); fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.every = [], {}, []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert not {"src", "href"} & set(found)
        self.every.append(tag)
        if tag != "meta":
            self.open.append(tag)
        if tag == "caption":
            self.caption = ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append(("", found.get("title"), found.get("style")))
        elif tag == "table":
            self.rows = []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "caption":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        if self.open[-1:] == ["caption"]:
            self.caption += data
        elif self.open[-1:] in (["td"], ["th"]):
            text, *rest = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, *rest)

    def table(self, caption):
        """Rows by layer, and the columns' names, of the one table whose caption begins so."""
        (rows,) = [rows for name, rows in self.tables.items() if name.startswith(caption)]
        names = [text for text, *_ in rows[0][1:]]
        return names, [dict(zip(names, row[1:], strict=True)) for row in rows[1:]]


def page_of(run, tmp_path, stream, *words):
    done = run("report", *words, "-o", tmp_path / "page.html", stdin=stream)
    assert done.stdout == ""
    assert re.match(
        r"report: 3 layers, [\d,]+ of 92,160 layer weights kept, .*page.html, .* s, ", done.stderr
    )
    return Page((tmp_path / "page.html").read_text("utf-8"))


MASKED = [["--target", "v,o", "--method", "magnitude", "--sparsity", ".5"]]
PRUNED = [
    ["--target", "heads", "--sparsity", ".1"],
    ["--target", "channels", "--sparsity", ".2", "--multiple-of", 1],
]


def scored(run, records, *steps):
    stream = records.read_text()
    for step in steps:
        stream = run("score", *step, stdin=stream).stdout
    return stream


def test_every_count_is_what_the_files_and_the_export_hold(calibrated, run, tmp_path):
    # The masks come first, so that units they kept something of are removed behind them.
    _, records = calibrated()
    kept = scored(run, records, *MASKED, *PRUNED)
    stream = run("compensate", "--damping", ".01", stdin=kept).stdout
    page = page_of(run, tmp_path, stream)
    header, *layers, _ = map(json.loads, stream.splitlines())

    run("export", tmp_path / "out", "--format", "dense", stdin=stream)
    stored = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored.update(load_file(path))
    names, weights = page.table("Weights kept")
    assert names == [*MATRICES, "all"]
    _, units = page.table("Units kept")
    total = np.zeros(2, int)
    for record, cells, kept in zip(layers, weights, units, strict=True):
        work, counts = header["work"], []
        for part in MATRICES:
            W = stored[tensor_name(record["index"], part)]
            counts.append((np.count_nonzero(W), W.size))
        groups = load_file(f"{work}/{record['files']['kept.heads']}")["heads"].astype(bool)
        channels = load_file(f"{work}/{record['files']['kept.channels']}")["channels"]
        mask = np.unpackbits(load_file(f"{work}/{record['files']['mask.v']}")["v.kept"], axis=1)
        assert counts[2] == (mask[np.repeat(groups, 16)].sum(), 32 * 64)
        assert kept["KV heads"][0] == f"{groups.sum()} / 2"
        assert kept["query heads"][0] == f"{2 * groups.sum()} / 4"
        assert kept["MLP channels"][0] == f"{np.count_nonzero(channels)} / 96"
        counts.append(np.sum(counts, axis=0))
        total += counts[-1]
        for name, (count, size) in zip(names, counts, strict=True):
            assert cells[name][:2] == (f"{count / size:.2%}", f"{count:,} of {size:,}")
    assert any(row["KV heads"][0] == "1 / 2" for row in units)
    assert total[0] < total[1] == 92160
    assert page.tables["Weights of the decoder layers' matrices"][-1][1][0] == f"{total[0]:,}"
    _, losses = page.table("Relative output error by plain")
    for record, loss in zip(layers, losses, strict=True):
        values = record["values"]
        assert loss["down_proj, removed"][0] == f"{values['loss']['down_proj']:.4g}"
        assert loss["o_proj, masked"][0] == f"{values['masks']['o']['loss']:.4g}"
        assert "v_proj, masked" not in loss  # calibrate kept no sums of its inputs
    assert page.tables["What was requested"][-1][0][0] == "compensate"
    assert not any(name.startswith("Relative error of the attention") for name in page.tables)
    assert "script" not in page.every


@pytest.mark.parametrize(("held_out", "damping"), [(2, "auto"), (0, "0.01")])
def test_refits_stand_as_the_records_have_them(calibrated, run, tmp_path, held_out, damping):
    _, records = calibrated(held_out=held_out)
    kept = scored(run, records, *PRUNED)
    stream = run("compensate", "--damping", damping, stdin=kept).stdout
    _, rows = page_of(run, tmp_path, stream).table("Relative output error, plain")
    for line, row in zip(stream.splitlines()[1:-1], rows, strict=True):
        expected = {}
        for name, of in json.loads(line)["values"]["refit"].items():
            lost = of["removed"] > 0
            expected[name] = f"{of['removed']:.4g} → {of['refitted']:.4g}" if lost else "–"
            if held_out:
                unseen = f"{of['held_out_removed']:.4g} → {of['held_out_refitted']:.4g}"
                expected[f"{name}, held out"] = unseen if lost else "–"
            expected[f"{name}, damping"] = str(of["damping"] or "none") if lost else "–"
        assert {name: text for name, (text, *_) in row.items()} == expected


def test_the_heat_maps_are_the_evaluations(calibrated, run, tmp_path):
    dense, records = calibrated(attention=3)
    qk = ["--target", "qk", "--method", "magnitude", "--sparsity", ".5"]
    stream = scored(run, records, qk, PRUNED[0])
    run("export", tmp_path / "out", "--format", "dense", stdin=stream)
    np.save(tmp_path / "ids.npy", np.random.default_rng(3).integers(0, 250, (2, 24), np.int32))
    compared = run("evaluate", "out", "--against", dense, "--tokens", "ids.npy",
                   "--sequence-length", 24, "--dtype", "float32").stdout  # fmt: skip
    (tmp_path / "compared.json").write_text(compared)
    plain = {k: v for k, v in json.loads(compared).items() if k != "against"}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    files = ["--evaluation", "compared.json", "--evaluation", "plain.json"]
    page = page_of(run, tmp_path, stream, *files)

    _, rows = page.table("Relative error of the attention")
    for line, row in zip(stream.splitlines()[1:-1], rows, strict=True):
        found = json.loads(line)["values"]["attention"]
        assert row["calibration"][0] == f"{found['calibration']:.4g}"
        assert row["held out"][0] == f"{found['held_out']:.4g}"

    against = json.loads(compared)["against"]
    lines = [text for row in page.tables["Evaluation compared.json"] for text, *_ in row]
    assert f"{plain['perplexity']:.4f}" in lines
    assert f"{against['kl']:.4f} nats" in lines
    assert len(page.tables["Evaluation plain.json"]) < len(page.tables["Evaluation compared.json"])
    assert any(None in row for row in against["attention_error"]["own"]["by_head"])
    styles = {}
    for name, label in (("own", "each"), ("same_input", "the dense")):
        errors = against["attention_error"][name]
        caption = f"Attention error by layer and head on {label}"
        heads, rows = page.table(caption)
        assert heads == list(map(str, range(HEADS)))
        assert len(rows) == LAYERS
        (said,) = [found for found in page.tables if found.startswith(caption)]
        assert f"worst {errors['worst']:.4g} (layer {errors['worst_layer']} head " in said
        for layer, (row, by_head) in enumerate(zip(rows, errors["by_head"], strict=True)):
            for head, error in enumerate(by_head):
                text, title, style = row[str(head)]
                where, value = title.split(": ")
                assert where == f"layer {layer} head {head}"
                assert (None if value == "none" else float(value)) == error
                assert text == ("–" if error is None else f"{error:.2g}")
                styles[error] = style
    grey = styles.pop(None)  # a KV group is gone
    assert "hsl" not in grey
    # The larger the error, the darker, in one scale over both maps.
    light = {e: float(re.search(r"([\d.]+)%\)", styles[e])[1]) for e in styles}
    assert light == pytest.approx({e: 96 - 62 * e / max(styles) for e in styles}, abs=0.051)


def test_names_out_of_files_are_escaped(calibrated, run, tmp_path):
    _, records = calibrated("<script>&amp;")
    result = {"model": "\ud800<script>'\"", "perplexity": 2, "tokens": 3}
    (tmp_path / "<b>.json").write_text(json.dumps(result))
    page = page_of(run, tmp_path, records.read_text(), "--evaluation", "<b>.json")
    assert not {"script", "b"} & set(page.every)
    assert ("<script>'\"") in page.tables["Evaluation <b>.json"][2][1][0]
    assert "<h1>&lt;script&gt;&amp;amp;, pruned</h1>" in (tmp_path / "page.html").read_text("utf-8")


def test_a_cut_stream_makes_no_page(calibrated, run, tmp_path):
    _, records = calibrated()
    (tmp_path / "report.html").write_text("before")
    for lines, seen in ((4, 3), (2, 1)):
        cut = "".join(records.read_text().splitlines(True)[:lines])
        line = error_of(run("report", stdin=cut, ok=False))
        assert f"cut off after {seen} of 3 layers; run the previous step again" in line
    assert (tmp_path / "report.html").read_text() == "before"
    assert not list(tmp_path.glob(".*"))


def test_foreign_text_is_cut_and_the_page_is_ascii_in_any_locale(calibrated, process, tmp_path):
    _, records = calibrated()
    header, *rest = records.read_text().splitlines()
    header = json.loads(header)
    header["source"] = "模" * 500
    step = {"command": "score", "version": "1", "options": {"shuffle": "z\x1b" * 500}}
    header["history"].append(step)
    stream = "\n".join([json.dumps(header), *rest, ""])
    (tmp_path / "e.json").write_text(json.dumps({"model": "y" * 500, "perplexity": 2, "tokens": 3}))
    done = process(
        "report", "-o", "-", "--evaluation", "e.json", stdin=stream, PYTHONIOENCODING="cp1252"
    )
    assert done.stdout.isascii()
    page = Page(done.stdout)
    assert page.tables["Evaluation e.json"][2][1][0] == f"{'y' * 49}…{'y' * 50}"
    asked = page.tables["What was requested"][-1][1][0]
    assert r"shuffle z\x1bz\x1b" in asked
    assert asked.count("z") < 50
    assert done.stdout.count("&#27169;") == 2 * 99  # title and heading


def test_a_perplexity_too_large_for_a_number_is_said(tmp_path):
    (tmp_path / "e.json").write_text('{"model": "m", "perplexity": null, "tokens": 3}')
    found = report.read_evaluation(tmp_path / "e.json")
    assert found.lines[0] == ("perplexity", "too large for a number")


def removed(layers):
    """The fraction of the layers' parameters that a stream's records say is gone."""
    kept = [layer["values"]["kept"] for layer in layers]
    sizes = [(2 * of["heads"] + 2 * of["kv_heads"]) * 16 + 3 * of["channels"] for of in kept]
    return 1 - sum(sizes) / (LAYERS * ((2 * HEADS + 2 * 2) * 16 + 3 * 96))


def test_a_sweep_after_another_score_counts_what_both_remove(calibrated, run, tmp_path):
    _, records = calibrated(gradients=2)
    run("score", records, "--target", "heads", "--sparsity", ".1", "-o", "heads.jsonl")
    some = ("--target", "channels", "--multiple-of", 8, "--min-channels", 8)
    done = run("score", "heads.jsonl", *some, "-o", "kept-{sparsity}.jsonl", "--sparsity", ".1,.2")
    header, *layers, _ = map(json.loads, (tmp_path / "kept-.2.jsonl").read_text().splitlines())
    nats = sum(sum(layer["values"]["nats"].values()) for layer in layers)
    assert f"predicted loss {nats:.3g} nats a token" in done.stderr, "of both"
    assert f"{removed(layers):.4%} with those of earlier steps" in done.stderr
    dense = open_model(str(tmp_path / "dense"))
    found = sweep.predicted(Header(**{k: header[k] for k in FIELDS}), dense)
    assert found[-1] == (pytest.approx(removed(layers)), nats)
    run("export", "out", "kept-.2.jsonl")
    shards = map(load_file, (tmp_path / "out").glob("*.safetensors"))
    weights = {name: array for shard in shards for name, array in shard.items()}
    stored = sum(array.size for name, array in weights.items() if "_proj" in name)
    page = page_of(run, tmp_path, (tmp_path / "kept-.2.jsonl").read_text())
    rows = {row[0][0]: row[1][0] for row in page.tables["Weights of the decoder layers' matrices"]}
    assert rows["stored"] == f"{stored:,}", "as export pads them"
    left = (1 - removed(layers)) * LAYERS * ((2 * HEADS + 2 * 2) * 16 + 3 * 96) * 64
    assert rows["of these, not zero"] == f"{round(left):,}"
    assert stored > left
    assert "export pads layers of unequal size to a multiple of 32 channels" in done.stderr
    whole = ("--target", "heads", "--sparsity", ".1", "--allocation", "global")
    run("score", records, *whole, "-o", "other.jsonl")
    said = run("score", "other.jsonl", *some, "--sparsity", ".1", "-o", "both.jsonl").stderr
    assert "nats a token for this step" in said
    assert "perplexity" not in said, "an earlier step did not predict"


def test_a_sweep_is_drawn_with_what_was_measured(calibrated, run, text, tmp_path):
    _, records = calibrated(gradients=2)
    words = ["score", records, "--multiple-of", 8, "-o"]
    run(*words, "kept-{sparsity}.jsonl", "--sparsity", ".1,.2,.4")
    run(*words, "other.jsonl", "--sparsity", ".3", "--method", "newton")
    (tmp_path / "dense.work/score-0123456789ab").mkdir()
    (tmp_path / "dense.work/score-0123456789ab/records.jsonl").write_text("{")
    wrong = (tmp_path / "kept-.1.jsonl").read_text().replace('"sparsity": 0.1', '"sparsity": "x"')
    (tmp_path / "dense.work/score-0123456789ac").mkdir()
    (tmp_path / "dense.work/score-0123456789ac/records.jsonl").write_text(wrong)
    run("export", "out", "kept-.4.jsonl")
    words = ["--text", text, "--samples", 2, "--sequence-length", 32, "--allow-calibrated"]
    compared = run("evaluate", "out", "--against", "dense", *words).stdout
    (tmp_path / "e.json").write_text(compared)
    stream = (tmp_path / "kept-.2.jsonl").read_text()
    page = page_of(run, tmp_path, stream, "--evaluation", "e.json")
    assert len([tag for tag in page.every if tag == "circle"]) == 3 + 1
    header, *layers, _ = map(json.loads, stream.splitlines())
    nats = sum(sum(layer["values"]["nats"].values()) for layer in layers)
    dense = open_model(str(tmp_path / "dense"))
    found = sweep.predicted(Header(**{k: header[k] for k in FIELDS}), dense)
    assert len(found) == 3
    assert found[1] == (pytest.approx(removed(layers)), nats)
    measured = json.loads(compared)
    point = report.read_evaluation(tmp_path / "e.json").point
    assert point == (measured["parameters"], measured["loss"] - measured["against"]["loss"])
    (tmp_path / "pictures").mkdir()
    stream = (tmp_path / "other.jsonl").read_text()
    alone = page_of(run, tmp_path, stream, "--plots", "pictures")
    assert "circle" not in alone.every, "one point is no curve"
    svg = (tmp_path / "pictures/units.svg").read_text()
    assert svg.count("<rect") == 2 * 2 * LAYERS, "of heads and channels, and behind each"


def test_an_evaluation_of_nan_and_infinity_is_shown(calibrated, run, tmp_path):
    _, records = calibrated()
    rows = {"mean": float("nan"), "worst": float("inf"), "worst_layer": 0, "worst_head": 1,
            "by_head": [[None, float("inf")], [float("nan"), -1]]}  # fmt: skip
    against = AGAINST | {"attention_error": {"own": rows, "same_input": rows}}
    value = {"model": "m", "perplexity": float("nan"), "tokens": 10**40, "against": against}
    (tmp_path / "e.json").write_text(json.dumps(value))
    page = page_of(run, tmp_path, records.read_text(), "--evaluation", "e.json")
    assert page.tables["Evaluation e.json"][1][1][0] == "nan"
    _, found = page.table("Attention error by layer and head on each")
    assert [row["1"][0] for row in found] == ["inf", "-1"]
    assert [row["0"][0] for row in found] == ["–", "–"]


AGAINST = {"model": "m", "perplexity": 1, "kl": 0}


def against(by_head, **more):
    """An evaluation with these errors of heads."""
    rows = {"mean": 0, "worst": 0, "worst_layer": 0, "worst_head": 0, "by_head": by_head, **more}
    errors = {"own": rows, "same_input": rows}
    value = {"model": "m", "perplexity": 1, "tokens": 1}
    return json.dumps(value | {"against": AGAINST | {"attention_error": errors}})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "No such file or directory; check the name"),
        ("{", "is not an evaluation (JSONDecodeError: "),
        ("[" * 100_000, "is not an evaluation (RecursionError: "),
        ("[]", "is not an evaluation (TypeError: "),
        ('{"record": "end"}', "is not an evaluation (KeyError: 'perplexity'); name a file that "
                              "prunetool evaluate printed"),
        ('{"perplexity": "low"}', "is not an evaluation (ValueError: "),
        (json.dumps({"perplexity": 1, "against": AGAINST}), "(KeyError: 'attention_error')"),
        (json.dumps({"perplexity": 10**400}), "is not an evaluation (OverflowError: "),
        ('{"perplexity": 1, "tokens": "9", "model": ""}', "is not an evaluation (ValueError: "),
        (against(["12"]), "(TypeError: an error of type str)"),
        (against([[10**400]]), "is not an evaluation (OverflowError: "),
        (against([[[]]]), "(TypeError: an error of type list)"),
        (against([0]), "is not an evaluation (TypeError: "),
        (against([[0]], worst=[]), "is not an evaluation (TypeError: "),
        (against([[0]], mean="1"), "is not an evaluation (ValueError: "),
    ],
    ids=["gone", "no JSON", "deep", "list", "records", "text", "half", "huge", "tokens",
         "letters", "huge error", "lists", "flat", "worst", "mean"],
)  # fmt: skip
def test_what_is_no_evaluation_is_said(run, tmp_path, value, says):
    if value is not None:
        (tmp_path / "e.json").write_text(value)
    line = error_of(run("report", "--evaluation", "e.json", stdin="", ok=False))
    assert line.startswith("Error: e.json: ")
    assert says in line
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("method", ["newton", "wanda-sp", "random"])
def test_scores_are_counted_as_they_were_cut(calibrated, run, tmp_path, method):
    _, records = calibrated()
    words = ["--method", method, "--allocation", "global", "--sparsity", ".3", "--multiple-of", 1]
    stream = scored(run, records, words)
    layers = list(map(json.loads, stream.splitlines()))[1:-1]
    (made,) = (tmp_path / "dense.work").glob("scores-*")
    for layer in layers:
        number, values = layer["index"], layer["values"]
        scores = load_file(made / f"layer-{number:05d}.safetensors")
        for target, kept in (("heads", "kv_heads"), ("channels", "channels")):
            counts, compared = values["scores"][target], scores[f"{target}.compared"]
            assert sum(stay for stay, _ in counts.values()) == values["kept"][kept]
            assert sum(map(sum, counts.values())) == len(compared)
            for name, pair in counts.items():
                if name == "least":
                    inside = ~(compared > 0)
                else:
                    low, high = (10 ** (x / 4) for x in (int(name), int(name) + 1))
                    inside = (compared >= low * (1 - 1e-9)) & (compared < high * (1 + 1e-9))
                assert inside.sum() == sum(pair)
    run("report", "-o", "page.html", "--plots", "pictures", stdin=stream)
    svg = (tmp_path / "pictures/scores.svg").read_text()
    assert sum(map(int, re.findall("<title>([0-9]+)</title>", svg))) == LAYERS * (96 + 2)


def test_what_each_step_took_is_shown(calibrated, run, tmp_path):
    _, records = calibrated()
    stream = scored(run, records, *PRUNED)
    stream = run("compensate", "--damping", ".01", stdin=stream).stdout
    names, rows = page_of(run, tmp_path, stream).table("Time and memory of each step")
    assert names == ["seconds", "peak memory, MB"]
    assert len(rows) == 4
    costs = [json.loads(path.read_text()) for path in tmp_path.glob("dense.work/*/cost.json")]
    assert all(each["seconds"] > 0 for each in costs)
    shown = sorted(row["seconds"][0] for row in rows)
    assert shown == sorted(f"{each['seconds']:,.1f}" for each in costs)
    cost = tmp_path / "dense.work/stats/cost.json"
    before = json.loads(cost.read_text())
    cost.write_text(json.dumps(before | {"seconds": 3600.0}))
    run("calibrate", "dense", "--text", "text.txt", "--samples", 8, "--sequence-length", 32,
        "--held-out", 2, "--work", "dense.work", "-o", "again.jsonl")  # fmt: skip
    assert json.loads(cost.read_text())["seconds"] == 3600, "it only read what is there"
    for damage in ("{", "[]", '{"seconds": "x"}', '{"seconds": NaN, "peak_mb": 1}'):
        cost.write_text(damage)
        _, rows = page_of(run, tmp_path, stream).table("Time and memory of each step")
        assert len(rows) == 3


def test_other_formats_have_the_same_tables(calibrated, run, tmp_path):
    _, records = calibrated()
    (tmp_path / "made.jsonl").write_text(
        run("compensate", "--damping", ".01", stdin=scored(run, records, *PRUNED)).stdout
    )
    page = page_of(run, tmp_path, (tmp_path / "made.jsonl").read_text(), "--plots", "pictures")
    assert (tmp_path / "pictures/units.svg").read_text().startswith("<svg xmlns=")
    done = run("report", "made.jsonl", "--format", "json", "-o", "-")
    tables = {table["caption"]: table for table in json.loads(done.stdout)["tables"]}
    assert tables.keys() == page.tables.keys()
    run("report", "made.jsonl", "--format", "csv")
    with (tmp_path / "report.csv").open(newline="") as file:
        cells = {(r["table"], r["row"], r["column"]): r["value"] for r in csv.DictReader(file)}
    markdown = run("report", "made.jsonl", "--format", "markdown", "-o", "-").stdout
    for caption, rows in page.tables.items():
        table = tables[caption]
        assert table["columns"] == [text for text, *_ in rows[0]]
        assert len(table["rows"]) == len(rows) - 1
        assert f"## {plain(caption)}\n" in markdown
        names = [row[0][0] for row in rows[1:]]
        for name, shown, given in zip(names, rows[1:], table["rows"], strict=True):
            for column, (text, *_), value in zip(table["columns"], shown, given, strict=False):
                if text == "–":
                    assert value is None
                elif isinstance(value, str):
                    assert value == text
                else:
                    assert value == pytest.approx(
                        float(text.strip("%").replace(",", "")) / (100 if "%" in text else 1)
                    )
                if column not in ("", table["columns"][0]) and names.count(name) == 1:
                    assert cells[caption, name, column] == ("" if value is None else str(value))
            line = " | ".join(plain(text, 300) for text, *_ in shown)
            assert f"| {line} |" in markdown
    assert tables["Weights kept, of those before"]["rows"][0][-1] < 1


def test_a_result_of_bench_is_shown_and_another_refused(calibrated, run, tmp_path):
    _, records = calibrated()
    speed = {
        "model": "a/<b>", "runtime": "llama.cpp", "file_bytes": 2_000_000, "load_seconds": 0.5,
        "peak_bytes": 3_000_000, "prompt_tokens_per_second": [10.0, 20.0, 30.0],
        "generated_tokens_per_second": [4.0], "how": {"prompt": 8, "generate": 4, "repeats": 3,
        "threads": 2},
    }  # fmt: skip
    (tmp_path / "speed.json").write_text(json.dumps([speed]))
    page = page_of(run, tmp_path, records.read_text(), "--bench", "speed.json")
    _, (row,) = page.table("Tokens a second: prompt of 8, 4 generated; median of 3")
    assert (row["MB"][0], row["prompt"][0], row["text"][0]) == ("2", "20.0±10.0", "4.0±0.0")
    odd = [{"how": 3}, {"file_bytes": 10**400}, {"prompt_tokens_per_second": [0.0]}]
    for wrong in ("[]", "{", "[{}]", '[{"model": 1}]', *(json.dumps([speed | x]) for x in odd)):
        (tmp_path / "speed.json").write_text(wrong)
        done = run("report", records, "--bench", "speed.json", ok=False)
        assert "speed.json: is not a result of bench" in error_of(done)


@pytest.mark.parametrize("largest", [-1.0, 0.0, 1e-9, 0.3, 1.0, 7.2, 109.0])
def test_a_plot_has_round_ticks_and_holds_its_points(largest):
    points = [(0.1, largest), (0.5, largest / 2)]
    svg = picture.lines([("name", "#000", points)], "what", ("x", "y"))
    ticks = [float(text) for text in re.findall(r'text-anchor="end">([^<]*)<', svg)]
    assert ticks[0] == 0
    assert 3 <= len(ticks) <= 6
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])
    assert f"{steps[0]:.0e}"[0] in "125"
    assert ticks[-1] >= largest
    heights = [float(y) for y in re.findall(r'cy="([^"]*)"', svg)]
    assert len(heights) == 2
    assert largest < 0 or all(0 < y < picture.HEIGHT for y in heights)
