"""Calibration text that the model writes itself."""

import json
import signal

import click
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prunetool import card, corpus, records, workdir
from prunetool.model import open_model
from prunetool.steps import selftext
from tests.conftest import error_of

NARROW = "from prunetool.steps import selftext\nselftext.WIDEST = 2\n"  # for a process of its own
KILLED = f"""{NARROW}
import os, signal
from prunetool import workdir
def write(work, name, arrays, real=workdir.write):
    real(work, name, arrays)
    if name.startswith("self-") and len(arrays["tokens"]) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
workdir.write = write
"""


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(selftext, "WIDEST", 2)


def words(model, *more, samples=5, work="w"):
    return ["calibrate", model, "--text", "self", "--samples", samples, "--sequence-length", 16,
            "--held-out", 1, "--work", work, "-o", f"{work}.jsonl", *more]  # fmt: skip


def kept(work):
    (path,) = work.glob("self-*.safetensors")
    return path


def ids(work):
    return load_file(kept(work))["tokens"]


def test_the_run_is_one_over_the_sampled_ids(checkpoint, run, tmp_path):
    model = checkpoint()
    said = run(*words(model)).stderr
    assert "own text in " in said
    tokens = ids(tmp_path / "w")
    assert (tokens.shape, tokens.dtype) == ((6, 16), np.int32)  # in whole batches of two
    done = json.loads((tmp_path / "w/run.json").read_text())
    assert done["tokens"] == corpus.fingerprint(tokens[:5])
    assert (done["text"], done["shuffle"], done["bos"]) == ("self", 0, None)
    run("calibrate", model, "--tokens", kept(tmp_path / "w"), "--samples", 5, "--sequence-length",
        16, "--held-out", 1, "--work", "v", "-o", "v.jsonl")  # fmt: skip
    files = list((tmp_path / "w/stats").glob("*.safetensors"))
    assert files
    for file in files:
        assert file.read_bytes() == (tmp_path / "v/stats" / file.name).read_bytes()


def test_a_sequence_is_the_same_among_any_number_of_others(checkpoint, run, tmp_path):
    model = checkpoint()
    run(*words(model, samples=2, work="two"))
    run(*words(model, "--batch-size", 1, samples=7, work="seven"))
    two, seven = ids(tmp_path / "two"), ids(tmp_path / "seven")
    assert np.array_equal(two, seven[:2])
    assert len({*map(bytes, seven)}) == 8
    run(*words(model, "--shuffle", 1, samples=2, work="other"))
    assert not np.array_equal(two, ids(tmp_path / "other"))


def test_what_is_kept_is_not_sampled_again(checkpoint, run, tmp_path, monkeypatch):
    model = checkpoint()
    run(*words(model, samples=4))
    before = ids(tmp_path / "w")
    sampled = []
    sample = selftext.Sampler._sample
    monkeypatch.setattr(
        selftext.Sampler, "_sample",
        lambda self, decoder, start: sampled.append(start) or sample(self, decoder, start),
    )  # fmt: skip
    run(*words(model, samples=4))
    run(*words(model, "--stats", "all", "--overwrite", samples=4))
    run(*words(model, "--overwrite", samples=3))
    assert sampled == []
    run(*words(model, "--overwrite", samples=6))
    assert sampled == [4]
    assert np.array_equal(ids(tmp_path / "w")[:4], before)

    data = bytearray(kept(tmp_path / "w").read_bytes())
    data[-1] ^= 1
    kept(tmp_path / "w").write_bytes(data)
    done = run(*words(model, samples=6))
    assert "sampled again" in done.stderr
    assert sampled == [4, 0, 2, 4]

    run("clean", "w")
    assert not (tmp_path / "w").exists()


def test_killed_while_it_samples_and_run_again_it_ends_in_the_same_bytes(
    checkpoint, start, run, tmp_path
):
    model = checkpoint()
    run(*words(model, work="whole"))
    killed = start(words(model), first=KILLED)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert len(ids(tmp_path / "w")) == 4
    again = start(words(model), first=NARROW)
    assert again.wait() == 0, again.stderr.read()
    assert kept(tmp_path / "w").read_bytes() == kept(tmp_path / "whole").read_bytes()
    files = list((tmp_path / "whole/stats").glob("*.safetensors"))
    assert files
    for file in files:
        assert file.read_bytes() == (tmp_path / "w/stats" / file.name).read_bytes()


