"""compensate --bias: FLAP's mean instead of a refit, and a refit around the mean."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prunetool import records
from prunetool.model import open_model
from prunetool.stats import Stats
from tests.conftest import error_of
from tests.test_families import FAMILIES

ABSENT = {"attention_bias": "absent", "mlp_bias": "absent"}


def pruned(run, stats, bias, out, *score):
    run("score", stats, "-o", f"{out}.k.jsonl", "--sparsity", 0.3, *score)
    words = [] if bias is None else ["--bias", bias]
    done = run("compensate", f"{out}.k.jsonl", "-o", f"{out}.c.jsonl", *words)
    run("export", out, f"{out}.c.jsonl")
    return done


def read(path):
    with path.open() as stream:
        header, layers = records.read(stream)
        return header, list(layers)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "dtype": "bfloat16"}])
def test_the_mean_of_what_goes_is_the_bias(calibrated, run, tmp_path, changes):
    model, stats = calibrated(**changes)
    pruned(run, stats, "mean", "P")
    dense, result = open_model(str(model)), open_model(str(tmp_path / "P"))
    header, layers = read(tmp_path / "P.c.jsonl")
    assert header.history[-1]["options"]["bias"] == "mean"
    from prunetool.kept import extents, kept_units

    for record in layers:
        shape = dense.config.layer_shapes[record.index]
        kept = extents(kept_units(tmp_path / "dense.work", record, shape), shape, dense.config)
        sums = Stats(tmp_path / "dense.work", record, dense.config)
        for part in ("o", "down"):
            columns = kept[part].columns
            W = dense.part(record.index, part)
            mean = sums[f"{part}.total"] / sums.tokens
            expected = W[:, ~columns].astype(np.float64) @ mean[~columns]
            found = result.part(record.index, f"{part}_bias")
            assert found.dtype == W.dtype
            np.testing.assert_allclose(
                found.astype(np.float64), expected, rtol=1e-2 if "dtype" in changes else 1e-5,
                atol=1e-6,
            )  # fmt: skip
            own = result.part(record.index, part)[:, : columns.sum()]
            assert np.array_equal(own, W[:, columns])
        for part in ("q", "k", "v", "gate", "up"):
            assert not result.part(record.index, f"{part}_bias").any()


@pytest.mark.parametrize("allocation", ["loss", "uniform"])
@pytest.mark.parametrize("bias", ["mean", "refit"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_it_loads_in_transformers(calibrated, run, tmp_path, family, bias, allocation):
    changes = {} if family == "llama" else {**ABSENT, **FAMILIES[family]}
    _, stats = calibrated(**changes)
    pruned(run, stats, bias, "P", "--allocation", allocation)
    config = json.loads((tmp_path / "P/config.json").read_text())
    assert config["model_type"] == ("llama" if allocation == "uniform" else "pruned_llama")
    loaded, said = AutoModelForCausalLM.from_pretrained(
        tmp_path / "P", trust_remote_code=True, output_loading_info=True
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    ids = np.random.default_rng(0).integers(0, 255, (2, 24)).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids)
    with torch.no_grad():
        logs = torch.log_softmax(loaded.eval()(torch.tensor(ids).long()).logits, -1)
    expected = -logs[:, :-1].gather(2, torch.tensor(ids[:, 1:, None]).long()).mean()
    done = run("evaluate", "P", "--tokens", "ids.npy", "--sequence-length", 24)
    assert json.loads(done.stdout)["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_each_explains_more(calibrated, run, tmp_path):
    """On the calibration tokens: removing, the mean, and the refit around it."""
    _, stats = calibrated(held_out=0)
    found = {}
    for bias in ("mean", "refit", None):
        run("score", stats, "-o", "k.jsonl", "--sparsity", 0.3)
        words = ["--damping", 1e-4] if bias != "mean" else []
        words += ["--bias", bias] if bias else []
        run("compensate", "k.jsonl", "-o", "c.jsonl", *words)
        _, layers = read(tmp_path / "c.jsonl")
        found[bias] = [
            (of["removed"], of["refitted"])
            for layer in layers for of in layer.values["refit"].values() if of["removed"]
        ]  # fmt: skip
    for mean, refit, plain in zip(*found.values(), strict=True):
        assert mean[0] == refit[0] == plain[0]
        assert refit[1] <= plain[1] * (1 + 1e-3) < plain[0]
        assert refit[1] < mean[1] < mean[0]


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_families_that_have_no_biases(calibrated, run, family):
    changes = {"sliding_window": 16} if family == "mistral" else {}
    _, stats = calibrated(**{**ABSENT, **FAMILIES[family], **changes})
    run("score", stats, "-o", "k.jsonl", "--sparsity", 0.3)
    done = run("compensate", "k.jsonl", "-o", "c.jsonl", "--bias", "mean", ok=False)
    assert "--bias: no program loads a model of this architecture with biases" in error_of(done)


def test_what_would_be_lost_or_ignored_is_refused(calibrated, run):
    _, stats = calibrated()
    pruned(run, stats, "refit", "P")
    line = error_of(run("compensate", "P.c.jsonl", ok=False))
    assert line == "Error: P.c.jsonl: was already refitted; give the records of score"
    done = run("compensate", "P.k.jsonl", "--bias", "mean", "--damping", "0.1", ok=False)
    assert "--damping is for a refit, which --bias mean leaves out" in done.stderr
    run(
        "score", stats, "--target", "v", "--method", "magnitude", "--sparsity", 0.3, "-o", "m.jsonl"
    )
    line = error_of(run("compensate", "m.jsonl", "--bias", "mean", ok=False))
    assert "m.jsonl: removed no heads or channels; leave --bias out" in line


def test_recover_takes_none(calibrated, run):
    _, stats = calibrated()
    pruned(run, stats, "refit", "P")
    done = run("recover", "P.c.jsonl", ok=False)
    assert "has biases, and the dense model none" in done.stderr
