"""``recover``: its steps are those of torch's Adam on transformers' model, and it resumes."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from prunetool import workdir
from prunetool.steps import recover as step
from tests.test_families import FAMILIES, load

SHARD = "model-00001-of-00001.safetensors"
WORDS = ["--samples", 5, "--sequence-length", 32, "--held-out", 1, "--gradients", 0]
KINDS = {
    "llama, tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    **{name: {"attention_bias": "absent", "mlp_bias": "absent", **FAMILIES[name]}
       for name in ("mistral", "qwen3")},
}  # fmt: skip


@pytest.fixture
def kept(checkpoint, tmp_path, call):
    """A pruned tiny model, alike in all layers, not refitted: a stock architecture.

    All its sequences are equal but for one token, so that what helps one helps the others.
    """

    def make(*score, **changes):
        checkpoint(**changes)
        ids = np.tile(np.random.default_rng(2).integers(0, 250, 32), (5, 1))
        ids[:, 9] = range(5)
        np.save(tmp_path / "ids.npy", ids.ravel())
        call(
            "calibrate", "dense", "--tokens", "ids.npy", *WORDS, "--work", "w", "-o", "stats.jsonl"
        )
        words = score or ["--target", "channels", "--allocation", "uniform", "--sparsity", ".3"]
        call("score", "stats.jsonl", *words, "--multiple-of", 8, "-o", "kept.jsonl")

    return make


def descend(judge, dense, tokens, order, peak, trained):
    """The same training by torch, in float32."""
    names = dict(judge.model.named_parameters())
    chosen = [value for name, value in names.items() if trained(name)]
    for value in chosen:
        value.requires_grad_()
    adam = torch.optim.Adam(chosen, lr=peak, betas=(0.9, 0.95))
    for n, sequence in enumerate(order):
        row = torch.tensor(tokens[[sequence]].astype(np.int64))
        with torch.no_grad():
            target = dense(row).logits.log_softmax(-1)
        found = judge(row).logits.log_softmax(-1)
        loss = (target.exp() * (target - found)).sum(-1).mean()
        for group in adam.param_groups:
            group["lr"] = step.learning_rate(n, len(order), peak)
        adam.zero_grad()
        loss.backward()
        adam.step()


@pytest.mark.parametrize("what", ["all", "norms"])
@pytest.mark.parametrize("kind", KINDS)
def test_its_steps_are_those_of_adam_on_transformers_model(tmp_path, call, kept, kind, what):
    kept(**KINDS[kind])
    call("export", "before", "kept.jsonl")
    peak = "3e-4"
    words = ["--what", what, "--learning-rate", peak, "--seed", 3, "-o", "recovered.jsonl"]
    call("recover", "kept.jsonl", *words)
    made = [json.loads(line) for line in (tmp_path / "recovered.jsonl").read_text().splitlines()]
    said = made[1]["values"]["recover"]
    assert said["steps"] == 4
    assert said["kl_after"] < said["kl_before"]
    call("export", "after", "recovered.jsonl")
    tokens = workdir.TensorFile(tmp_path / "w", workdir.TOKENS_NAME)["tokens"]
    judge = load(tmp_path / "before").requires_grad_(False)
    order = np.random.default_rng(3).permutation(4)

    def trained(name):
        return "embed" not in name and (what == "all" or "norm" in name)

    descend(judge, load(tmp_path / "dense"), tokens, order, float(peak), trained)
    expected = {f"model.{name}": value for name, value in judge.model.named_parameters()}
    before = load_file(tmp_path / "before" / SHARD)
    for name, array in load_file(tmp_path / "after" / SHARD).items():
        if name == "lm_head.weight":
            continue
        moved = np.abs(array - before[name]).max()
        assert (moved > 1e-5) == trained(name)
        # Adam's first steps are signs: where a gradient is near 0, rounding decides.
        far = np.abs(array - expected[name].detach().numpy()) > 1e-5
        assert far.mean() < 0.01, name
