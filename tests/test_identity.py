"""What a run is of: whatever changes the result is noticed, and never mixed."""

import json
import os
import re

import pytest
from safetensors.numpy import load_file, save_file

from prunetool import workdir
from prunetool.errors import CheckpointError, WorkError
from prunetool.model import open_model

LAST_ROW = ("model.layers.1.mlp.down_proj.weight", -1)  # the fingerprint of headers has first rows


def change_config(model, **values):
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weight(model, name, row):
    tensors = load_file(model / "model.safetensors")
    tensors[name][row] += 1
    stat = (model / "model.safetensors").stat()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    os.utime(model / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_tokenizer(model):
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace("<eos>", "<end>"))


CHANGES = {
    "config.rope.theta": lambda model: change_config(model, rope_theta=20000.0),
    "config.rms_norm_eps": lambda model: change_config(model, rms_norm_eps=1e-6),
    "config.max_position_embeddings": lambda model: change_config(
        model, max_position_embeddings=256
    ),
    "config.rope.type": lambda model: change_config(
        model, rope_scaling={"rope_type": "linear", "factor": 2.0}
    ),
    "tensors": lambda model: change_weight(model, "model.norm.weight", 0),
    "tokenizer": change_tokenizer,
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_part_of_a_checkpoint_is_in_its_identity(checkpoint, what):
    model = checkpoint()
    before = open_model(str(model))
    was = before.identity()
    CHANGES[what](model)
    after = open_model(str(model))
    assert workdir.differing(was, after.identity())[0].key == what


def test_a_shard_of_another_size_is_another_checkpoint(checkpoint):
    model = checkpoint()
    before = open_model(str(model)).index.fingerprint()
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt", "by": "another"})
    assert open_model(str(model)).index.fingerprint() != before


def test_the_same_config_in_other_words_is_the_same_checkpoint(checkpoint):
    model = checkpoint()
    before = open_model(str(model)).identity()
    change_config(model, rope_theta=10000, torch_dtype="float16", rope_scaling=None)
    assert open_model(str(model)).identity() == before


def test_each_option_of_a_run_is_in_its_identity():
    given = ("calibrate", {"tensors": "a"}, "tokens", "0.1", {"samples": 8, "bos": None})
    run = workdir.identity(*given)
    others = ("evaluate", {"tensors": "b"}, "others", "0.2", {"samples": 9, "bos": None})
    keys = ("command", "tensors", "tokens", "version", "samples")
    for place, key in enumerate(keys):
        changed = list(given)
        changed[place] = others[place]
        assert workdir.differing(run, workdir.identity(*changed))[0].key == key
    assert workdir.differing(run, {**run, "bos": 1}) == [("bos", None, 1)]
    assert workdir.differing(run, run) == []
    assert workdir.differing({"a": True, "b": {"c": 1}}, {"a": 1, "b": {}}) == [
        ("a", True, 1),
        ("b.c", 1, None),
    ]


def calibration(model, text, *more):
    return ["calibrate", model, "--text", text, "--samples", 4, "--sequence-length", 16,
            "--held-out", 1, "--gradients", 2, "--work", "w", "-o", "a.jsonl", *more]  # fmt: skip


OPTIONS = {
    "samples": ["--samples", 5],
    "sequence_length": ["--sequence-length", 17],
    "held_out": ["--held-out", 2],
    "first_tokens": ["--first-tokens", 17],
    "gradients": ["--gradients", 1],
    "labels": ["--labels", "text"],
    "stream_dtype": ["--stream-dtype", "float32"],
    "stats": ["--stats", "all"],
    "attention": ["--attention-samples", 1],
    "dtype": ["--dtype", "bfloat16"],
    "stats_dtype": ["--stats-dtype", "float64"],
    "bos": ["--bos", "always"],
    "shuffle": ["--shuffle", 1],
}


def test_each_option_that_matters_makes_another_calibration(checkpoint, text, call, tmp_path):
    model = checkpoint()
    call(*calibration(model, text))
    recorded = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])["history"][0]
    assert recorded["options"].keys() - {"tokens"} == OPTIONS.keys()
    for key, option in OPTIONS.items():
        before = json.loads((tmp_path / "w/run.json").read_text())
        with pytest.raises(WorkError, match="holds another run: ") as caught:
            call(*calibration(model, text, *option))
        call(*calibration(model, text, *option, "--work", f"w-{key}"))
        after = json.loads((tmp_path / f"w-{key}/run.json").read_text())
        assert before[key] != after[key]
        differing = {k for k in after if before[k] != after[k]} - {"checksum", "tokens"}
        assert differing == {key}
        said = str(caught.value).split("run: ")[1]
        assert re.match(rf"{option[0]}\b.* was .* and is ", said)
        assert not re.search(r"[0-9a-f]{12}|token ids", said)
    call(*calibration(model, text, "--batch-size", 1))  # a killed run may go on with another


