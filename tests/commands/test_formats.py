"""``export --format gguf``: what export and convert write, in one step."""

import pytest

from prunetool.formats import FORMATS
from prunetool.methods import load
from prunetool.steps import export
from tests.conftest import error_of
from tests.loaders.test_llamacpp import with_merges

SCORE = ["--sparsity", ".3", "--method", "newton", "--multiple-of", 8, "--allocation"]


@pytest.fixture
def kept(calibrated, run, tmp_path):
    """Records of a pruned model: ``kept("global", model_type="qwen2")``."""

    def make(allocation, **changes):
        dense, records = calibrated(gradients=0, **changes)
        with_merges(dense)
        # The merges change the tokens, so it is calibrated again.
        words = ["--text", "text.txt", "--samples", 8, "--sequence-length", 32, "--gradients", 0]
        run("calibrate", dense, *words, "--work", "w", "-o", records)
        run("score", records, *SCORE, allocation, "-o", "kept.jsonl")
        return tmp_path / "kept.jsonl"

    return make


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_it_is_the_file_that_convert_writes(kept, run, tmp_path, allocation):
    records = kept(allocation)
    run("export", "out", records)
    run("convert", "out", "by-convert.gguf")
    (tmp_path / "new").mkdir()
    done = run("export", "new/out.gguf", records, "--format", "gguf")
    assert (tmp_path / "new/out.gguf").read_bytes() == (tmp_path / "by-convert.gguf").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.gguf"]
    assert "Measure its speed: prunetool bench new/out.gguf" in done.stderr
    done = run("export", "new/out.gguf", records, "--format", "gguf", ok=False)
    assert "out.gguf: exists; name another file or give --overwrite" in error_of(done)
    run("export", "new/out.gguf", records, "--format", "gguf", "--overwrite")
    assert (tmp_path / "new/out.gguf").read_bytes() == (tmp_path / "by-convert.gguf").read_bytes()


def test_a_killed_run_goes_on(kept, run, tmp_path, monkeypatch):
    records = kept("uniform")
    (tmp_path / "whole").mkdir()
    run("export", "whole/out.gguf", records, "--format", "gguf")

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("prunetool.steps.gguf.convert_checkpoint", die)
        with pytest.raises(Killed):
            run("export", "out.gguf", records, "--format", "gguf")
    assert (tmp_path / "out.gguf.checkpoint").is_dir()
    assert not (tmp_path / "out.gguf").exists()
    with monkeypatch.context() as patch:
        patch.setattr(export, "pruned_layer", die)  # the checkpoint is there
        run("export", "out.gguf", records, "--format", "gguf")
    assert not (tmp_path / "out.gguf.checkpoint").exists()
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole/out.gguf").read_bytes()


def test_what_cannot_be_written_is_refused_before_anything_is(kept, run, tmp_path):
    records = kept("global", model_type="qwen3", attention_bias="absent", mlp_bias="absent")
    done = run("export", "out.gguf", records, "--format", "gguf", ok=False)
    line = error_of(done)
    assert "llama.cpp: has no architecture with norms of the heads and layers of unequal" in line
    assert not list(tmp_path.glob("out*"))
    for command in (["export", "out", records], ["run", "dense", "out", "--text", "text.txt",
                                                 "--sparsity", ".2"]):  # fmt: skip
        done = run(*command, "--format", "gguf", ok=False)
        assert "this --format writes a file: name it out.gguf" in done.stderr
    (tmp_path / "out.gguf").mkdir()
    done = run("export", "out.gguf", records, "--format", "gguf", ok=False)
    assert "out.gguf: is a directory; name a file" in error_of(done)


def test_run_writes_it_too(checkpoint, text, run, tmp_path):
    with_merges(checkpoint())
    words = ["--text", text, "--samples", 4, "--sequence-length", 32, "--sparsity", ".2"]
    run("run", "dense", "out.gguf", *words, "--format", "gguf")
    assert (tmp_path / "out.gguf").read_bytes()[:4] == b"GGUF"
    done = run("run", "dense", "out.gguf", *words, "--format", "gguf", ok=False)
    assert "out.gguf: exists; name another file" in error_of(done)
    assert "calibrate: " not in done.stderr


def test_run_refuses_what_it_cannot_write_before_it_begins(checkpoint, text, run, tmp_path):
    checkpoint()  # its BPE has no merges
    words = ["--text", text, "--samples", 4, "--sequence-length", 32, "--sparsity", ".2"]
    done = run("run", "dense", "out.gguf", *words, "--format", "gguf", ok=False)
    assert "tokenizer.json: has no merges" in error_of(done)
    assert not (tmp_path / "dense.prunetool").exists()


def test_a_split_file_is_taken_too(kept, run):
    records = kept("uniform")
    words = ["export", "out.gguf", records, "--format", "gguf", "--max-shard-size", 100_000]
    first = "out-00001-of-0000"
    assert f"prunetool bench {first}" in run(*words).stderr
    line = error_of(run(*words, ok=False))
    assert line.startswith(f"Error: {first}")
    assert "exists; name another file" in line


def test_every_row_names_functions_that_are_there():
    for row in FORMATS.values():
        for function in filter(None, (row.check, row.finish)):
            assert callable(load(function))
