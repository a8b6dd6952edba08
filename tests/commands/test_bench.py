"""``bench``: it measures in transformers and in llama.cpp, and refuses what it cannot."""

import json

import pytest

from prunetool import runtimes
from prunetool.llama import forms
from tests.conftest import error_of
from tests.loaders.test_llamacpp import with_merges

WORDS = ["--prompt", 12, "--generate", 3, "--repeats", 2, "--threads", 1]


@pytest.fixture
def pruned(checkpoint, call, text, tmp_path):
    with_merges(checkpoint())
    words = ["--samples", 4, "--sequence-length", 32, "--gradients", 0, "--work", "w"]
    call("calibrate", "dense", "--text", text, *words, "-o", "a")
    how = ["--method", "random", "--allocation", "global"]
    call("score", "a", "--sparsity", ".4", *how, "-o", "b")
    call("export", "out", "b")
    return tmp_path / "out"


def test_it_measures_both_programs(pruned, call, run, tmp_path):
    call("convert", "dense", "dense.gguf")
    call("convert", "out", "out.gguf")
    models = ["dense", "out", "dense.gguf", "out.gguf"]
    done = run("bench", *models, *WORDS, "--plot", "speed.svg")
    found = json.loads(done.stdout)
    assert [each["model"] for each in found] == models
    assert [each["runtime"] for each in found] == 2 * ["transformers"] + 2 * ["llama.cpp"]
    for each in found:
        assert len(each["prompt_tokens_per_second"]) == 2
        assert len(each["generated_tokens_per_second"]) == 2
        assert min(each["prompt_tokens_per_second"]) > 0
        assert each["load_seconds"] > 0
        assert each["peak_bytes"] > 1e7
    assert found[2]["file_bytes"] == (tmp_path / "dense.gguf").stat().st_size
    assert done.stderr.count("1.00") >= 4, "of each program's first, prompt and generated"
    assert (tmp_path / "speed.svg").read_text().count("<circle") == 4


def test_code_that_is_not_ours_does_not_run(pruned, run, tmp_path):
    loader = pruned / "modeling_pruned_llama.py"
    loader.write_text(loader.read_text() + "\nopen('ran', 'w')\n")
    assert "transformers failed (" in error_of(run("bench", "out", *WORDS, ok=False))
    assert not (tmp_path / "ran").exists()
    loader.write_bytes(forms.loader_files(forms.PRUNED)[loader.name])
    config = json.loads((pruned / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "evil.Model"
    (pruned / "config.json").write_text(json.dumps(config))
    (pruned / "evil.py").write_text("open('ran', 'w')")
    assert "transformers failed (" in error_of(run("bench", "out", *WORDS, ok=False))
    assert not (tmp_path / "ran").exists()


def test_no_module_of_the_directory_that_the_user_is_in_runs(checkpoint, run, tmp_path):
    checkpoint()
    for name in ("numpy", "torch", "transformers"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    assert json.loads(run("bench", "dense", *WORDS).stdout)[0]["peak_bytes"] > 1e7
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_measured_is_one_line(checkpoint, run, tmp_path, monkeypatch):
    checkpoint()
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    line = error_of(run("bench", "dense", "none", *WORDS, ok=False))
    assert "none: is neither a checkpoint's directory nor a GGUF file" in line
    assert "a.gguf: llama.cpp failed (" in error_of(run("bench", "a.gguf", *WORDS, ok=False))
    assert "Traceback" in run("bench", "a.gguf", *WORDS, "-v", ok=False).stderr
    monkeypatch.setitem(runtimes.NEEDED, "transformers", ("not_there",))
    line = error_of(run("bench", "dense", *WORDS, ok=False))
    assert "transformers: needs not_there, which is not installed; pip install not_there" in line
