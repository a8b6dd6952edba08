"""What goes along with an exported checkpoint, and what does not; and its shards."""

import json
import os
import subprocess
import sys

import click
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunetool import options
from prunetool.errors import WorkError
from prunetool.steps.export import Export, companions
from tests.commands.test_pipe import contents

TEMPLATES = "additional_chat_templates"


@pytest.fixture
def kept(checkpoint, text, call, tmp_path):
    """A model and the records of what it keeps, of unequal layers."""
    model = checkpoint()
    call("calibrate", model, "--text", text, "--samples", 4, "--sequence-length", 32,
         "--work", "w", "-o", "stats.jsonl")  # fmt: skip
    call("score", "--sparsity", ".3", "--multiple-of", 8, "stats.jsonl", "-o", "kept.jsonl")
    return model


def give_templates(directory):
    (directory / TEMPLATES).mkdir()
    (directory / "chat_template.jinja").write_text("default")
    (directory / TEMPLATES / "tools.jinja").write_text("{{ tools }}")
    (directory / TEMPLATES / "tools.py").write_text("raise SystemExit")


def test_templates_in_their_directory_go_along_and_load(kept, call, tmp_path):
    give_templates(kept)
    call("export", "out", "kept.jsonl")
    out = tmp_path / "out"
    assert [path.name for path in (out / TEMPLATES).iterdir()] == ["tools.jinja"]
    loaded = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert loaded.chat_template == {"default": "default", "tools": "{{ tools }}"}
    call("export", "out", "kept.jsonl")  # whole: nothing is written

    (kept / TEMPLATES / "tools.jinja").unlink()
    call("export", "out", "kept.jsonl", "--overwrite")
    assert not (out / TEMPLATES).exists(), "of the checkpoint before"


def test_a_directory_of_templates_that_is_a_link_is_neither_read_nor_written(kept, call, tmp_path):
    give_templates(kept)
    (kept / TEMPLATES).rename(tmp_path / "elsewhere")
    (kept / TEMPLATES).symlink_to(tmp_path / "elsewhere")
    assert not [name for name in companions(kept) if "/" in name]
    (kept / TEMPLATES).unlink()
    (kept / TEMPLATES).mkdir()
    (kept / TEMPLATES / "tools.jinja").symlink_to(tmp_path / "elsewhere/tools.jinja")
    assert not [name for name in companions(kept) if "/" in name]
    call("export", "out", "kept.jsonl")

    (tmp_path / "out" / TEMPLATES).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WorkError, match=f"{TEMPLATES}: would be replaced or out of place"):
        call("export", "out", "kept.jsonl", "--format", "dense", "--overwrite")
    assert (tmp_path / "elsewhere/tools.jinja").read_text() == "{{ tools }}"


def test_templates_of_the_user_are_not_replaced(kept, call, tmp_path):
    call("export", "out", "kept.jsonl")
    give_templates(kept)
    (tmp_path / "out" / TEMPLATES).mkdir()
    (tmp_path / "out" / TEMPLATES / "mine.jinja").write_text("mine")
    with pytest.raises(WorkError, match=r"mine\.jinja: would be replaced or out of place"):
        call("export", "out", "kept.jsonl", "--overwrite")


def test_templates_of_a_hub_cache_go_along(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    (snapshot / TEMPLATES).mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("free")
    (snapshot / TEMPLATES / "x.jinja").symlink_to("../../../blobs/1")
    assert companions(snapshot) == {f"{TEMPLATES}/x.jinja": b"free"}


def test_code_that_stays_behind_is_named(kept, caplog):
    (kept / "modeling_evil.py").write_text("raise SystemExit")
    assert "modeling_evil.py" not in companions(kept)
    assert "code, which is not copied: modeling_evil.py" in caplog.text

    caplog.clear()
    (kept / "modeling_evil.py").rename(kept / "modeling_pruned_llama.py")  # written anew
    assert "modeling_pruned_llama.py" not in companions(kept)
    assert not caplog.text


@pytest.mark.parametrize(
    ("said", "config", "written"),
    [
        (None, {}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"a": 1}, {}, {"a": 1, "tokenizer_class": "PreTrainedTokenizerFast"}),
        (
            {"a": 1},
            {"tokenizer_class": "GPT2Tokenizer"},
            {"a": 1, "tokenizer_class": "GPT2Tokenizer"},
        ),
        ({"tokenizer_class": "GPT2Tokenizer"}, {}, {"tokenizer_class": "GPT2Tokenizer"}),
    ],
)
def test_the_class_of_a_tokenizer_is_its_own_or_the_general_one(
    kept, call, tmp_path, said, config, written
):
    if said is not None:
        (kept / "tokenizer_config.json").write_text(json.dumps(said))
    path = kept / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    call("export", "out", "kept.jsonl")
    data = (tmp_path / "out/tokenizer_config.json").read_text()
    assert json.loads(data) == written
    if said == written:
        assert data == json.dumps(said), "its bytes too"
    call("export", "zeros", "kept.jsonl", "--format", "dense")  # whose class is known
    assert (tmp_path / "zeros/tokenizer_config.json").exists() == (said is not None)


