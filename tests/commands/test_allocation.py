"""``score --allocation loss``: the split between layers, and the KV groups, from loss curves."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from prunetool import workdir
from prunetool.checkpoint import checksum
from prunetool.llama.weights import tensor_name
from prunetool.pruning import curve, gram
from tests.conftest import error_of

COST = {"o_proj": 2 * 64 * 16 * 3, "down_proj": 3 * 64}
TOTAL = 3 * (64 * 16 * 12 + 96 * 192)
OBS = ("--method", "obs")
FAST = (*OBS, "--multiple-of", 4, "--min-channels", 4)


def add_gradients(records, *, faulty=None):
    """Gradient sums of random gradients, as if calibrate had kept them."""
    header, *layers, end = map(json.loads, records.read_text().splitlines())
    header["history"][0]["options"]["gradients"] = 4
    random, work = np.random.default_rng(7), records.parent / header["work"]
    run = checksum.read_sealed(work / workdir.RUN_NAME)
    (work / workdir.RUN_NAME).write_text(json.dumps(checksum.sealed({**run, "gradients": 4})))
    for layer in layers:
        arrays = {"tokens": np.array([60])}
        for site in ("o", "down"):
            g = random.standard_normal((60, 64)) * random.exponential() * 10.0 ** -layer["index"]
            arrays[f"{site}.gram"] = gram.pack(g.T @ g).astype(np.float32)
        if layer["index"] == faulty:
            arrays["down.gram"][5] = np.nan
        name = f"stats/layer-{layer['index']:05d}.gradients.safetensors"
        workdir.write(work, name, arrays)
        layer["files"]["gradients"] = name
    records.write_text("".join(json.dumps(line) + "\n" for line in (header, *layers, end)))
    return records


@pytest.fixture
def with_gradients(calibrated):
    """A tiny checkpoint and records with gradients: ``with_gradients(num_key_value_heads=1)``."""

    def make(faulty=None, **changes):
        model, records = calibrated(**changes)
        return model, add_gradients(records, faulty=faulty)

    return make


LAYERS = ((4, 96), (2, 64), (8, 40))  # heads and channels


def layers_of(stream):
    return [json.loads(line) for line in stream.splitlines()[1:-1]]


def kept_in(layer, work, target):
    return load_file(work / layer["files"][f"kept.{target}"])[target].astype(bool)


def nats_of(model, work, layer, matrix, gone):
    """The loss of a refit without these rows, solved for explicitly."""
    stats = [load_file(work / layer["files"][kind]) for kind in ("stats", "held_out", "gradients")]
    site = matrix.removesuffix("_proj")
    tokens = sum(int(part["tokens"][0]) for part in stats[:2])
    A = sum(gram.unpack(part[f"{site}.gram"]) for part in stats[:2]) / tokens
    A += curve.DAMPING * np.diagonal(A).mean() * np.eye(len(A))
    G = gram.unpack(stats[2][f"{site}.gram"]) / int(stats[2]["tokens"][0])
    M = curve.MIX * G + (1 - curve.MIX) * np.trace(G) / len(G) * np.eye(len(G))
    W = load_file(model / "model.safetensors")[tensor_name(layer["index"], site)].T
    W = W.astype(np.float64)
    V = np.zeros_like(W)
    V[~gone] = np.linalg.solve(A[np.ix_(~gone, ~gone)], A[~gone] @ W)
    return 0.5 * np.trace((W - V).T @ A @ (W - V) @ M)


@pytest.mark.parametrize("target", ["heads,channels", "heads", "channels"])
def test_the_nats_are_those_of_a_refit_and_the_ratio_is_that_asked(
    with_gradients, run, tmp_path, target
):
    model, records = with_gradients(num_key_value_heads=4)
    sparsity = 0.1 if target == "heads" else 0.3
    cost, total = {**COST, "o_proj": 4 * 64 * 16}, 3 * (64 * 16 * 16 + 96 * 192)
    done = run("score", records, "--sparsity", sparsity, "--allocation", "loss", "--target", target,
               *(OBS if target == "heads" else FAST))  # fmt: skip
    removed, predicted = 0, 0.0
    for layer in layers_of(done.stdout):
        matrices = {"heads": "o_proj", "channels": "down_proj"}
        nats = layer["values"]["nats"]
        assert set(nats) == {matrices[t] for t in target.split(",")}
        for name in target.split(","):
            gone = ~kept_in(layer, tmp_path / "dense.work", name)
            removed += int(gone.sum()) * cost[matrices[name]]
            rows = np.repeat(gone, 16) if name == "heads" else gone
            expected = nats_of(model, tmp_path / "dense.work", layer, matrices[name], rows)
            assert nats[matrices[name]] == pytest.approx(expected, rel=1e-5, abs=1e-12)
        predicted += sum(nats.values())
    step = cost["o_proj"] if target == "heads" else 4 * cost["down_proj"]
    assert abs(removed - sparsity * total) <= step / 2
    assert f"{removed / total:.4%} (target" in done.stderr
    said = " ".join(done.stderr.split())
    assert f"predicted loss {predicted:.3g} nats a token" in said
    times = np.exp(curve.INTERACTION * predicted)
    factor = f"{times:.3g}" if times > 1.01 else f"{times:.5f}"
    assert f"expect more than {factor} x the perplexity" in said, "of few tokens"
    assert "nats" in done.stderr.split("predicted")[0]


def test_a_layer_whose_outputs_matter_less_loses_more(with_gradients, run):
    _, records = with_gradients()
    done = run("score", records, "--sparsity", ".3", "--allocation", "loss", *FAST)
    channels = [layer["values"]["kept"]["channels"] for layer in layers_of(done.stdout)]
    assert channels[0] > channels[1] >= channels[2]


def test_sparsities_share_the_curves_and_other_allocations_do_not(with_gradients, run, tmp_path):
    _, records = with_gradients()
    for sparsity, allocation in ((".2", "loss"), (".4", "loss"), (".2", "global")):
        done = run("score", records, "--sparsity", sparsity, "--allocation", allocation, *FAST)
        made = list(tmp_path.glob("dense.work/scores-*/layer-00001.safetensors"))
        assert len(made) == (2 if allocation == "global" else 1)
        assert all(
            ("nats" in r["values"]) == (allocation == "loss") for r in layers_of(done.stdout)
        )


def test_two_steps_each_give_the_nats_of_what_they_decide(with_gradients, run):
    _, records = with_gradients()
    words = ["score", "--allocation", "loss"]
    first = run(*words, *OBS, records, "--sparsity", ".05", "--target", "heads").stdout
    second = run(*words, *FAST, "--sparsity", ".2", "--target", "channels", stdin=first).stdout
    for one, both in zip(layers_of(first), layers_of(second), strict=True):
        assert both["values"]["nats"]["o_proj"] == one["values"]["nats"]["o_proj"]
        gone = both["values"]["kept"]["channels"] < 96
        assert (both["values"]["nats"]["down_proj"] > 0) == gone
    words = ["--sparsity", ".2", "--target", "channels", "--allocation", "global"]
    third = run("score", *FAST, *words, stdin=second).stdout
    assert all(set(layer["values"]["nats"]) == {"o_proj"} for layer in layers_of(third))


def test_layers_of_different_sizes_are_allocated(with_gradients, run, tmp_path):
    _, records = with_gradients(
        model_type="pruned_llama",
        per_layer_config={
            str(layer): {
                "num_attention_heads": h,
                "num_key_value_heads": h // 2,
                "intermediate_size": size,
            }
            for layer, (h, size) in enumerate(LAYERS)
        },
    )
    done = run("score", records, "--sparsity", ".3", "--allocation", "loss", *FAST)
    shares = [layer["values"]["kept"] for layer in layers_of(done.stdout)]
    total = sum(64 * 16 * 3 * h + 192 * size for h, size in LAYERS)
    kept = sum(64 * 16 * 6 * k["kv_heads"] + 192 * k["channels"] for k in shares)
    assert abs(total - kept - 0.3 * total) <= 2 * 192


def test_the_greedy_order_by_the_metric_predicts_less_than_magnitude(with_gradients, run):
    _, records = with_gradients()

    def predicted(method):
        done = run("score", records, "--sparsity", ".3", "--allocation", "loss", *FAST[:4],
                   "--method", method)  # fmt: skip
        return sum(sum(layer["values"]["nats"].values()) for layer in layers_of(done.stdout))

    assert predicted("greedy") < 0.9 * predicted("magnitude")


def test_a_calibration_without_gradients_is_refused_before_any_layer(calibrated, run, tmp_path):
    _, records = calibrated(gradients=0)
    done = run("score", records, "--sparsity", ".3", "--allocation", "loss", ok=False)
    assert error_of(done) == (
        "Error: --allocation loss: needs gradients, and calibrate kept none; run calibrate with "
        "--gradients 32, or give --allocation uniform"
    )
    assert not list(tmp_path.glob("dense.work/scores-*"))


def test_a_record_without_gradients_says_so(with_gradients, run):
    _, records = with_gradients()
    records.write_text(records.read_text().replace('"gradients": "stats/layer-00001', '"x": "', 1))
    text = records.read_text().splitlines()
    layer = json.loads(text[2])
    layer["files"].pop("x")
    records.write_text("\n".join([*text[:2], json.dumps(layer), *text[3:]]) + "\n")
    done = run("score", records, "--sparsity", ".3", "--allocation", "loss", ok=False)
    assert "layer 1: has no gradients; calibrate with --gradients" in error_of(done)


def test_gradients_that_are_not_finite_name_their_layer(with_gradients, run):
    _, records = with_gradients(faulty=1)
    done = run("score", records, "--sparsity", ".3", "--allocation", "loss", ok=False)
    words = "layer 1, down_proj: the 64 x 64 Gram matrix of the gradients: contains NaN"
    assert words in error_of(done)


def test_published_is_newton_over_all_layers_and_says_so(calibrated, run):
    _, records = calibrated()
    plain, short = (
        run("score", records, "--sparsity", ".3", *more).stdout.splitlines()
        for more in (
            ["--method", "newton", "--allocation", "global", "--lambda", 1, "--weighting", "none"],
            ["--published"],
        )
    )
    options = json.loads(short[0])["history"][-1]["options"]
    assert options["published"]
    assert (options["method"], options["allocation"]) == ("newton", "global")
    assert (options["lam"], options["weighting"]) == (1.0, "none")
    for one, other in zip(plain[1:-1], short[1:-1], strict=True):
        assert json.loads(one)["values"] == json.loads(other)["values"]
