"""``calibrate --labels text`` and ``score --method taylor``: LLM-Pruner's importance."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from prunetool import methods, stats
from prunetool.llama.parts import MATRICES, PARTS
from prunetool.pruning import units
from tests.test_families import load as judge_of

EXACT = ["--stats-dtype", "float64", "--dtype", "float32", "--stream-dtype", "float32"]
HEADS, GROUPS, D = 4, 2, 16


@pytest.fixture
def ids(tmp_path):
    found = np.random.default_rng(2).integers(0, 250, (5, 24), np.int32)
    np.save(tmp_path / "ids.npy", found)
    return found


def words(model, *more, work="w"):
    return ["calibrate", model, "--tokens", "ids.npy", "--samples", 5, "--held-out", 1,
            "--sequence-length", 24, "--batch-size", 2, "--labels", "text",
            "--work", work, "-o", f"{work}.jsonl", *EXACT, *more]  # fmt: skip


def slopes(path, ids):
    """By layer, w, g and F of each matrix from autograd, float64."""
    judge = judge_of(path).requires_grad_()
    weights = dict(judge.named_parameters())
    each = []
    for row in ids:
        judge.zero_grad()
        logits = judge(torch.tensor(row[None].astype(np.int64))).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:].astype(np.int64))).backward()
        each.append({name: w.grad.numpy().astype(np.float64) for name, w in weights.items()})
    found = []
    for layer in range(judge.config.num_hidden_layers):
        names = {part: f"model.layers.{layer}.{PARTS[part].name}" for part in MATRICES}
        found.append(
            {
                part: (
                    weights[name].detach().numpy().astype(np.float64),
                    np.mean([g[name] for g in each], axis=0),
                    np.mean([g[name] ** 2 for g in each], axis=0),
                )
                for part, name in names.items()
            }
        )
    return found


def importance(layer, taylor):
    """Of each matrix by index, in loops."""
    found = {}
    for part, (w, g, F) in layer.items():
        if part in ("o", "down"):
            w, g, F = w.T, g.T, F.T
        out = []
        for row in range(len(w)):
            total, sizes, squares, mixed = 0.0, 0.0, 0.0, 0.0
            for x, slope, square in zip(w[row], g[row], F[row], strict=True):
                total += x * slope
                sizes += abs(x * slope)
                squares += x * x * square
                mixed += abs(x * slope - x * x * square / 2)
            out.append(
                {"vector": abs(total), "first": sizes, "second": squares, "mix": mixed}[taylor]
            )
        found[part] = np.array(out)
    return found


def merged(values, reduce):
    return {
        "sum": sum(values), "mean": sum(values) / len(values), "max": max(values),
        "prod": np.prod(values), "first": values[0],
    }[reduce]  # fmt: skip


def scores_of_groups(of, reduce, heads, groups):
    """Of each KV group, in loops: query heads of a group are neighbours."""
    found = []
    for j in range(groups):
        total = 0.0
        for i in range(D):
            mine = range(j * heads // groups, (j + 1) * heads // groups)
            q, o = (sum(of[part][head * D + i] for head in mine) for part in "qo")
            k, v = (of[part][j * D + i] for part in "kv")
            total += merged([q, k, v, o], reduce)
        found.append(total)
    return np.array(found)


def test_the_names_of_the_options_are_those_of_the_tables():
    assert set(methods.TAYLOR) == set(stats.WEIGHT_SUMS)
    assert set(methods.REDUCE) == set(units.MERGED)


@pytest.mark.parametrize(
    ("kind", "within"),
    [({}, 2e-5), ({"num_key_value_heads": 4, "tie_word_embeddings": True}, 2e-5)],
    ids=["GQA", "MHA, tied"],
)
def test_sums_are_those_of_autograd(checkpoint, call, ids, tmp_path, kind, within):
    path = checkpoint(**kind)
    call(*words(path))
    call(*words(path, "--batch-size", 1, work="single"))
    for number, layer in enumerate(slopes(path, ids[:4])):
        found, single = (
            load_file(tmp_path / work / f"stats/layer-{number:05d}.gradients.safetensors")
            for work in ("w", "single")
        )
        assert found.pop("tokens") == [4 * 23]
        assert len(found) == 4 * len(MATRICES)
        for taylor in methods.TAYLOR:
            for part, due in importance(layer, taylor).items():
                for sums in (found, single):
                    assert np.linalg.norm(sums[f"{part}.{taylor}"] - due) < within * np.linalg.norm(
                        due
                    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_variant_is_that_of_loops(checkpoint, call, ids, tmp_path, kv_heads):
    path = checkpoint(num_key_value_heads=kv_heads)
    call(*words(path))
    layers = slopes(path, ids[:4])
    for taylor, reduce in product(methods.TAYLOR, methods.REDUCE):
        stream = call(
            "score", "w.jsonl", "--method", "taylor", "--taylor", taylor, "--reduce", reduce,
            "--sparsity", ".25", "--multiple-of", 1,
        )  # fmt: skip
        for line, layer in zip(stream.splitlines()[1:-1], layers, strict=True):
            record = json.loads(line)
            scores = load_file(tmp_path / "w" / score_file(tmp_path / "w", record["index"]))
            of = importance(layer, taylor)
            due = {
                "heads": scores_of_groups(of, reduce, HEADS, kv_heads),
                "channels": np.array(
                    [
                        merged(list(each), reduce)
                        for each in zip(of["gate"], of["up"], of["down"], strict=True)
                    ]
                ),
            }
            for target, right in due.items():
                # vector cancels: what is left has a larger error.
                np.testing.assert_allclose(
                    scores[f"{target}.order"], right, rtol=1e-2 if taylor == "vector" else 1e-4
                )
                kept = load_file(tmp_path / "w" / record["files"][f"kept.{target}"])[target]
                gone = int((kept == 0).sum())
                assert set(np.flatnonzero(kept == 0)) == set(np.argsort(right)[:gone])


CASES = json.loads(Path(__file__).with_name("llm_pruner.json").read_text())


@pytest.mark.parametrize("variant", CASES)
def test_units_that_go_are_those_of_llm_pruner(checkpoint, call, tmp_path, variant):
    """The head and the channels of each layer that its own code (128a07d) removed at 25%, run once
    with a block-wise MetaPruner on transformers' LlamaForCausalLM of this checkpoint."""
    taylor, reduce = variant.split()
    np.save(tmp_path / "ids.npy", np.random.default_rng(5).integers(0, 250, (4, 24), np.int64))
    path = checkpoint(num_key_value_heads=4, seed=11)
    call(*words(path, "--samples", 4, "--held-out", 0))
    stream = call(
        "score", "w.jsonl", "--method", "taylor", "--taylor", taylor, "--reduce", reduce,
        "--allocation", "share", "--sparsity", ".25", "--multiple-of", 1,
    )  # fmt: skip
    for line, (head, channels) in zip(stream.splitlines()[1:-1], CASES[variant], strict=True):
        files = json.loads(line)["files"]
        gone = {
            target: np.flatnonzero(load_file(tmp_path / "w" / files[f"kept.{target}"])[target] == 0)
            for target in ("heads", "channels")
        }
        assert list(gone["heads"]) == [head]
        assert list(gone["channels"]) == channels


