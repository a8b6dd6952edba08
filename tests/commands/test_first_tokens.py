"""``calibrate --first-tokens``: tokens of the samples as texts of one token each."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from prunetool import plan
from prunetool.commands.calibrate import FIRST_TOKENS
from prunetool.llama.weights import tensor_name
from prunetool.model import open_model
from prunetool.pruning import compensation, gram
from prunetool.steps import compensate
from prunetool.steps.calibrate import FIRST_SHARE, draw_first_tokens
from prunetool.workdir import load
from tests import references


def calibrated_with(call, model, text, *more):
    words = ["--samples", 8, "--sequence-length", 32, "--held-out", 2, "--stats", "token"]
    call("calibrate", model, "--text", text, *words, "--work", "w", "-o", "stats.jsonl", *more)


def options(path):
    header = json.loads(path.read_text().splitlines()[0])
    return header["history"][0]["options"]


@torch.no_grad()
def seen_alone(model, ids):
    """By layer and site: the inputs of o and down, and the streams behind their outputs."""
    judge = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    found = {}

    def keep(*where):
        def hook(module, given, made=None):
            h = given[0] if made is None else made
            found[where] = h.reshape(len(ids), -1).numpy()

        return hook

    for i, layer in enumerate(judge.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(keep(i, "o", "x"))
        layer.mlp.down_proj.register_forward_pre_hook(keep(i, "down", "x"))
        layer.post_attention_layernorm.register_forward_pre_hook(keep(i, "o", "h"))
        layer.register_forward_hook(keep(i, "down", "h"))
    judge(torch.tensor(ids)[:, None])
    return found


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1, "attention_bias": True}])
def test_each_counts_at_the_scale_of_other_tokens(checkpoint, text, call, tmp_path, changes):
    model = checkpoint(**changes)
    calibrated_with(call, model, text, "--first-tokens", 50)
    tokens = load(tmp_path / "w", "tokens.safetensors")["tokens"]
    ids = draw_first_tokens(tokens, 50).ravel()
    assert len(ids) == 64 == options(tmp_path / "stats.jsonl")["first_tokens"]
    assert len(tokens) == 8
    files = (tmp_path / "w/stats").iterdir()
    used = sum(path.stat().st_size for path in files if "gradients" not in path.name)
    planned = plan.stats_bytes(open_model(str(model)), "token", (0, 0), "float32", first=True)
    assert used <= planned <= 1.5 * used
    seen = seen_alone(model, ids)
    due = np.rint(FIRST_SHARE * 6 * 32)
    for layer in range(3):
        fit, first = (
            load_file(tmp_path / f"w/stats/layer-{layer:05d}.{kind}.safetensors")
            for kind in ("stats", "first")
        )
        assert first.keys() == {"tokens", "o.gram", "o.total", "down.gram", "down.total"}
        assert not first["tokens"].any()
        for site in ("o", "down"):
            x, h = seen[layer, site, "x"], seen[layer, site, "h"]
            squares = np.median(
                np.diagonal(gram.unpack(fit[f"{site}.gram"]))
                / np.diagonal(gram.unpack(fit[f"{site}.token_gram"]))
            )
            u = x / np.linalg.norm(h, axis=1, keepdims=True) * np.sqrt(due / len(ids))
            A = gram.unpack(first[f"{site}.gram"])
            np.testing.assert_allclose(A, squares * u.T @ u, atol=1e-5 * A.max())
            assert not first[f"{site}.total"].any()


@pytest.mark.parametrize("bias", [[], ["--bias", "refit"]])
def test_the_refit_counts_them_and_the_score_does_not(checkpoint, text, call, tmp_path, bias):
    model = checkpoint()
    words = ["--sparsity", ".4", "--multiple-of", 1, "--min-channels", 1, "-o", "kept.jsonl"]
    for count in (0, 64):
        work = tmp_path / str(count)
        work.mkdir()
        calibrated_with(call, model, text, "--first-tokens", count, "--work", work)
        call("score", "stats.jsonl", *words)
        call("compensate", "kept.jsonl", "-o", "made.jsonl", *bias)
        layers = list(map(json.loads, (tmp_path / "made.jsonl").read_text().splitlines()[1:-1]))
        assert all(("first" in layer["files"]) == (count > 0) for layer in layers)
        check_refits(model, work, layers, biased=bool(bias))
        kept = [load_file(path) for path in sorted(work.glob("score-*/layer-*"))]
        if not count:
            without = kept
    assert len(kept) == 3
    for one, other in zip(without, kept, strict=True):
        np.testing.assert_equal(one, other)


def any_inputs(A):
    """Inputs of this Gram matrix."""
    squared, axes = np.linalg.eigh(A)
    return np.sqrt(squared.clip(0))[:, None] * axes.T


def check_refits(model, work, layers, *, biased):
    """Compare with explicit refits, to the variation around the others' mean if ``biased``."""
    dense = load_file(model / "model.safetensors")
    for layer, record in enumerate(layers):
        files = record["files"]
        kept = load_file(work / files["kept.channels"])["channels"].astype(bool)
        assert 0 < kept.sum() < kept.size
        made = load_file(work / files["refit"])["down_proj.weight"].T
        W = dense[tensor_name(layer, "down")].T.astype(np.float64)
        kinds = [kind for kind in ("stats", "held_out", "first") if kind in files]
        sums = {kind: load_file(work / files[kind]) for kind in kinds}
        A = {kind: gram.unpack(sums[kind]["down.gram"]) for kind in kinds}
        fit, every = A["stats"] + A.get("first", 0), sum(A.values())
        energy = np.einsum("io,ij,jo->", W, every, W)
        if biased:
            total, count = (
                sum(sums[kind][name] for kind in ("stats", "held_out"))
                for name in ("down.total", "tokens")
            )
            every = every - np.outer(total, total) / count
        report = record["values"]["refit"]["down_proj"]
        X = any_inputs(every)
        V = references.refit(X, W, kept, report["damping"])
        np.testing.assert_allclose(made, V, rtol=1e-4, atol=1e-5)
        error = np.linalg.norm(X[:, kept] @ V - X @ W) ** 2
        assert report["refitted"] == pytest.approx(error / energy, rel=1e-5)
        if not biased:  # the damping is chosen on the others
            held = any_inputs(A["held_out"])
            V = references.refit(any_inputs(fit), W, kept, report["damping"])
            error = np.linalg.norm(held[:, kept] @ V - held @ W) ** 2
            energy = np.linalg.norm(held @ W) ** 2
            assert report["held_out_refitted"] == pytest.approx(error / energy, rel=1e-5)


