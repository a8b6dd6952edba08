"""Mistral, Qwen2 and Qwen3 from end to end, held to transformers' own classes."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prunetool.llama import forward
from prunetool.model import open_model
from tests.conftest import tiny_config, write_checkpoint
from tests.llama.test_forward import logits

FAMILIES = {
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, window": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, window": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
        "max_window_layers": 0,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3, window, biases": {
        "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 16,
        "max_window_layers": 0, "attention_bias": True,
    },
}  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)
tied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 48))


def build(tmp_path, family, tied=False):
    changes = {"attention_bias": "absent", "mlp_bias": "absent", **FAMILIES[family]}
    return write_checkpoint(tmp_path / "dense", tiny_config(tie_word_embeddings=tied, **changes))


def load(directory):
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=True, attn_implementation="eager"
    )


def worst(directory, judge=None):
    """The largest difference of a logit from transformers'."""
    with torch.no_grad():
        theirs = (judge or load(directory))(torch.tensor(TOKENS)).logits.numpy()
    return np.abs(logits(open_model(str(directory)), TOKENS) - theirs).max()


@pytest.fixture
def pruned(call, text, tmp_path):
    """Prune ``dense``: ``pruned("--sparsity", ".3")``; gives the directory."""

    def make(*score):
        words = ["--samples", 6, "--sequence-length", 32, "--held-out", 2]
        call("calibrate", "dense", "--text", text, *words, "--work", "w", "-o", "stats.jsonl")
        call(
            "score", "stats.jsonl", "--multiple-of", 8, "--min-channels", 8, *score,
            "-o", "kept.jsonl",
        )  # fmt: skip
        call("compensate", "kept.jsonl", "-o", "refitted.jsonl")
        call("export", "out", "refitted.jsonl")
        return tmp_path / "out"

    return make


@families
@tied
def test_logits_are_those_of_transformers(tmp_path, monkeypatch, family, tied):
    monkeypatch.setattr(forward, "QUERY_BLOCK", 10)
    model = build(tmp_path, family, tied)
    judge = load(model)
    name = family.partition(",")[0]
    assert type(judge).__name__ == f"{name.title()}ForCausalLM"
    assert worst(model, judge) < 2e-5


@families
@tied
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "unequal"])
def test_what_is_pruned_loads_in_transformers_and_means_the_same(
    tmp_path, pruned, call, text, family, tied, alike
):
    model = build(tmp_path, family, tied)
    words = ["--allocation", "uniform", "--target", "heads"] if alike else ["--method", "random"]
    out = pruned("--sparsity", ".2", *words)
    judge = load(out)
    said = json.loads((out / "config.json").read_text())
    name = family.partition(",")[0]
    if alike:  # without a window, a Mistral is a Llama
        name = "llama" if family == "mistral" else name
        assert type(judge).__name__ == f"{name.title()}ForCausalLM"
    else:
        assert type(judge).__name__ == "PrunedLlamaForCausalLM"
    assert said.get("sliding_window") == open_model(str(model)).config.window
    assert worst(out, judge) < 2e-5
    config = open_model(str(out)).config
    assert config.layer_shapes != open_model(str(model)).config.layer_shapes
    assert json.loads(call("inspect", "out"))["model_type"] == said["model_type"]
    compared = json.loads(
        call(
            "evaluate", "out", "--against", "dense", "--text", text, "--samples", 2,
            "--sequence-length", 48,
        )
    )  # fmt: skip
    assert 0 < compared["against"]["kl"] < 5


@pytest.mark.parametrize("family", ["mistral, window", "qwen2", "qwen3, window, biases"])
def test_single_weights_are_masked_by_attention_and_by_gram_matrices(tmp_path, call, text, family):
    model = build(tmp_path, family)
    call(
        "calibrate", "dense", "--text", text, "--samples", 6, "--sequence-length", 40,
        "--held-out", 2, "--stats", "all", "--attention-samples", 2, "--work", "w",
        "-o", "stats.jsonl",
    )  # fmt: skip
    learn = ["--method", "attention-gd", "--iterations", 20, "--refine", 20]
    call("score", "--target", "qk", "--sparsity", ".5", *learn, "stats.jsonl", "-o", "qk.jsonl")
    others = ["--target", "v,o,gate,up,down", "--method", "sparsegpt", "--sparsity", ".5"]
    call("score", *others, "qk.jsonl", "-o", "masked.jsonl")
    call("compensate", "masked.jsonl", "-o", "refitted.jsonl")
    call("export", "out", "refitted.jsonl")
    layers = [json.loads(line) for line in (tmp_path / "qk.jsonl").read_text().splitlines()]
    learned = [layer["values"]["attention"] for layer in layers if layer["record"] == "layer"]
    assert all(0 < of["held_out"] < 1 and of["refine_steps"] for of in learned)
    plain = open_model(str(model)).config
    assert open_model(str(tmp_path / "out")).config.layer_shapes == plain.layer_shapes
    assert worst(tmp_path / "out") < 2e-5
