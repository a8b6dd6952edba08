"""``score --allocation loss`` and fisher for single weights, from the command to the checkpoint."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from prunetool.llama.weights import tensor_name
from prunetool.pruning import budget, curve, gram
from tests import references
from tests.conftest import error_of

GIVEN = {"q": "attention", "k": "attention", "v": "attention", "o": "o",
         "gate": "mlp", "up": "mlp", "down": "down"}  # fmt: skip
BY_LOSS = ("--allocation", "loss", "--method", "fisher")
UNIFORM = ["--allocation", "uniform", "--method", "fisher"]


def layers_of(stream):
    return [json.loads(line) for line in stream.splitlines()[1:-1]]


def weights(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return {key: array.astype(np.float64) for key, array in found.items()}


def sums(work, layer, part):
    """A, its tokens, and the mean squared gradients at the outputs of a matrix."""
    files = [load_file(work / f"stats/layer-{layer:05d}.{kind}.safetensors")
             for kind in ("stats", "held_out", "gradients")]  # fmt: skip
    A = gram.unpack(sum(f[f"{GIVEN[part]}.gram"].astype(np.float64) for f in files[:2]))
    if part in ("o", "down"):
        g2 = np.diagonal(gram.unpack(files[2][f"{part}.gram"])) / files[2]["tokens"]
        g2 = curve.MIX * g2 + (1 - curve.MIX) * g2.mean()
    else:
        g2 = files[2][f"{part}.square"].astype(np.float64) / files[2]["tokens"]
    return A, int(files[0]["tokens"][0] + files[1]["tokens"][0]), g2


def pruned(run, records, out, *steps, compensate=True):
    stream = records.read_text()
    said = []
    for step in steps:
        done = run("score", *step, stdin=stream)
        stream, said = done.stdout, [*said, " ".join(done.stderr.split())]
    if compensate:
        stream = run("compensate", stdin=stream).stdout
    run("export", out, stdin=stream)
    return layers_of(stream), said


@pytest.mark.parametrize(
    "changes",
    [{}, {"model_type": "qwen3", "head_dim": 16}, {"attention_bias": True, "mlp_bias": True}],
    ids=["llama", "qwen3", "biases"],
)
@pytest.mark.parametrize("parts", [tuple(GIVEN), ("k", "down")], ids=",".join)
def test_one_threshold_and_the_sweep_are_those_of_a_reference(
    calibrated, run, tmp_path, parts, changes
):
    dense, records = calibrated(stats="all", **changes)
    step = ["--target", ",".join(parts), "--sparsity", ".55", *BY_LOSS]
    _, (said,) = pruned(run, records, tmp_path / "out", step)
    before, after, losses = weights(dense), weights(tmp_path / "out"), {}
    for layer in range(3):
        for part in parts:
            A, tokens, g2 = sums(tmp_path / "dense.work", layer, part)
            A[np.diag_indices(len(A))] += curve.DAMPING * np.diagonal(A).mean()
            own = np.diagonal(np.linalg.inv(A))
            W = before[tensor_name(layer, part)]
            losses[layer, part] = np.array(
                [[0.5 * g2[i] * w**2 / (tokens * own[j]) for j, w in enumerate(row)]
                 for i, row in enumerate(W)]
            )  # fmt: skip
    total = sum(loss.size for loss in losses.values())
    gone = {place: (after[tensor_name(*place)] == 0).sum() for place in losses}
    assert sum(gone.values()) == round(0.55 * total)
    shares = [gone[place] / loss.size for place, loss in losses.items()]
    assert len(set(shares)) > 3
    assert max(shares) <= budget.MOST + 1 / 1024
    # The last loss that goes and the first that stays, by matrix: one bin apart at most.
    ends = [(np.sort(loss, axis=None)[gone[place] - 1], np.sort(loss, axis=None)[gone[place]])
            for place, loss in losses.items() if gone[place] < budget.MOST * loss.size]  # fmt: skip
    assert max(last for last, _ in ends) < 1.008 * min(first for _, first in ends)
    for layer, part in losses:
        A, _, g2 = sums(tmp_path / "dense.work", layer, part)
        W = before[tensor_name(layer, part)]
        _, values = references.sparsegpt(
            W, A, 0.01, gone[layer, part] / W.size, "unstructured", 128, g2
        )
        np.testing.assert_allclose(after[tensor_name(layer, part)], values, rtol=1e-5, atol=1e-6)
    assert f"removes {sum(gone.values()):,} of {total:,} weights of {', '.join(parts)}" in said
    share = sum(gone[layer, parts[0]] for layer in range(3)) / (3 * losses[0, parts[0]].size)
    assert f"{parts[0]} {share:.0%}" in said


def test_any_method_orders_the_weights_of_a_matrix(calibrated, run, tmp_path):
    _, records = calibrated(stats="all")
    counts = []
    for method in ("fisher", "sparsegpt", "wanda", "random"):
        step = ["--target", "weights", "--sparsity", ".5", "--allocation", "loss",
                "--method", method, "--pattern", "unstructured"]  # fmt: skip
        layers, _ = pruned(run, records, tmp_path / method, step, compensate=False)
        counts.append([mask["removed"] for layer in layers for mask in
                       layer["values"]["masks"].values()])  # fmt: skip
    assert all(count == counts[0] for count in counts)
    assert len(list((tmp_path / "dense.work").glob("scores-*/layer-00000.safetensors"))) == 1
    found = [weights(tmp_path / method) for method in ("fisher", "sparsegpt")]
    name = tensor_name(1, "up")
    assert ((found[0][name] == 0) != (found[1][name] == 0)).any()


def test_sums_of_units_alone_score_o_and_down(calibrated, run, tmp_path):
    _, records = calibrated()
    step = ["--target", "o,down", "--sparsity", ".5", *BY_LOSS]
    layers, _ = pruned(run, records, tmp_path / "out", step)
    assert all(set(layer["values"]["masks"]) == {"o", "down"} for layer in layers)


def test_the_ratio_is_of_the_units_kept_before(calibrated, run, tmp_path):
    _, records = calibrated(stats="all")
    heads = ["--target", "heads,channels", "--sparsity", ".3", "--multiple-of", 8,
             "--allocation", "uniform"]  # fmt: skip
    step = ["--target", "weights", "--sparsity", ".4", *BY_LOSS]
    layers, _ = pruned(run, records, tmp_path / "out", heads, step)
    after, gone, total = weights(tmp_path / "out"), 0, 0
    for layer in range(3):
        for part in GIVEN:
            W = after[tensor_name(layer, part)]
            gone, total = gone + (W == 0).sum(), total + W.size
    assert total < 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert gone == round(0.4 * total)
    assert "| 0 |" in (tmp_path / "out/README.md").read_text()
    assert layers[0]["values"]["refit"].keys() >= {"o_proj.masked", "q_proj.masked"}


def test_without_loss_every_matrix_loses_the_ratio(calibrated, run, tmp_path):
    _, records = calibrated(stats="all")
    for pattern in ("unstructured", "per-output", "2:4"):
        step = ["--target", "weights", "--sparsity", ".5", "--method", "fisher",
                "--pattern", pattern, "--allocation", "uniform"]  # fmt: skip
        pruned(run, records, tmp_path / pattern, step)
        for name, W in weights(tmp_path / pattern).items():
            if "_proj" in name:
                assert (W == 0).sum() == W.size / 2
                if pattern == "per-output":
                    assert ((W == 0).sum(axis=1) == W.shape[1] / 2).all()
                elif pattern == "2:4":
                    assert ((W.reshape(-1, 4) == 0).sum(axis=1) == 2).all()


def test_a_cut_run_resumes_to_the_same_bytes(calibrated, run, tmp_path):
    _, records = calibrated(stats="all")
    words = ["score", records, "--target", "weights", "--sparsity", ".5", *BY_LOSS]
    stream = run(*words).stdout
    made = {path: path.read_bytes() for path in (tmp_path / "dense.work").glob("score*-*/layer-*")}
    assert len(made) == 6
    for path in made:
        if "00001" in path.name or "scores" in path.parent.name:
            path.unlink()
    assert run(*words).stdout == stream
    assert {path: path.read_bytes() for path in made} == made
    first = run("compensate", stdin=stream).stdout
    assert run("compensate", stdin=stream).stdout == first


def test_what_is_missing_is_one_line_before_the_first_layer(calibrated, run, tmp_path):
    _, records = calibrated()
    words = ["score", "--target", "weights", "--sparsity", ".5"]
    kept_no = "calibrate kept no sums of the inputs of q_proj, k_proj, v_proj, gate_proj, up_proj"
    for more, why in ((BY_LOSS, "--allocation loss"), (UNIFORM, "--method fisher"),
                      (("--method", "magnitude", *BY_LOSS[:2]), "--allocation loss")):  # fmt: skip
        assert error_of(run(*words, *more, records, ok=False)) == (
            f"Error: {why}: {kept_no}; run calibrate with --stats all"
        )
    model = tmp_path / "plain.jsonl"
    run("calibrate", tmp_path / "dense", "--text", tmp_path / "text.txt", "--samples", 8,
        "--sequence-length", 32, "--stats", "all", "--gradients", 0,
        "--work", tmp_path / "plain.work", "-o", model)  # fmt: skip
    for more, why in ((BY_LOSS, "--allocation loss"), (UNIFORM, "--method fisher")):
        assert error_of(run(*words, *more, model, ok=False)) == (
            f"Error: {why}: needs gradients, and calibrate kept none; run calibrate with "
            f"--gradients 32{', or give --allocation uniform' * (more == BY_LOSS)}"
        )
    _, records = calibrated("all", stats="all")
    done = run("score", records, "--target", "weights", "--sparsity", ".85", *BY_LOSS, ok=False)
    assert error_of(done) == (
        "Error: --allocation loss: removes at most 80% of the weights of any matrix; lower "
        "--sparsity, or give --allocation uniform"
    )
    assert not list(tmp_path.glob("*.work/score*-*/layer-*"))