def test_the_energy_of_many_outputs_is_that_of_a_sample():
    X, w = np.random.default_rng(0).standard_normal((2, 9, 9))
    W = np.repeat(w[:, :1], 3 * compensation.CHOICE_OUTPUTS, axis=1)
    energy = np.linalg.norm(X @ W) ** 2
    assert compensate._sampled_energy(X.T @ X, W) == pytest.approx(energy)


def test_where_every_text_begins_alike_none_are_needed(checkpoint, text, call, tmp_path):
    model = checkpoint()
    long = ("--samples", FIRST_TOKENS // 64 + 2, "--sequence-length", 64, "--gradients", 0)
    for name, more, count in (
        ("any", long, FIRST_TOKENS),
        ("bos", (*long, "--bos", "always"), 0),
        ("asked", (*long, "--bos", "always", "--first-tokens", 64), 64),
        ("none", (*long, "--first-tokens", 0), 0),
        ("few", ("--samples", 8, "--sequence-length", 64), 0),
    ):
        call("calibrate", model, "--text", text, *more, "--work", name, "-o", f"{name}.jsonl")
        assert options(tmp_path / f"{name}.jsonl")["first_tokens"] == count, name
        assert (tmp_path / f"{name}/stats/layer-00000.first.safetensors").exists() == (count > 0)


def test_the_stream_after_the_last_layer_leaves_them_out(checkpoint, text, call, tmp_path):
    model = checkpoint()
    for count in (0, 64):
        words = ["--samples", 4, "--sequence-length", 32, "--first-tokens", count]
        words += ["--stats", "residual", "--work", str(count), "-o", "a.jsonl"]
        call("calibrate", model, "--text", text, *words)
    without, with_them = (load(tmp_path / w, "stream.safetensors") for w in ("0", "64"))
    np.testing.assert_array_equal(without["gram"], with_them["gram"])