ASK = """
import sys
from transformers import PreTrainedTokenizerFast, AutoTokenizer
loader = {"Auto": AutoTokenizer, "Fast": PreTrainedTokenizerFast}[sys.argv[1]]
print(loader.from_pretrained(sys.argv[2])("a").input_ids)
"""


@pytest.mark.parametrize(("loader", "stdin"), [("Fast", "open"), ("Auto", "closed")])
def test_a_tokenizer_loads_without_an_answer(kept, call, tmp_path, loader, stdin):
    """AutoTokenizer of version 5 asks, because it looks at the model first; it goes on without."""
    call("export", "out", "kept.jsonl")
    reads, writes = os.pipe()
    done = subprocess.run(
        [sys.executable, "-c", ASK, loader, tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=reads if stdin == "open" else subprocess.DEVNULL,
    )
    os.close(reads)
    os.close(writes)
    assert done.stdout.endswith("[64]\n"), done.stderr
    assert ("[y/N]" in done.stdout) == (loader == "Auto")


def test_a_mistral_is_computed_in_its_window_and_keeps_it(checkpoint, text, call, tmp_path):
    model = checkpoint(model_type="mistral", sliding_window=12, num_key_value_heads=4)
    words = ["--text", text, "--sequence-length"]
    ours = json.loads(call("evaluate", "--allow-calibrated", model, *words, 32, "--samples", 4))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode(text.read_text()).ids[:128]).view(4, 32)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert loaded.config.sliding_window == 12
    with torch.no_grad():
        assert ours["loss"] == pytest.approx(loaded(ids, labels=ids).loss.item(), abs=1e-5)

    call("calibrate", model, *words, 32, "--samples", 4, "--work", "w", "-o", "stats.jsonl")
    call("score", "--sparsity", ".3", "--allocation", "uniform", "stats.jsonl", "-o", "kept.jsonl")
    call("export", "out", "kept.jsonl")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["model_type"], written["sliding_window"]) == ("mistral", 12)


SIZES = {  # of three layers of at most 123 KB, and an embedding and a head of 67 KB
    "1": 6, "140kb": 5, "0.2 MB": 3, "1MiB": 1, "5GB": 1, "1000000B": 1,
}  # fmt: skip