def score_file(work, layer):
    """The file of scores that was written last."""
    found = work.glob(f"scores-*/layer-{layer:05d}.safetensors")
    return max(found, key=lambda path: path.stat().st_mtime_ns).relative_to(work)


def test_a_unit_without_slope_goes_first(checkpoint, call, ids, tmp_path):
    path = checkpoint()
    tensors = load_file(path / "model.safetensors")
    for name, array in tensors.items():
        if "mlp." in name:
            (array.T if "down_proj" in name else array)[7] = 0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    call(*words(path))
    for taylor in methods.TAYLOR:
        stream = call(
            "score", "w.jsonl", "--method", "taylor", "--taylor", taylor, "--sparsity", ".01",
            "--multiple-of", 1,
        )  # fmt: skip
        for line in stream.splitlines()[1:-1]:
            file = json.loads(line)["files"]["kept.channels"]
            assert load_file(tmp_path / "w" / file)["channels"][7] == 0


def kept(stream):
    return [json.loads(line)["values"]["kept"] for line in stream.splitlines()[1:-1]]


def test_as_published_the_ends_stay_whole_and_all_others_lose_the_same(checkpoint, call, run, ids):
    path = checkpoint(num_hidden_layers=9, num_key_value_heads=4)
    call(*words(path))
    done = run("score", "w.jsonl", "--method", "taylor", "--published", "--sparsity", ".1")
    stream = done.stdout
    assert "prunes 3 of 9 layers, 27.76% of them" in " ".join(done.stderr.split())
    counts = [(each["kv_heads"], each["channels"]) for each in kept(stream)]
    assert counts[:4] + counts[-2:] == [(4, 96)] * 6
    # A tenth of nine layers is 30% of three: one head of four, and 28.8 channels, so 29.
    assert counts[4:-2] == [(3, 96 - 29)] * 3


SLICES = {"1:": [1, 2, 3], ":-3": [0], "-3:-1": [1, 2]}