@pytest.mark.parametrize("what", CHANGES)
def test_no_step_goes_on_with_a_checkpoint_that_has_changed(checkpoint, text, call, what):
    model = checkpoint()
    call(*calibration(model, text))
    call("score", "--sparsity", ".3", "a.jsonl", "-o", "b.jsonl")
    call("compensate", "b.jsonl", "-o", "c.jsonl")
    CHANGES[what](model)
    for words in (
        ["score", "--sparsity", ".2", "a.jsonl"],
        ["compensate", "b.jsonl"],
        ["export", "out", "c.jsonl"],
        ["report", "c.jsonl"],
    ):
        with pytest.raises(CheckpointError, match=f"its {what} has changed since it was"):
            call(*words)
    known = f"{what}.* was .* and is" if "." in what else workdir.CHECKSUMS[what]
    with pytest.raises(WorkError, match=f"holds another run: {known}"):
        call(*calibration(model, text))
    call(*calibration(model, text, "--overwrite"))
    call("score", "--sparsity", ".3", "a.jsonl")


def test_a_changed_row_of_any_tensor_is_found_as_it_is_read(checkpoint, text, call, tmp_path):
    model = checkpoint(tie_word_embeddings=False)
    call(*calibration(model, text))
    call("score", "--sparsity", ".3", "a.jsonl", "-o", "b.jsonl")
    stale = {path.name for path in (tmp_path / "w").glob("score*")}
    assert len(stale) == 2
    for name in (LAST_ROW[0], "model.layers.0.self_attn.v_proj.weight", "lm_head.weight"):
        original = (model / "model.safetensors").read_bytes()
        change_weight(model, name, -1)
        with pytest.raises(CheckpointError, match=f"{name} has changed since the run began"):
            call("export", f"out-{name}", "b.jsonl")
        with pytest.raises(CheckpointError, match=f"{name} has changed since the run began"):
            call(*calibration(model, text))
        (model / "model.safetensors").write_bytes(original)
        call(*calibration(model, text))
    change_weight(model, *LAST_ROW)
    with pytest.raises(CheckpointError, match="has changed since the run began"):
        call("score", "--sparsity", ".2", "a.jsonl")
    before = load_file(tmp_path / "w/stats/layer-00002.stats.safetensors")
    call(*calibration(model, text, "--overwrite"))
    after = load_file(tmp_path / "w/stats/layer-00002.stats.safetensors")
    assert (before["down.gram"] != after["down.gram"]).any()
    assert not stale & {path.name for path in (tmp_path / "w").iterdir()}, "made of other weights"


def test_a_run_killed_at_its_very_end_still_knows_the_head(
    checkpoint, text, call, tmp_path, monkeypatch
):
    from prunetool.steps.calibrate import Calibration

    model = checkpoint()
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "_read_ends", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(*calibration(model, text))
    call(*calibration(model, text))
    known = json.loads((tmp_path / "w/weights.json").read_text())["tensors"]
    assert known.keys() == set(load_file(model / "model.safetensors"))


def test_an_evaluation_does_not_go_on_with_other_weights(
    checkpoint, text, call, tmp_path, monkeypatch
):
    from prunetool.steps import evaluate

    model = checkpoint()
    words = ["evaluate", model, "--text", text, "--samples", 4, "--sequence-length", 16]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "_mean_loss", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(*words, "--work", "w")
    change_config(model, rms_norm_eps=1e-6)
    with pytest.raises(WorkError, match=r"config\.rms_norm_eps was 1e-05 and is 1e-06"):
        call(*words, "--work", "w")
    change_config(model, rms_norm_eps=1e-5)
    change_weight(model, *LAST_ROW)
    with pytest.raises(CheckpointError, match="has changed since the run began"):
        call(*words, "--work", "w")
    expected = json.loads(call(*words))["loss"]
    assert json.loads(call(*words, "--work", "w", "--overwrite"))["loss"] == expected
    assert not list((tmp_path / "w").iterdir()) if (tmp_path / "w").exists() else True
