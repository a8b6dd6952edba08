"""The whole flow as a user runs it: pipe, files, kill, and what comes out in transformers."""

import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from prunetool import cli, methods
from prunetool.llama.weights import tensor_name
from prunetool.pruning import gram
from tests import references
from tests.conftest import DIE, at_layer, error_of

PRUNETOOL = f"{shlex.quote(sys.executable)} -m prunetool"


def contents(directory):
    """Checksums of all files but those that name the work directory."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("records.jsonl", "cost.json", ".prunetool.json")
    }


def prune(run, records, out, *, score=(), compensate=True, export=()):
    kept = run("score", *score, records).stdout
    if compensate:
        kept = run("compensate", stdin=kept).stdout
    return run("export", out, *export, stdin=kept)


def loss_in_transformers(directory, tokens):
    model = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32
    )
    ids = torch.tensor(tokens.astype(np.int64))
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
        generated = model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 4
    return model, loss


@pytest.fixture
def held_out(text, tmp_path):
    """Sequences that were not calibrated on, as ids and as a file."""
    ids = text.read_bytes()[3000:3192]
    tokens = (np.frombuffer(ids, np.uint8).astype(np.int32) % 250).reshape(4, 48)
    np.save(tmp_path / "ids.npy", tokens)
    return tokens


def evaluated(run, directory, tmp_path):
    done = run("evaluate", directory, "--tokens", tmp_path / "ids.npy", "--sequence-length", 48,
               "--dtype", "float32")  # fmt: skip
    return json.loads(done.stdout)


MHA8 = {"num_attention_heads": 4, "num_key_value_heads": 4}
FORMS = {
    # uniform: 2 of 4 MHA heads of 16 stay, 64 % 2 == 0
    "llama": (MHA8, ["--sparsity", ".5", "--allocation", "uniform"], [], "llama"),
    # 3 of 4 heads stay, and 64 is no multiple of 3
    "mistral": (MHA8, ["--sparsity", ".3", "--allocation", "uniform"], [], "mistral"),
    "mistral cannot be biased": (
        {**MHA8, "attention_bias": True, "mlp_bias": True},
        ["--sparsity", ".3", "--allocation", "uniform"], [], "pruned_llama",
    ),
    "unequal": ({}, ["--sparsity", ".3", "--multiple-of", "1"], [], "pruned_llama"),
    "unequal, tied, llama3 rope": (
        {"tie_word_embeddings": True, "rope_theta": 500000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        ["--sparsity", ".3", "--multiple-of", "8"], [], "pruned_llama",
    ),
    "unequal, biased": (
        {"attention_bias": True, "mlp_bias": True},
        ["--sparsity", ".3", "--multiple-of", "8"], [], "pruned_llama",
    ),
    "dense": ({}, ["--sparsity", ".3", "--multiple-of", "1"], ["--format", "dense"], "llama"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "score", "export", "form"), FORMS.values(), ids=FORMS)
def test_what_is_exported_loads_in_transformers_and_means_the_same(
    calibrated, run, tmp_path, held_out, changes, score, export, form
):
    _, records = calibrated(**changes)
    out = tmp_path / "out"
    prune(run, records, out, score=score, export=export)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == form
    _, theirs = loss_in_transformers(out, held_out)
    ours = evaluated(run, out, tmp_path)
    assert ours["loss"] == pytest.approx(theirs, abs=2e-5)
    assert ours["perplexity"] == pytest.approx(math.exp(theirs), rel=1e-4)
    stored = sum(
        array.size for path in out.glob("*.safetensors") for array in load_file(path).values()
    )
    assert stored == ours["parameters"]


def test_dense_zeros_and_smaller_matrices_are_the_same_model(calibrated, run, tmp_path, held_out):
    _, records = calibrated(attention_bias=True, mlp_bias=True)
    losses = []
    for form in ("auto", "dense"):
        out, score = tmp_path / f"out-{form}", ["--sparsity", ".4", "--multiple-of", "8"]
        prune(run, records, out, score=score, export=["--format", form])
        losses.append(evaluated(run, out, tmp_path)["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_keeping_all_changes_nothing(calibrated, run, tmp_path):
    model, records = calibrated(shards=2)
    prune(run, records, tmp_path / "out", score=["--sparsity", "0"])
    before, after = {}, {}
    for directory, tensors in ((model, before), (tmp_path / "out", after)):
        for path in directory.glob("*.safetensors"):
            tensors.update(load_file(path))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_without_compensate_the_kept_weights_are_untouched(calibrated, run, tmp_path):
    model, records = calibrated()
    prune(run, records, tmp_path / "out", score=["--sparsity", ".3"], compensate=False)
    dense = load_file(model / "model.safetensors")
    for path in (tmp_path / "out").glob("*.safetensors"):
        for name, array in load_file(path).items():
            assert np.isin(array, dense[name]).all()


def test_a_refit_helps_on_the_calibration_text(calibrated, run):
    _, records = calibrated()
    kept = run("score", "--sparsity", ".4", records).stdout
    found = []
    for line in run("compensate", stdin=kept).stdout.splitlines()[1:-1]:
        for matrix in json.loads(line)["values"]["refit"].values():
            assert matrix["refitted"] <= matrix["removed"] * (1 + 1e-9)
            assert matrix["held_out_refitted"] <= matrix["held_out_removed"]
            found.append(matrix["refitted"] < 0.99 * matrix["removed"])
    assert any(found)


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run a command in this process; gives the layers' records, if it wrote some."""
    monkeypatch.chdir(tmp_path)

    def here(*words):
        cli.group.main([*map(str, words), "-o", "records.jsonl"], standalone_mode=False)
        lines = (tmp_path / "records.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines[1:-1]]

    return here


def calibrated_here(call, model, text, tmp_path, **more):
    words = {"text": text, "samples": 8, "sequence-length": 32, "held-out": 4, "work": "w",
             "stats-dtype": "float64", **more}  # fmt: skip
    options = [part for key, value in words.items() for part in (f"--{key}", value)]
    layers = call("calibrate", model, *options)
    shutil.copy("records.jsonl", "stats.jsonl")
    return [
        [load_file(tmp_path / "w" / layer["files"][kind]) for kind in ("stats", "held_out")]
        for layer in layers
    ]


@pytest.mark.parametrize("biased", [False, True])
def test_the_refit_is_least_squares_on_all_tokens_held_out_or_not(
    checkpoint, text, call, tmp_path, biased
):
    model = checkpoint(num_hidden_layers=1, attention_bias=biased, mlp_bias=biased)
    ((fit, held_out),) = calibrated_here(call, model, text, tmp_path)
    (scored,) = call(
        "score", "stats.jsonl", "--sparsity", ".5", "--allocation", "uniform", "--multiple-of", 1
    )
    (record,) = call("compensate", shutil.copy("records.jsonl", "kept.jsonl"))
    masks = load_file(tmp_path / "w" / scored["files"]["kept.channels"])
    made = load_file(tmp_path / "w" / record["files"]["refit"])
    dense = load_file(model / "model.safetensors")
    for matrix, kept in {"o": np.repeat(masks["heads"], 32), "down": masks["channels"]}.items():
        kept = kept.astype(bool)
        assert 0 < kept.sum() < kept.size
        n, mean = 8 * 32, (fit[f"{matrix}.total"] + held_out[f"{matrix}.total"]) / (8 * 32)
        A = gram.unpack(fit[f"{matrix}.gram"]) + gram.unpack(held_out[f"{matrix}.gram"])
        W = dense[tensor_name(0, matrix)].T.astype(np.float64)
        squared, axes = np.linalg.eigh(A - n * np.outer(mean, mean) if biased else A)
        X = np.sqrt(squared.clip(0))[:, None] * axes.T  # any inputs of this Gram matrix
        report = record["values"]["refit"][f"{matrix}_proj"]
        assert report["damping"] > 0
        V = references.refit(X, W, kept, report["damping"])
        np.testing.assert_allclose(made[f"{matrix}_proj.weight"].T, V, rtol=1e-4, atol=1e-6)
        error = np.linalg.norm(X[:, kept] @ V - X @ W) ** 2
        energy = np.einsum("io,ij,jo->", W, A, W)
        assert report["refitted"] == pytest.approx(error / energy, rel=1e-6)
        if biased:  # it makes the mean of the output what it was
            expected = dense[tensor_name(0, f"{matrix}_bias")] + mean @ W - mean[kept] @ V
            np.testing.assert_allclose(made[f"{matrix}_proj.bias"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "more", [["newton-box"], ["newton-tied"], ["newton", "--lambda", ".1"]], ids=" ".join
)
def test_sparsities_do_not_share_scores_that_are_made_for_one(
    checkpoint, text, call, tmp_path, more
):
    calibrated_here(call, checkpoint(), text, tmp_path)
    work = tmp_path / "w"

    def scored(sparsity):
        before = set(work.glob("scores-*"))
        layers = call(
            "score", "stats.jsonl", "--sparsity", sparsity, "--multiple-of", 1, "--method", *more
        )
        (scores,) = set(work.glob("scores-*")) - before
        return (
            [load_file(work / layer["files"]["kept.channels"])["channels"] for layer in layers],
            [load_file(path)["channels.compared"] for path in sorted(scores.iterdir())],
        )

    scored(".2")
    after_another = scored(".6")
    for directory in work.glob("score*"):
        shutil.rmtree(directory)
    np.testing.assert_array_equal(after_another, scored(".6"))


@pytest.mark.parametrize(("method", "scale"), [("magnitude", 0.7), ("wanda-sp", 0.4), ("obs", 0.4)])
def test_a_loss_is_compared_between_heads_and_channels_by_the_parameter(
    checkpoint, text, call, tmp_path, method, scale
):
    """Where a KV group costs more than a channel, but less for each of its parameters."""
    model = checkpoint()
    dense = load_file(model / "model.safetensors")
    for layer in range(3):
        dense[tensor_name(layer, "o")] *= scale
    save_file(dense, model / "model.safetensors")
    stats = calibrated_here(call, model, text, tmp_path)
    layers = call("score", "stats.jsonl", "--sparsity", ".3", "--multiple-of", 1,
                  "--min-channels", 1, "--method", method, "--allocation", "global")  # fmt: skip
    cost_group, cost_channel, total = 2 * 64 * 16 * 3, 3 * 64, 3 * (64 * 16 * 12 + 96 * 192)
    units = []
    for layer, parts in enumerate(stats):
        for matrix, blocks, cost in (("o", 2, cost_group), ("down", 96, cost_channel)):
            W = dense[tensor_name(layer, matrix)].T.astype(np.float64)
            A = sum(gram.unpack(part[f"{matrix}.gram"]) for part in parts)
            if method == "obs":
                A += 1e-4 * np.diagonal(A).mean() * np.eye(len(A))
                inverse = np.linalg.inv(A)
            for unit in range(blocks):
                rows = np.arange(len(W)).reshape(blocks, -1)[unit]
                loss = (W[rows] ** 2).sum(axis=1)
                if method == "wanda-sp":
                    loss = loss * np.diagonal(A)[rows] / (8 * 32)
                elif method == "obs":
                    within = np.linalg.inv(inverse[np.ix_(rows, rows)])
                    loss = np.einsum("io,ij,jo->", W[rows], within, W[rows])
                units.append((np.sum(loss) / cost, layer, matrix, unit, cost))
    removed, gone = 0, {(layer, matrix): [] for layer in range(3) for matrix in ("o", "down")}
    for _, layer, matrix, unit, cost in sorted(units):
        last = matrix == "o" and gone[layer, matrix]
        if not last and removed + cost <= 0.3 * total:
            gone[layer, matrix].append(unit)
            removed += cost
    for layer, record in enumerate(layers):
        kept = load_file(tmp_path / "w" / record["files"]["kept.heads"])
        for name, matrix in {"heads": "o", "channels": "down"}.items():
            assert np.flatnonzero(kept[name] == 0).tolist() == sorted(gone[layer, matrix])
    assert any(gone[layer, "o"] for layer in range(3))
    assert any(gone[layer, "down"] for layer in range(3))


@pytest.mark.parametrize("weighting", ["none", "token"])
@pytest.mark.parametrize("method", methods.UNITS)
def test_every_method_removes_what_is_asked(calibrated, run, method, weighting):
    _, records = calibrated(
        stats="token" if weighting == "token" else "structural",
        labels="text" if methods.UNITS[method].needs_slopes else "model",
    )
    for allocation in ("global", "uniform"):
        done = run("score", "--sparsity", ".35", "--method", method, "--multiple-of", 4,
                   "--allocation", allocation, "--weighting", weighting, records)  # fmt: skip
        cost_group, cost_channel, total = 2 * 64 * 16 * 3, 3 * 64, 3 * (64 * 16 * 12 + 96 * 192)
        removed = 0
        for line in done.stdout.splitlines()[1:-1]:
            kept = json.loads(line)["values"]["kept"]
            assert kept["kv_heads"] >= 1
            assert kept["channels"] % 4 == 0
            removed += (2 - kept["kv_heads"]) * cost_group + (96 - kept["channels"]) * cost_channel
        step = 4 * cost_channel * (3 if allocation == "uniform" else 1)
        assert abs(removed - 0.35 * total) <= step
        assert f"{removed / total:.4%}" in done.stderr


def test_flap_orders_by_the_plain_tokens_however_they_are_weighted(calibrated, run, tmp_path):
    _, records = calibrated(stats="token")
    for weighting in ("none", "token"):
        run("score", "--sparsity", ".3", "--method", "flap", "--multiple-of", 4,
            "--weighting", weighting, records)  # fmt: skip
    plain, weighted = (
        load_file(path) for path in (tmp_path / "dense.work").glob("scores-*/layer-00001.*")
    )
    for unit in ("heads", "channels"):
        np.testing.assert_array_equal(plain[f"{unit}.order"], weighted[f"{unit}.order"])
        assert (plain[f"{unit}.compared"] != weighted[f"{unit}.compared"]).any()


@pytest.mark.parametrize("method", ["greedy", "random"])
def test_weighting_that_changes_nothing_is_refused(calibrated, run, method):
    _, records = calibrated()
    words = ["score", "--sparsity", ".3", "--method", method, "--weighting", "token", records]
    line = error_of(run(*words, ok=False))
    assert f"--weighting token: changes nothing for --method {method} with --allocation" in line
    run(*words, "--allocation", "global")


def test_newton_iterated_and_closed_form_keep_the_same(calibrated, run):
    _, records = calibrated()
    masks = []
    words = ["--method", "newton", "--sparsity", ".3", "--multiple-of", 1]
    for more in ([], ["--newton-iterations", 7]):
        stream = run("score", *words, *more, records).stdout
        header, *layers, _ = map(json.loads, stream.splitlines())
        masks.append([load_file(f"{header['work']}/{r['files']['kept.channels']}") for r in layers])
    for one, other in zip(*masks, strict=True):
        for name, mask in one.items():
            np.testing.assert_array_equal(mask, other[name])


def test_scores_of_two_steps_join(calibrated, run, tmp_path):
    _, records = calibrated()
    heads = run("score", "--target", "heads", "--sparsity", ".1", records).stdout
    both = run(
        "score", "--target", "channels", "--sparsity", ".2", "--method", "wanda-sp", stdin=heads
    ).stdout
    kept = [json.loads(line)["values"]["kept"] for line in both.splitlines()[1:-1]]
    assert sum(2 - k["kv_heads"] for k in kept) == 1
    assert sum(96 - k["channels"] for k in kept) == 96
    refitted = run("compensate", stdin=both).stdout
    run("export", tmp_path / "out", stdin=refitted)
    # A score behind the refit would make it one of other units.
    done = run("score", "--target", "channels", "--sparsity", ".3", stdin=refitted, ok=False)
    assert "run compensate and recover after the last score" in error_of(done)


def steps(model, text, out):
    calibrate = f"calibrate {model} --text {text} --samples 8 --sequence-length 32 --work w"
    calibrate += " --stats all --attention-samples 2 --attention-length 16"
    return [calibrate, "score --sparsity .3", "compensate", f"export {out}"]


def shell(script, cwd):
    subprocess.run(["sh", "-ec", script], cwd=cwd, check=True, capture_output=True, timeout=300)


def test_one_pipe_step_by_step_and_killed_give_the_same_bytes(checkpoint, text, start, tmp_path):
    model = checkpoint(dtype="bfloat16", num_hidden_layers=8)
    parts = steps(model, text, "out")
    work, out = tmp_path / "w", tmp_path / "out"

    def clean():
        found = contents(out), contents(work)
        shutil.rmtree(out)
        shutil.rmtree(work)
        return found

    shell(" | ".join(f"{PRUNETOOL} {part}" for part in parts), tmp_path)
    piped = clean()

    files = ["a.jsonl", "b.jsonl", "c.jsonl"]
    script = [f"{PRUNETOOL} {parts[0]} -o {files[0]}"]
    script += [f"{PRUNETOOL} {parts[i]} {files[i - 1]} -o {files[i]}" for i in (1, 2)]
    shell("\n".join([*script, f"{PRUNETOOL} {parts[3]} {files[2]}"]), tmp_path)
    stream = (tmp_path / "a.jsonl").read_text()
    assert clean() == piped

    running = start(shlex.split(parts[0]), first=at_layer(5, DIE))
    seen, _ = running.communicate()
    assert running.returncode == -signal.SIGKILL
    assert '"end"' not in seen
    assert list(work.glob("hidden-*")), "killed in the middle"
    early = sorted(work.glob("stats/layer-0000[0-3]*"))
    assert len(early) >= 4
    made = {path: path.stat().st_mtime_ns for path in early}
    shell("\n".join([*script, f"{PRUNETOOL} {parts[3]} {files[2]}"]), tmp_path)
    assert (tmp_path / "a.jsonl").read_text() == stream
    assert {path: path.stat().st_mtime_ns for path in early} == made, "layers done are not redone"
    assert clean() == piped


def test_a_finished_calibration_is_read_not_made_again(calibrated, run, text, tmp_path):
    model, records = calibrated()
    work = tmp_path / "dense.work"
    before = contents(work)
    words = ["calibrate", model, "--text", text, "--samples", 8, "--sequence-length", 32,
             "--held-out", 2, "--work", work]  # fmt: skip
    assert run(*words).stdout == records.read_text()
    assert contents(work) == before
    words[words.index("--samples") + 1] = 9
    line = error_of(run(*words, ok=False))
    assert "holds another run: --samples was 8 and is 9, --gradients was 6 and is 7; give" in line
    run(*words, "--overwrite")


def test_a_failed_step_stops_the_pipe_and_nothing_looks_whole(checkpoint, text, tmp_path):
    model = checkpoint()
    name = "model.layers.2.mlp.up_proj.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name][0, 0] = np.nan
    save_file(tensors, model / "model.safetensors")
    parts = steps(model, text, "out")
    done = subprocess.run(
        ["sh", "-c", " | ".join(f"{PRUNETOOL} {part}" for part in parts)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert f"{name} holds NaN or infinity" in error_of(done)
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_half_way_leaves_no_checkpoint(calibrated, run, tmp_path):
    _, records = calibrated()
    kept = tmp_path / "kept.jsonl"
    run("score", "--sparsity", ".1", records, "-o", kept)
    script = f"ulimit -f 60; exec {PRUNETOOL} export out {kept}"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert error_of(done)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".unfinished"]
    run("export", "out", kept, "--overwrite")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_export_refuses_what_it_would_destroy(calibrated, run, tmp_path):
    model, records = calibrated()
    kept = run("score", "--sparsity", ".1", records).stdout
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    assert "is not empty" in error_of(run("export", "full", stdin=kept, ok=False))
    line = error_of(run("export", model, "--overwrite", stdin=kept, ok=False))
    assert "is the model itself" in line
    assert (model / "model.safetensors").exists()


def test_steps_out_of_order_say_what_is_missing(calibrated, run, tmp_path):
    _, records = calibrated()
    done = run("compensate", records, ok=False)
    assert "run prunetool score before this step" in error_of(done)
    (tmp_path / "dense.work" / "stats" / "layer-00001.stats.safetensors").unlink()
    line = error_of(run("score", "--sparsity", ".1", records, ok=False))
    assert "layer-00001.stats.safetensors: cannot be read" in line


def test_without_held_out_tokens_the_damping_must_be_given(calibrated, run):
    _, records = calibrated(held_out=0)
    kept = run("score", "--sparsity", ".3", records).stdout
    line = error_of(run("compensate", stdin=kept, ok=False))
    assert "--damping: no tokens were held out to choose it with; give one number" in line
    run("compensate", "--damping", "0.01", stdin=kept)


def test_a_sparsity_out_of_reach_is_said_before_scoring(calibrated, run, tmp_path):
    _, records = calibrated()
    line = error_of(run("score", "--sparsity", ".95", records, ok=False))
    assert "--sparsity: asks for" in line
    assert not list((tmp_path / "dense.work").glob("score*"))


def test_the_card_and_companions_go_along(calibrated, run, tmp_path):
    model, records = calibrated()
    (model / "generation_config.json").write_text('{"eos_token_id": 257}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "LICENSE").write_text("free")
    prune(run, records, tmp_path / "out", score=["--sparsity", ".3"])
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    for word in ("library_name: transformers", '"command": "compensate"', '"sparsity": 0.3'):
        assert word in card
    assert AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).head_dim == 16


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}])
def test_mqa_and_mha_go_through(calibrated, run, tmp_path, held_out, changes):
    _, records = calibrated(stats="all", **changes)
    prune(run, records, tmp_path / "out", score=["--sparsity", ".3", "--multiple-of", 8])
    _, theirs = loss_in_transformers(tmp_path / "out", held_out)
    assert evaluated(run, tmp_path / "out", tmp_path)["loss"] == pytest.approx(theirs, abs=2e-5)