@pytest.mark.parametrize("allocation", ["global", "uniform", "share", "loss"])
def test_layers_outside_the_slice_stay_whole(calibrated, call, allocation):
    _, records = calibrated(num_hidden_layers=4, num_key_value_heads=4)
    total = 4 * (4 * 64 * 64 + 3 * 64 * 96)
    for layers, chosen in SLICES.items():
        stream = call(
            "score", records, "--method", "obs", "--sparsity", ".08", "--allocation", allocation,
            "--layers", layers, "--multiple-of", 1,
        )  # fmt: skip
        lost = [(4 - each["kv_heads"], 96 - each["channels"]) for each in kept(stream)]
        assert all(gone == (0, 0) for n, gone in enumerate(lost) if n not in chosen)
        assert any(lost[n] != (0, 0) for n in chosen)
        if allocation != "share":  # a channel of each layer at most
            removed = sum(groups * 4 * 64 * 16 + channels * 3 * 64 for groups, channels in lost)
            assert removed == pytest.approx(0.08 * total, abs=len(chosen) * 3 * 64)


@pytest.mark.parametrize(
    "more", [["wanda"], ["sparsegpt"], ["fisher"], ["wanda", "--pattern", "2:4"]], ids=" ".join
)
def test_masks_outside_the_slice_keep_all(calibrated, call, more):
    _, records = calibrated(stats="all")
    stream = call(
        "score",
        records,
        "--target",
        "up,o",
        "--sparsity",
        ".5",
        "--layers",
        "1:2",
        "--method",
        *more,
    )
    masks = [json.loads(line)["values"]["masks"] for line in stream.splitlines()[1:-1]]
    removed = [sum(mask["removed"] for mask in each.values()) / 2 for each in masks]
    assert removed[::2] == [0, 0]
    assert removed[1] == pytest.approx(0.5, abs=0.15 if more == ["fisher"] else 1e-3)


def test_a_second_slice_leaves_what_the_first_kept(calibrated, call, tmp_path):
    _, records = calibrated(stats="all", gradients=4)
    (tmp_path / "a").write_text(call("score", records, "--layers", ":1", "--sparsity", ".1"))
    first, both = (
        kept((tmp_path / "a").read_text()),
        call("score", "a", "--layers", "1:", "--sparsity", ".2"),
    )
    assert kept(both)[0] == first[0] != {"heads": 4, "kv_heads": 2, "channels": 96}
    assert kept(both)[1:] != first[1:]
    values = [json.loads(line)["values"] for line in both.splitlines()[1:-1]]
    assert all(sum(each["nats"].values()) > 0 for each in values[:2])
    mask = ("--target", "up", "--method", "wanda", "--sparsity")
    (tmp_path / "b").write_text(call("score", records, *mask, ".5", "--layers", ":1"))
    again = call("score", "b", *mask, ".25", "--layers", "1:")
    masks = [json.loads(line)["values"]["masks"]["up"] for line in again.splitlines()[1:-1]]
    assert [each["removed"] for each in masks] == [0.5, 0.25, 0.25]
    (tmp_path / "c").write_text(again)
    call("export", "out", "c", "--format", "dense")
    tensors = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    zeros = [np.mean(tensors[f"model.layers.{n}.mlp.up_proj.weight"] == 0) for n in range(3)]
    assert zeros == [0.5, 0.25, 0.25]


def test_bad_input_has_one_clear_line(checkpoint, call, run, ids, calibrated):
    call(*words(checkpoint()))
    _, without = calibrated(gradients=0)
    taylor = ["--method", "taylor", "--sparsity", ".2"]
    for arguments, said in {
        ("w.jsonl", "--sparsity", ".2"): (
            "--allocation loss: needs gradients of --labels model, and calibrate took --labels "
            "text; run calibrate with --labels model into another --work, or give --allocation "
            "uniform"
        ),
        ("w.jsonl", *taylor, "--layers", "7:"): (
            "--layers '7:': leaves none of 3 layers to prune; give other --layers"
        ),
        ("w.jsonl", *taylor, "--published"): "--published: leaves none of 3 layers to prune",
        ("w.jsonl", *taylor, "--allocation", "loss"): (
            "--allocation loss needs calibrate --labels model, but --method taylor needs --labels "
            "text; give share, uniform or global"
        ),
        ("w.jsonl", *taylor, "--layers", "2"): "'2' is not a slice, as 4:-2 is",
        ("w.jsonl", "--method", "obs", "--sparsity", ".2", "--reduce", "max"): (
            "--reduce goes with --method taylor"
        ),
        ("w.jsonl", *taylor[:2], "--sparsity", ".28", "--min-channels", 80, "--multiple-of", 1): (
            "--allocation share: asks for 28% of the KV groups and of the channels of each layer"
        ),
        (without, *taylor): (
            "--method taylor: needs gradients, and calibrate kept none; run calibrate with "
            "--gradients 32 --labels text"
        ),
    }.items():
        assert said in " ".join(run("score", *arguments, ok=False).stderr.split())