def tensors_in(directory):
    return {n: a for path in directory.glob("*.safetensors") for n, a in load_file(path).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_shards_of_every_size_hold_the_same_model(checkpoint, text, call, tmp_path, tied):
    model = checkpoint(tie_word_embeddings=tied)
    words = ["--text", text, "--samples", 4, "--sequence-length", 32]
    call("calibrate", model, *words, "--work", "w", "-o", "stats.jsonl")
    call("score", "--sparsity", ".3", "--multiple-of", 8, "stats.jsonl", "-o", "kept.jsonl")
    said, ids = [], torch.arange(40).view(1, 40)
    for number, (size, count) in enumerate(SIZES.items()):
        out = tmp_path / f"out-{number}"
        call("export", out, "kept.jsonl", "--max-shard-size", size)
        shards = sorted(path.name for path in out.glob("*.safetensors"))
        count -= tied and count > 1  # no head
        assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        listed = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(listed["weight_map"].values()) == set(shards)
        if number not in (0, 3):
            continue
        theirs = AutoModelForCausalLM.from_pretrained(
            out, dtype=torch.float32, trust_remote_code=True
        )
        with torch.no_grad():
            logits = theirs(ids).logits.numpy()
        found = json.loads(call("inspect", out))
        assert found["size_bytes"] == listed["metadata"]["total_size"]
        loss = json.loads(call("evaluate", "--allow-calibrated", out, *words))["loss"]
        stored = {n: (a.dtype, a.shape, a.tobytes()) for n, a in tensors_in(out).items()}
        said.append((stored, logits.tolist(), loss, found["parameters"]))
    assert said[0] == said[1]


KILLED = """
import os, sys
from prunetool import cli
from prunetool.steps import export

def stopping(model, work, record, make=export.pruned_layer, **more):
    if record.index == int(sys.argv[1]):
        os._exit(9)
    return make(model, work, record, **more)

export.pruned_layer = stopping
cli.group.main(sys.argv[2:], standalone_mode=False)
"""


@pytest.mark.parametrize("size", ["250KB", "5GB"], ids=["two layers a shard", "one shard"])
@pytest.mark.parametrize("masked", [False, True], ids=["pruned", "masked too"])
def test_killed_inside_a_shard_and_run_again_it_ends_in_the_same_bytes(
    checkpoint, text, call, tmp_path, size, masked
):
    model = checkpoint(num_hidden_layers=4)
    call("calibrate", model, "--text", text, "--samples", 4, "--sequence-length", 32,
         "--stats", "all", "--work", "w", "-o", "stats.jsonl")  # fmt: skip
    kept = "stats.jsonl"
    if masked:
        call("score", "--target", "weights", "--method", "wanda", "--sparsity", ".5",
             "stats.jsonl", "-o", "m.jsonl")  # fmt: skip
        kept = "m.jsonl"
    call("score", "--sparsity", ".2", "--multiple-of", 8, kept, "-o", "kept.jsonl")
    words = ["kept.jsonl", "--max-shard-size", size]
    call("export", "whole", *words)
    assert ("Nonzero weights" in (tmp_path / "whole/README.md").read_text()) == masked
    whole = contents(tmp_path / "whole")
    for layer in range(4):
        out = tmp_path / f"out-{layer}"
        killed = [sys.executable, "-c", KILLED, str(layer), "export", out, *words]
        assert subprocess.run(killed, capture_output=True).returncode == 9
        made = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
        assert len(list(out.glob(".*-partial/file"))) == 1, "a shard is under way"
        call("export", out, *words)
        assert contents(out) == whole
        assert {path: path.stat().st_mtime_ns for path in made} == made, "whole ones are kept"
        assert len(list(out.iterdir())) == len(list((tmp_path / "whole").iterdir()))
        assert made or size == "5GB" or layer < 2


def test_another_size_is_another_run_and_leaves_no_shard_of_the_one_before(kept, call, tmp_path):
    call("export", "out", "kept.jsonl", "--max-shard-size", "1")
    many = len(list(tmp_path.glob("out/*.safetensors")))
    with pytest.raises(WorkError, match="is not empty; name another directory or give --over"):
        call("export", "out", "kept.jsonl")
    call("export", "out", "kept.jsonl", "--overwrite")
    call("export", "clean", "kept.jsonl")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
    assert len(list(tmp_path.glob("out/*.safetensors"))) == 1 < many


def test_a_directory_that_is_taken_is_refused_before_the_records_are_waited_for(
    kept, call, tmp_path, monkeypatch
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")

    def never(job, made):
        pytest.fail("the records were read to their end")

    monkeypatch.setattr(Export, "write", never)
    with pytest.raises(WorkError, match="is not empty"):
        call("export", "out", "kept.jsonl")


@click.command()
@options.max_shard_size_opt
def size_of(max_shard_bytes):
    return max_shard_bytes


@pytest.mark.parametrize(
    ("said", "size"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2**31), ("1.5 KB", 1500), ("7", 7),
     ("7B", 7), ("0.1TB", 10**11), ("4.7GB", 4_700_000_000)],
)  # fmt: skip
def test_sizes(said, size):
    assert size_of.main(["--max-shard-size", said], standalone_mode=False) == size


@pytest.mark.parametrize(
    "said", ["", "GB", "5XB", "-5GB", "0", "0.0001KB", "5iB", "inf", "nan", "1e9", "5GB 3MB", "٥GB"]
)
def test_what_is_no_size(said):
    with pytest.raises(
        click.BadParameter, match=r"give a size such as 5GB, 500MB|at least one byte"
    ):
        size_of.main(["--max-shard-size", said], standalone_mode=False)