def test_a_pruned_model_can_be_pruned_again(calibrated, run, text, tmp_path, held_out):
    _, records = calibrated()
    prune(run, records, tmp_path / "once", score=["--sparsity", ".2", "--multiple-of", 8])
    again = run(
        "calibrate", tmp_path / "once", "--text", text, "--samples", 8, "--sequence-length", 32
    ).stdout
    kept = run("score", "--sparsity", ".2", "--multiple-of", 8, stdin=again).stdout
    run("export", tmp_path / "twice", stdin=run("compensate", stdin=kept).stdout)
    _, theirs = loss_in_transformers(tmp_path / "twice", held_out)
    assert evaluated(run, tmp_path / "twice", tmp_path)["loss"] == pytest.approx(theirs, abs=2e-5)


def test_inspect_counts_what_is_there(checkpoint, run):
    model = checkpoint(attention_bias=True)
    result = json.loads(run("inspect", model).stdout)
    stored = load_file(model / "model.safetensors")
    assert result["parameters"] == sum(array.size for array in stored.values())
    assert result["size_bytes"] == sum(array.nbytes for array in stored.values())
    assert result["layer_matrices"] == sum(
        a.size for n, a in stored.items() if "layers" in n and n.endswith("proj.weight")
    )
    assert os.path.basename(result["model"]) == "dense"
