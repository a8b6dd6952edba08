"""Mistral, Qwen2 and Qwen3 from end to end, held to transformers' own classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prunetool import cli
from prunetool.llama import config, forward
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


@families
@tied
def test_logits_are_those_of_transformers(tmp_path, monkeypatch, family, tied):
    monkeypatch.setattr(forward, "QUERY_BLOCK", 10)
    model = build(tmp_path, family, tied)
    judge = load(model)
    name = family.partition(",")[0]
    assert type(judge).__name__ == f"{name.title()}ForCausalLM"
    assert worst(model, judge) < 2e-5


FORMS = {  # options of score, and what they leave
    "alike": ["--allocation", "uniform", "--target", "heads"],
    "unequal": ["--method", "random", "--multiple-of", 8, "--min-channels", 8],
}


@families
@tied
def test_what_is_pruned_loads_in_transformers_and_means_the_same(
    tmp_path, call, text, family, tied
):
    dense = open_model(str(build(tmp_path, family, tied))).config
    words = ["--samples", 6, "--sequence-length", 32, "--held-out", 2, "--work", "w"]
    call("calibrate", "dense", "--text", text, *words, "-o", "stats.jsonl")
    name = family.partition(",")[0]
    classes = {
        "alike": "Llama" if family == "mistral" else name.title(),  # which it is, with no window
        "unequal": "PrunedLlama",
    }
    for form, score in FORMS.items():
        call("score", "stats.jsonl", "--sparsity", ".2", *score, "-o", "kept.jsonl")
        call("compensate", "kept.jsonl", "-o", "refitted.jsonl")
        call("export", form, "refitted.jsonl")
        judge = load(tmp_path / form)
        assert type(judge).__name__ == f"{classes[form]}ForCausalLM"
        assert worst(tmp_path / form, judge) < 2e-5
        pruned = open_model(str(tmp_path / form)).config
        assert pruned.layer_shapes != dense.layer_shapes
        assert (pruned.window, pruned.qk_norm, pruned.qkv_bias, pruned.attention_bias) == (
            dense.window,
            dense.qk_norm,
            dense.qkv_bias,
            dense.attention_bias,
        )
        assert json.loads(call("inspect", form))["model_type"] == pruned.raw["model_type"]


@pytest.mark.parametrize("family", ["mistral, window", "qwen2", "qwen3, window, biases"])
def test_single_weights_are_masked_by_attention_and_by_gram_matrices(tmp_path, call, text, family):
    model = build(tmp_path, family)
    words = ["--text", text, "--sequence-length", 40, "--samples"]
    call(
        "calibrate", "dense", *words, 6, "--held-out", 2, "--stats", "all",
        "--attention-samples", 2, "--work", "w", "-o", "stats.jsonl",
    )  # fmt: skip
    learn = ["--method", "attention-gd", "--iterations", 20, "--refine", 20]
    call("score", "--target", "qk", "--sparsity", ".5", *learn, "stats.jsonl", "-o", "qk.jsonl")
    others = ["--target", "v,o,gate,up,down", "--method", "sparsegpt", "--sparsity", ".5"]
    call("score", *others, "qk.jsonl", "-o", "masked.jsonl")
    call("compensate", "masked.jsonl", "-o", "refitted.jsonl")
    call("export", "out", "refitted.jsonl")
    assert open_model(str(tmp_path / "out")).config.layer_shapes == (
        open_model(str(model)).config.layer_shapes
    )
    assert worst(tmp_path / "out") < 2e-5

    call("export", "learned", "qk.jsonl")
    compared = json.loads(
        call("evaluate", "--allow-calibrated", "learned", "--against", "dense", *words, 2)
    )["against"]
    lines = (tmp_path / "qk.jsonl").read_text().splitlines()
    layers = [json.loads(line) for line in lines if '"record": "layer"' in line]
    for layer, by_head in zip(
        layers, compared["attention_error"]["same_input"]["by_head"], strict=True
    ):
        said = layer["values"]["attention"]
        assert said["calibration"] == pytest.approx(np.mean(by_head), rel=1e-3)
        assert said["refine_steps"]


def test_help_and_readme_name_every_family():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for name in config.FAMILIES:
        assert name in cli.group.help.lower()
        assert name in readme.lower()
