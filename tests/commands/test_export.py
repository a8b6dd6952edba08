"""What goes along with an exported checkpoint, and what does not."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunetool.errors import WorkError
from prunetool.steps.export import companions

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
    assert "code, which does not go along: modeling_evil.py" in caplog.text

    caplog.clear()
    (kept / "modeling_evil.py").rename(kept / "modeling_pruned_llama.py")  # written anew
    assert "modeling_pruned_llama.py" not in companions(kept)
    assert not caplog.text


@pytest.mark.parametrize(
    ("said", "config", "written"),
    [
        (None, {}, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"a": 1}, {}, {"a": 1, "tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"a": 1}, {"tokenizer_class": "GPT2Tokenizer"},
         {"a": 1, "tokenizer_class": "GPT2Tokenizer"}),
        ({"tokenizer_class": "GPT2Tokenizer"}, {}, {"tokenizer_class": "GPT2Tokenizer"}),
    ],
)  # fmt: skip
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
        [sys.executable, "-c", ASK, loader, tmp_path / "out"], capture_output=True, text=True,
        timeout=120, stdin=reads if stdin == "open" else subprocess.DEVNULL,
    )  # fmt: skip
    os.close(reads)
    os.close(writes)
    assert done.stdout.endswith("[64]\n"), done.stderr
    assert ("[y/N]" in done.stdout) == (loader == "Auto")


def test_a_mistral_is_computed_in_its_window_and_keeps_it(checkpoint, text, call, tmp_path):
    model = checkpoint(model_type="mistral", sliding_window=12, num_key_value_heads=4)
    words = ["--text", text, "--sequence-length"]
    ours = json.loads(call("evaluate", model, *words, 32, "--samples", 4))
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
