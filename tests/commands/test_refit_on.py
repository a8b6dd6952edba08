"""``compensate --refit-on``: what one calibration scored, refitted on the tokens of another."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import error_of

HOW = ("--method", "random", "--sparsity", ".3")  # scores that no calibration changes


@pytest.fixture
def two(checkpoint, call, tmp_path):
    """Two calibrations of a checkpoint, a.jsonl and b.jsonl, and what each keeps: the same."""

    def make(**changes):
        path = checkpoint(**changes)
        for seed, name in enumerate("ab"):
            ids = np.random.default_rng(seed).integers(0, 250, (6 + seed, 32))
            np.save(tmp_path / f"{name}.npy", ids)
            call(
                "calibrate", path, "--tokens", f"{name}.npy", "--samples", 6 + seed,
                "--stats", "all", "--sequence-length", 32, "--work", f"{name}.work",
                "-o", f"{name}.jsonl",
            )  # fmt: skip
            call("score", f"{name}.jsonl", *HOW, "--allocation", "global", "-o", f"{name}.kept")
        return path

    return make


def refits(stream):
    """Of each layer, its reports and arrays."""
    header, *layers, _ = map(json.loads, stream.splitlines())
    files = [load_file(f"{header['work']}/{layer['files']['refit']}") for layer in layers]
    return [layer["values"]["refit"] for layer in layers], files


@pytest.mark.parametrize("bias", [False, True])
def test_the_refit_is_that_of_the_other_calibration(two, call, bias):
    two(attention_bias=bias, mlp_bias=bias)
    other = refits(call("compensate", "a.kept", "--refit-on", "b.jsonl"))
    own = refits(call("compensate", "a.kept"))
    due = refits(call("compensate", "b.kept"))
    for found, right, before in zip(other[1], due[1], own[1], strict=True):
        assert found.keys() == right.keys()
        for name in right:
            np.testing.assert_allclose(found[name], right[name], rtol=1e-6)
        assert any(not np.array_equal(found[name], before[name]) for name in before)


def test_masks_are_updated_on_the_other_tokens(two, call):
    two()
    masks = ["--target", "up", "--method", "sparsegpt", "--sparsity", ".5"]
    for name in "ab":
        call("score", f"{name}.jsonl", *masks, "-o", f"{name}.masked")
    own, other = (
        refits(call("compensate", "a.masked", *more))[1] for more in ([], ["--refit-on", "b.jsonl"])
    )
    for one, two_ in zip(own, other, strict=True):
        zero = one["up_proj.weight"] == 0
        assert np.array_equal(zero, two_["up_proj.weight"] == 0)
        assert not np.allclose(one["up_proj.weight"], two_["up_proj.weight"])


def test_evaluate_knows_both_texts(two, call, run, tmp_path):
    two()
    call("compensate", "a.kept", "--refit-on", "b.jsonl", "-o", "c.jsonl")
    call("export", "out", "c.jsonl")
    for name in "ab":
        done = run("evaluate", "out", "--tokens", f"{name}.npy", "--sequence-length", 32, ok=False)
        assert "--allow-calibrated" in error_of(done)
    assert "--refit-on FILE" in (tmp_path / "out" / "README.md").read_text()


def test_another_part_held_out_is_another_refit(two, call):
    two()
    words = ["--tokens", "b.npy", "--samples", 7, "--sequence-length", 32, "--stats", "all"]
    call("calibrate", "dense", *words, "--held-out", 3, "--work", "c.work", "-o", "c.jsonl")
    by_b, by_c = (refits(call("compensate", "a.kept", "--refit-on", f"{n}.jsonl")) for n in "bc")
    held = [[of["down_proj"]["held_out_removed"] for of in found[0]] for found in (by_b, by_c)]
    assert held[0] != held[1], "the same tokens, but others choose the damping"


def test_masks_need_sums_of_the_other_tokens(two, call, run):
    two()
    masks = ["--target", "up", "--method", "sparsegpt", "--sparsity", ".5"]
    call("score", "a.jsonl", *masks, "-o", "a.masked")
    words = ["--tokens", "b.npy", "--samples", 7, "--sequence-length", 32]
    call("calibrate", "dense", *words, "--work", "c.work", "-o", "c.jsonl")
    line = error_of(run("compensate", "a.masked", "--refit-on", "c.jsonl", ok=False))
    assert line.endswith("no sums for the matrices that are masked; run it with --stats all")


def test_another_checkpoint_is_refused(two, call, run, checkpoint, tmp_path):
    two()
    path = checkpoint("other", seed=1)
    words = ["--tokens", "a.npy", "--samples", 6, "--sequence-length", 32]
    call("calibrate", path, *words, "-o", "o.jsonl")
    done = run("compensate", "a.kept", "--refit-on", "o.jsonl", ok=False)
    assert error_of(done) == "Error: o.jsonl: is of another checkpoint; calibrate the same one"
