"""Masks of single weights as a user makes them, up to the checkpoint that transformers loads."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from prunetool import workdir
from prunetool.llama.weights import tensor_name
from prunetool.pruning import gram
from tests import references
from tests.commands.test_pipe import held_out, loss_in_transformers  # noqa: F401  a fixture
from tests.conftest import error_of

MLP = "gate,up,down"


def tensors(directory):
    found = {}
    for path in directory.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def matrix(found, layer, part):
    return found[tensor_name(layer, part)]


def masked(run, records, out, *steps, compensate=False):
    """Run score steps one after another, and export; gives the last records."""
    stream = records.read_text()
    for step in steps:
        stream = run("score", *step, stdin=stream).stdout
    if compensate:
        stream = run("compensate", stdin=stream).stdout
    run("export", out, stdin=stream)
    return [json.loads(line) for line in stream.splitlines()]


def compared(run, out, dense, tmp_path):
    return json.loads(evaluated(run, out, dense, tmp_path).stdout)


def evaluated(run, out, dense, tmp_path):
    return run("evaluate", out, "--against", dense, "--tokens", tmp_path / "ids.npy",
               "--sequence-length", 48, "--dtype", "float32")  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 1, "attention_bias": True}],
    ids=["grouped", "one KV head, biased"],
)
def test_the_papers_pipe_of_two_scores(calibrated, run, tmp_path, held_out, changes):  # noqa: F811
    dense, records = calibrated(stats="all", attention=3, **changes)
    out = tmp_path / "out"
    stream = masked(
        run,
        records,
        out,
        ["--target", "qk", "--method", "attention-gd", "--refine", 5, "--sparsity", ".5"],
        ["--target", MLP, "--method", "sparsegpt", "--sparsity", ".25"],
        compensate=True,
    )
    before, after = tensors(dense), tensors(out)
    for layer in range(3):
        for part, lost in {"q": 0.5, "k": 0.5, "gate": 0.25, "up": 0.25, "down": 0.25}.items():
            W = matrix(after, layer, part)
            assert (W == 0).sum() == lost * W.size
        # Refined and updated values differ from the dense ones; untouched matrices do not.
        values = stream[1 + layer]["values"]
        refined = values["attention"]["refine_steps"] > 0
        for part, moved in {"q": refined, "k": refined, "gate": True, "down": True}.items():
            kept = matrix(after, layer, part) != 0
            changed = (matrix(after, layer, part) != matrix(before, layer, part))[kept].mean()
            assert changed > 0.9 if moved else changed == 0
        for part in ("v", "o"):
            np.testing.assert_array_equal(matrix(after, layer, part), matrix(before, layer, part))
        assert values["masks"]["q"]["removed"] == 0.5
        assert values["masks"]["up"]["removed"] == 0.25
        assert 0 < values["attention"]["held_out"] < 1
    assert any(line["values"]["attention"]["refine_steps"] for line in stream[1:-1])
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    card = (out / "README.md").read_text()
    q = matrix(after, 0, "q")
    assert f"| 0 | {q.size // 2:,} / {q.size:,} (50.00%)" in card
    _, theirs = loss_in_transformers(out, held_out)
    result = compared(run, out, dense, tmp_path)
    assert result["loss"] == pytest.approx(theirs, abs=2e-5)


def test_against_is_what_transformers_attention_says(
    calibrated,
    run,
    tmp_path,
    held_out,  # noqa: F811
):
    dense, records = calibrated()
    out = tmp_path / "out"
    masked(run, records, out, ["--target", "q,k,v", "--method", "magnitude", "--sparsity", ".4"])
    result = compared(run, out, dense, tmp_path)
    ids = torch.tensor(held_out.astype(np.int64))
    attentions, logits = [], []
    for directory in (out, dense):
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            made = model(ids, output_attentions=True)
        attentions.append(torch.stack(made.attentions).numpy())  # (layers, B, H, N, N)
        logits.append(made.logits[:, :-1].log_softmax(-1))
    P_pruned, P = attentions
    own = np.sqrt(((P_pruned - P) ** 2).sum((1, 3, 4)) / (P**2).sum((1, 3, 4)))
    found = result["against"]["attention_error"]
    np.testing.assert_allclose(found["own"]["by_head"], own, rtol=2e-3)
    assert found["own"]["mean"] == pytest.approx(own.mean(), rel=1e-3)
    assert found["own"]["worst"] == pytest.approx(own.max(), rel=1e-3)
    worst = np.unravel_index(own.argmax(), own.shape)
    assert (found["own"]["worst_layer"], found["own"]["worst_head"]) == worst
    # Before the first layer both models are given the same.
    np.testing.assert_allclose(found["same_input"]["by_head"][0], own[0], rtol=2e-3)
    assert np.abs(np.array(found["same_input"]["by_head"][2]) / own[2] - 1).max() > 0.01
    kl = (logits[1].exp() * (logits[1] - logits[0])).sum(-1).mean().item()
    assert result["against"]["kl"] == pytest.approx(kl, rel=1e-3)


def test_a_model_against_itself_has_no_error(checkpoint, run, tmp_path, held_out):  # noqa: F811
    dense = checkpoint()
    done = evaluated(run, dense, dense, tmp_path)
    against = json.loads(done.stdout)["against"]
    assert against["kl"] == 0
    assert f"evaluate: {dense}, perplexity " in done.stderr
    assert "no attention error on own input, no attention error on dense input" in done.stderr
    assert against["attention_error"]["own"]["worst"] == 0
    other = checkpoint("other", vocab_size=300)
    done = run("evaluate", dense, "--against", other, "--tokens", tmp_path / "ids.npy",
               "--sequence-length", 48, ok=False)  # fmt: skip
    line = (
        "--against: its vocab_size is 300 but the model's is 260; name the checkpoint that was "
        "pruned"
    )
    assert line in error_of(done)


def test_against_a_model_whose_layers_differ_in_heads(
    calibrated,
    run,
    tmp_path,
    held_out,  # noqa: F811
):
    dense, records = calibrated()
    run("score", records, "--target", "heads", "--sparsity", ".1", "-o", "kept.jsonl")
    run("export", "out", "kept.jsonl")
    for model, other in (("out", "out"), (dense, "out")):
        against = json.loads(evaluated(run, model, other, tmp_path).stdout)["against"]
        by_head = np.array(against["attention_error"]["own"]["by_head"], float)
        there = ~np.isnan(by_head)
        heads = there.sum(axis=1)
        if model == other:
            assert sorted(heads) == [2, 4, 4], "a row per layer, as wide as the widest"
            assert not by_head[there].any()
        else:
            assert sorted(heads) == [0, 4, 4], "nothing to compare where heads differ"


def test_every_method_and_pattern_meets_its_ratio(calibrated, run, tmp_path):
    _, records = calibrated(stats="all", attention=3)
    for method, pattern in (
        ("wanda", None), ("wanda", "2:4"), ("sparsegpt", None), ("magnitude", "per-output"),
        ("random", None), ("attention-diag", None), ("attention-gd", "2:4"),
    ):  # fmt: skip
        out = tmp_path / f"{method}-{pattern}"
        words = ["--target", "qk", "--method", method, "--sparsity", ".5"]
        words += ["--iterations", 5] if method == "attention-gd" else []
        masked(run, records, out, [*words, *(["--pattern", pattern] if pattern else [])])
        after = tensors(out)
        for layer in range(3):
            for part in ("q", "k"):
                kept = matrix(after, layer, part) != 0
                assert kept.sum() == kept.size / 2
                if pattern == "2:4":
                    assert (kept.reshape(-1, 4).sum(axis=1) == 2).all()
                elif pattern == "per-output" or method == "wanda":
                    assert (kept.sum(axis=1) == kept.shape[1] / 2).all()


def test_sparsegpt_and_wanda_are_those_of_an_independent_implementation(calibrated, run, tmp_path):
    """On the statistics in the work directory, kept sets and weights, by plain NumPy."""
    dense, records = calibrated(stats="all")
    before = tensors(dense)
    for method in ("wanda", "sparsegpt"):
        out = tmp_path / method
        masked(
            run,
            records,
            out,
            ["--target", "weights", "--method", method, "--sparsity", ".5"],
            compensate=method == "sparsegpt",
        )
        after = tensors(out)
        for layer in range(3):
            directory = tmp_path / "dense.work" / "stats"
            stats = [
                load_file(directory / f"layer-{layer:05d}.{kind}.safetensors")
                for kind in ("stats", "held_out")
            ]
            for part, given in {"q": "attention", "k": "attention", "v": "attention", "o": "o",
                                "gate": "mlp", "up": "mlp", "down": "down"}.items():  # fmt: skip
                A = gram.unpack(sum(s[f"{given}.gram"] for s in stats))
                W = matrix(before, layer, part).astype(np.float64)
                if method == "wanda":
                    score = np.abs(W) * np.sqrt(np.diagonal(A))
                    order = np.argsort(score, axis=1)
                    kept = np.ones(W.shape, bool)
                    np.put_along_axis(kept, order[:, : W.shape[1] // 2], False, axis=1)
                    values = W * kept
                else:
                    kept, values = references.sparsegpt(W, A, 0.01, 0.5, "unstructured", 128)
                found = matrix(after, layer, part)
                np.testing.assert_array_equal(found != 0, kept)
                np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)


def test_masks_go_with_structural_pruning_either_way_round(
    calibrated,
    run,
    tmp_path,
    held_out,  # noqa: F811
):
    dense, records = calibrated(stats="all", attention=3)
    heads = ["--target", "heads,channels", "--sparsity", ".3", "--multiple-of", 8]
    weights = ["--target", "weights", "--method", "sparsegpt", "--sparsity", ".5"]
    attention = ["--target", "qk", "--method", "attention-gd", "--iterations", 5,
                 "--refine", 5, "--sparsity", ".5"]  # fmt: skip
    for name, steps in {"after": [heads, weights, attention], "before": [weights, heads]}.items():
        out = tmp_path / name
        stream = masked(run, records, out, *steps, compensate=True)
        _, theirs = loss_in_transformers(out, held_out)
        assert compared(run, out, dense, tmp_path)["loss"] == pytest.approx(theirs, abs=2e-5)
        after = tensors(out)
        for layer in range(3):
            kept = stream[1 + layer]["values"]["kept"]
            if name == "after":  # the ratio is met in what the first step left
                sizes = {
                    **dict.fromkeys(("gate", "up", "down"), kept["channels"]),
                    **dict.fromkeys(("q", "o"), kept["heads"] * 16),
                    **dict.fromkeys(("k", "v"), kept["kv_heads"] * 16),
                }
                for part, size in sizes.items():
                    filled = (matrix(after, layer, part) != 0).sum()
                    assert filled == 64 * size - round(64 * size / 2)
            else:
                W = matrix(after, layer, "down")
                assert 0.3 < (W != 0).mean() < 0.7


def test_a_ratio_of_nothing_keeps_everything(calibrated, run, tmp_path):
    dense, records = calibrated(attention=3)
    words = ["--target", "qk", "--method", "attention-gd", "--refine", 5, "--sparsity", "0"]
    masked(run, records, tmp_path / "out", words)
    before, after = tensors(dense), tensors(tmp_path / "out")
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_a_score_that_was_cut_makes_only_what_is_missing_and_the_same(calibrated, run, tmp_path):
    _, records = calibrated(attention=3)
    words = ["score", records, "--target", "qk", "--method", "attention-gd", "--iterations", 5,
             "--refine", 5, "--sparsity", ".5"]  # fmt: skip
    stream = run(*words).stdout
    made = sorted((tmp_path / "dense.work").glob("score-*/layer-*"))
    assert len(made) == 3
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in made]
    made[1].unlink()
    assert run(*words).stdout == stream
    after = [(path.read_bytes(), path.stat().st_mtime_ns) for path in made]
    assert [data for data, _ in after] == [data for data, _ in before]
    assert [old == new for (_, old), (_, new) in zip(before, after, strict=True)] == [1, 0, 1]
    refitted = run("compensate", stdin=stream).stdout
    assert run("compensate", stdin=stream).stdout == refitted


def test_the_published_numbers_are_used_and_said(calibrated, run):
    _, records = calibrated(attention=3)
    words = ["score", records, "--target", "qk", "--method", "attention-gd", "--sparsity", ".5"]
    for extra, expected in (
        (["--published"], {"lambda": 0.05, "learning_rate": 0.005}),
        (["--lambda", ".01", "--learning-rate", ".3"], {"lambda": 0.01, "learning_rate": 0.3}),
    ):
        lines = run(*words, *extra).stdout.splitlines()
        for line in lines[1:-1]:
            said = json.loads(line)["values"]["attention"]
            assert {key: said[key] for key in expected} == expected
            assert 0 < said["iterations"] <= 100


def test_calibrate_keeps_what_transformers_gives_the_matrices(calibrated, text, tmp_path):
    """Of several sequences a batch, split into those fitted on and those held out."""
    dense, _ = calibrated(attention=3)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    layer, given = model.model.layers[1], {}
    for name, module in {
        "attention": layer.self_attn.q_proj,
        "o": layer.self_attn.o_proj,
        "down": layer.mlp.down_proj,
    }.items():
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: given.update({name: inputs[0].double().numpy()})
        )
    tokenizer = Tokenizer.from_file(str(dense / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text.read_text()).ids[: 8 * 32]).reshape(8, 32)
    with torch.no_grad():
        model(torch.tensor(ids))
    path = tmp_path / "dense.work" / "stats"
    kept = load_file(path / "layer-00001.attention.safetensors")
    x = given["attention"].transpose(2, 0, 1)  # (D, B, N)
    np.testing.assert_allclose(kept["fit"], x[:, :3], atol=2e-5)
    np.testing.assert_allclose(kept["held_out"], x[:, 5:], atol=2e-5)
    for kind, sequences in {"stats": slice(0, 6), "held_out": slice(6, 8)}.items():
        sums = load_file(path / f"layer-00001.{kind}.safetensors")
        for name in ("o", "down"):
            rows = given[name][sequences].reshape(-1, given[name].shape[2])
            scale = np.abs(rows.T @ rows).max()
            np.testing.assert_allclose(
                gram.unpack(sums[f"{name}.gram"]), rows.T @ rows, atol=1e-5 * scale
            )


def test_what_cannot_be_learned_is_one_line(calibrated, run, tmp_path):
    _, plain = calibrated("plain")
    words = ["--target", "qk", "--sparsity", ".5"]
    done = run("score", plain, *words, "--method", "attention-gd", ok=False)
    assert error_of(done) == (
        "Error: --method attention-gd: calibrate kept no attention inputs; run calibrate with "
        "--attention-samples 8, or more"
    )
    done = run("score", plain, *words, "--method", "wanda", ok=False)
    assert error_of(done) == (
        "Error: --method wanda: calibrate kept no sums of the inputs of q_proj, k_proj; run "
        "calibrate with --stats all"
    )
    _, records = calibrated("kept", attention=3, hidden_size=62, head_dim=16)
    done = run(
        "score", records, *words, "--method", "attention-gd", "--learning-rate", "1e9", ok=False
    )
    assert "layer 0: attention: the loss went from" in error_of(done)
    assert error_of(done).endswith("lower --learning-rate")
    done = run("score", records, *words, "--method", "magnitude", "--pattern", "2:4", ok=False)
    assert error_of(done) == (
        "Error: layer 0: q_proj: 62 inputs: are not a multiple of 4; choose another --pattern"
    )
    name = "stats/layer-00001.attention.safetensors"
    samples = workdir.load(tmp_path / "kept.work", name)
    samples["fit"][0, 0, 0] = np.nan
    workdir.write(tmp_path / "kept.work", name, samples)
    done = run("score", records, *words, "--method", "attention-gd", ok=False)
    assert "layer 1: attention: the largest curvature of its loss is nan; check the model" in (
        error_of(done)
    )
    done = run("score", records, *words, "--method", "attention-diag", ok=False)
    assert "layer 1: q_proj: the score: contains NaN" in error_of(done)
    done = run("score", records, *words, "--method", "magnitude", "--refine", 5, ok=False)
    assert error_of(done) == (
        "Error: layer 1: attention: the loss is not finite while refining; leave out --refine"
    )
