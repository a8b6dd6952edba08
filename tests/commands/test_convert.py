"""The command: killed and run again, run twice, and what else the directory holds."""

import os
import signal
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from prunetool import workdir
from prunetool.checkpoint.writer import sweep
from prunetool.errors import WorkError
from prunetool.steps.convert import convert_gguf
from tests.checkpoint.test_gguf import write_gguf, write_parts
from tests.conftest import error_of, tiny_config, write_checkpoint


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def gguf_path(tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny_config())
    return tmp_path / "m.gguf"


KILLED = """
import os, signal, sys
from pathlib import Path
from prunetool.checkpoint.gguf import GGUFModel
from prunetool.checkpoint.writer import CheckpointWriter
from prunetool.steps.convert import convert_gguf

path, out, shards = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for owner, name in ((GGUFModel, "tensors"), (CheckpointWriter, "put")):
    def stopping(*arguments, method=getattr(owner, name)):
        if len(list(out.glob("*.safetensors"))) == shards:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*arguments)
    setattr(owner, name, stopping)
convert_gguf(path, out, "bfloat16", max_shard_bytes=62_000, overwrite=False)
"""
SIZE = {"max_shard_bytes": 62_000}  # a layer's
SIZED = ["--max-shard-size", 62_000]


def kill_after(shards, gguf_path, out):
    """Kill a process that converts, once so many shards are written."""
    done = subprocess.run([sys.executable, "-c", KILLED, gguf_path, out, str(shards)])
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("shards", [0, 2, 5])
def test_killed_and_run_again_it_goes_on_and_ends_in_the_same_bytes(
    tmp_path, gguf_path, run, shards
):
    out = tmp_path / "out"
    convert_gguf(gguf_path, tmp_path / "whole", "bfloat16", **SIZE, overwrite=False)
    kill_after(shards, gguf_path, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert len(before) == shards
    assert not (out / "model.safetensors.index.json").exists()
    run("convert", gguf_path, out, *SIZED)
    assert files(out) == files(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in before} == before  # not written again


def test_another_dtype_or_another_file_does_not_go_on(tmp_path, gguf_path, run):
    out = tmp_path / "out"
    kill_after(2, gguf_path, out)
    (tmp_path / "out.lock").unlink()
    sweep(out)  # the shard that was under way
    left = files(out)
    line = error_of(run("convert", gguf_path, out, *SIZED, "--dtype", "float16", ok=False))
    assert "is not empty; name another directory or give --overwrite" in line
    data = bytearray(gguf_path.read_bytes())
    data[-1] ^= 1
    (tmp_path / "other.gguf").write_bytes(data)
    line = error_of(run("convert", tmp_path / "other.gguf", out, *SIZED, ok=False))
    assert "is not empty" in line
    assert files(out) == left
    run("convert", tmp_path / "other.gguf", out, *SIZED, "--overwrite")
    convert_gguf(tmp_path / "other.gguf", tmp_path / "whole", "bfloat16", **SIZE, overwrite=False)
    assert files(out) == files(tmp_path / "whole")


def test_shards_are_as_large_as_asked_and_another_size_does_not_go_on(tmp_path, gguf_path, run):
    out = tmp_path / "out"
    kill_after(2, gguf_path, out)
    assert "is not empty" in run("convert", gguf_path, out, ok=False).stderr
    run("convert", gguf_path, out, "--overwrite")
    assert [path.name for path in out.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    convert_gguf(gguf_path, tmp_path / "whole", "bfloat16", max_shard_bytes=10**9, overwrite=False)
    for name, data in files(tmp_path / "whole").items():
        assert name == ".prunetool.json" or (out / name).read_bytes() == data


def test_a_renamed_file_and_any_part_of_a_split_one_go_on(tmp_path, gguf_path, run):
    kill_after(2, gguf_path, tmp_path / "out")
    gguf_path.rename(tmp_path / "n.gguf")
    run("convert", tmp_path / "n.gguf", tmp_path / "out", *SIZED)
    write_parts(tmp_path)
    kill_after(2, tmp_path / "m-00001-of-00003.gguf", tmp_path / "split")
    run("convert", tmp_path / "m-00003-of-00003.gguf", tmp_path / "split", *SIZED)


def test_what_is_there_already_is_said_and_not_written_again(tmp_path, gguf_path, run):
    out = tmp_path / "out"
    run("convert", gguf_path, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert "out already has it" in run("convert", gguf_path, out).stderr
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_second_one_at_the_same_time_is_refused(tmp_path, gguf_path, run):
    with workdir.lock(tmp_path / "out"):
        line = error_of(run("convert", gguf_path, tmp_path / "out", ok=False))
    assert f"out: is being written by process {os.getpid()}" in line
    assert not (tmp_path / "out").exists()
    run("convert", gguf_path, tmp_path / "out")
    assert not (tmp_path / "out.lock").exists()


def test_overwriting_a_checkpoint_spares_the_gguf_and_what_is_the_users(tmp_path, run):
    repository = write_checkpoint(tmp_path / "repository", tiny_config())
    made = write_gguf(repository / "model.gguf", tiny_config())
    (repository / "notes.md").write_text("mine")
    gguf = (repository / "model.gguf").read_bytes()
    line = error_of(run("convert", repository / "model.gguf", repository, ok=False))
    assert "is not empty; name another directory or give --overwrite" in line
    run("convert", repository / "model.gguf", repository, "--overwrite", "--dtype", "float32")
    assert (repository / "model.gguf").read_bytes() == gguf
    assert (repository / "notes.md").read_text() == "mine"
    assert not (repository / "model.safetensors").exists()
    back = {}
    for path in repository.glob("*.safetensors"):
        back |= load_file(path)
    assert {name: array.tolist() for name, array in back.items()} == {
        name: array.tolist() for name, array in made.items()
    }


def test_an_input_of_a_name_that_would_be_written_is_never_replaced(tmp_path, gguf_path):
    out = write_checkpoint(tmp_path / "out", tiny_config())
    (out / "tokenizer.json").unlink()
    os.rename(gguf_path, out / "tokenizer.json")
    with pytest.raises(WorkError, match=r"tokenizer\.json: is read by this run"):
        convert_gguf(out / "tokenizer.json", out, "float32", **SIZE, overwrite=True)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, gguf_path, monkeypatch):
    usage = os.statvfs(tmp_path)

    class Usage:
        free = 1000
        total = used = usage.f_bavail

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(WorkError, match=r"needs 0\.00 GB of disk"):
        convert_gguf(gguf_path, tmp_path / "out", "float32", **SIZE, overwrite=False)
    assert not (tmp_path / "out").exists()