@pytest.mark.parametrize(("bos", "first"), [("always", {256}), ("never", None)])
def test_sequences_begin_with_the_bos_or_anywhere(checkpoint, run, tmp_path, bos, first):
    run(*words(checkpoint(), "--bos", bos, samples=8))
    tokens = ids(tmp_path / "w")
    assert {*tokens[:, 0]} == first or (first is None and len({*tokens[:, 0]}) > 5)
    assert len({*tokens[:, 1]}) > 5


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--shuffle", 1], "holds another run: --shuffle was 0 and is 1"),
        (["--samples", 3], "holds another run: --samples was 2 and is 3"),
        (["--dtype", "bfloat16"], 'holds another run: --dtype was "float32" and is "bfloat16"'),
    ],
)
def test_another_run_is_refused_before_anything_is_sampled(
    checkpoint, run, tmp_path, monkeypatch, more, says
):
    model = checkpoint()
    run(*words(model, samples=2))
    monkeypatch.delattr(selftext.Sampler, "load")
    assert says in error_of(run(*words(model, *more, samples=2), ok=False))


def test_the_work_directory_of_another_command_is_refused_at_once(checkpoint, run, tmp_path):
    model = checkpoint()
    claimed = workdir.identity("evaluate", open_model(str(model)).identity(), "", "1", {})
    workdir.claim(tmp_path / "w", claimed)
    line = error_of(run(*words(model, "--overwrite"), ok=False))
    assert line.endswith("w: holds a run of evaluate; give another --work")


def test_ids_of_another_vocabulary_are_refused(checkpoint, run, tmp_path):
    model = checkpoint()
    run(*words(model, samples=2))
    name = kept(tmp_path / "w").name
    workdir.write(tmp_path / "w", name, {"tokens": np.full((2, 16), 260, np.int32)})
    line = error_of(run(*words(model, samples=2), ok=False))
    assert f"{name}: has token ids up to 260, outside the vocabulary of 260" in line


def test_what_is_not_finite_is_not_sampled_from(checkpoint, run, tmp_path):
    model = checkpoint()
    tensors = load_file(model / "model.safetensors")
    for part in ("gate", "up"):
        tensors[f"model.layers.1.mlp.{part}_proj.weight"] *= 1e30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    line = error_of(run(*words(model), ok=False))
    assert "outputs NaN or infinity" in line
    assert not list((tmp_path / "w").glob("self-*"))


def test_the_card_names_it_as_the_text(checkpoint, run, tmp_path):
    run(*words(checkpoint(), "--shuffle", 3))
    with (tmp_path / "w.jsonl").open() as stream:
        header, _ = records.read(stream)
    (command,) = card.commands(header.history, "me/model")
    assert command.startswith("prunetool calibrate me/model --samples 5 ")
    assert " --text self --shuffle 3 --bos never " in command


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["evaluate", "m", "--text", "self"], "--text self is for calibrate"),
        (["calibrate", "m", "--text", "self", "--text", "a"], "cannot be joined"),
        (["calibrate", "m", "--text", "self", "--tokens", "a"], "either --text or --tokens"),
        (
            ["calibrate", "m", "--text", "self", "--coordinator", "auto"],
            "--text self is for a single process",
        ),
    ],
)
def test_where_it_cannot_be(call, given, says):
    with pytest.raises(click.UsageError, match=says):
        call(*given)


def test_a_file_of_this_name_is_a_file(checkpoint, text, run, tmp_path):
    text.rename(tmp_path / "self")
    given = words(checkpoint())
    given[3] = "./self"
    run(*given)
    assert not list((tmp_path / "w").glob("self-*"))
    assert "text" not in json.loads((tmp_path / "w/run.json").read_text())


def test_too_little_memory_is_said_before_the_model_is_read(checkpoint, run, monkeypatch):
    monkeypatch.setattr(selftext, "free_memory_bytes", lambda: 10**8)
    line = error_of(run(*words(checkpoint()), ok=False))
    assert line == (
        "Error: --text self: holds the whole model: it needs 0.4 GB of memory and 0.1 GB are free; "
        "give a text, a shorter --sequence-length, or sample on a larger machine"
    )


def test_it_writes_nothing_into_a_directory_of_others(checkpoint, run, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/mine").touch()
    line = error_of(run(*words(checkpoint()), ok=False))
    assert "w: is not a work directory of prunetool" in line
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["mine"]


def test_the_width_follows_from_model_and_length_alone(checkpoint, monkeypatch):
    monkeypatch.setattr(selftext, "WIDEST", 64)
    model = open_model(str(checkpoint()))
    each = 3 * 2 * 2 * 16 * 4  # bytes of a position: layers, k and v, KV heads, d, float32
    for length, width in ((16, 64), (selftext.CACHE_BYTES // each // 40, 32), (1 << 30, 1)):
        assert selftext.Sampler(model, length, None, "float32").width == width


def test_free_memory_is_what_the_system_says():
    free = selftext.free_memory_bytes()
    assert 1 << 26 < free < 1 << 50
