"""The backward pass: its gradients are those of torch's autograd, for every kind of layer."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from prunetool import streaming
from prunetool.llama import backward, forward
from prunetool.llama.parts import MATRICES
from prunetool.model import open_model
from tests.conftest import tiny_config, write_checkpoint
from tests.test_families import FAMILIES, load

KINDS = {
    **{
        name: {"attention_bias": "absent", "mlp_bias": "absent", **family}
        for name, family in FAMILIES.items()
    },
    "llama": {},
    "MHA": {"num_key_value_heads": 4},
    "MQA, biases, tied": {
        "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "rope of llama 3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 250, (2, 48))
LABELS = np.random.default_rng(1).integers(0, 250, TOKENS.shape)


def ours(model, tokens, labels):
    """By layer: gradients before it, at its outputs, of its norms and matrices; and of the last."""
    config = model.config
    rope = streaming.rotation(model, tokens.shape[1])
    how = {"head_dim": config.head_dim, "eps": config.rms_norm_eps, "window": config.window}
    layers = [streaming.to_device(model.layer(n), "float32") for n in range(model.layers)]
    streams = [jnp.asarray(model.embedding()[tokens].transpose(2, 0, 1), jnp.float32)]
    for w in layers:
        streams.append(forward.decoder_layer(streams[-1], w, rope, **how)[0])
    norm, head = (jnp.asarray(array, jnp.float32) for array in (model.final_norm(), model.head()))
    g, of_norm = [], 0
    for i, row in enumerate(labels):

        def loss(scores, row=row):
            return jnp.sum(forward.token_losses(scores, jnp.asarray(row, jnp.int32)))

        h = streams[-1][:, i : i + 1]
        _, to_h, to_norm = backward.top(loss, h, norm, head, eps=config.rms_norm_eps)
        g.append(to_h)
        of_norm += to_norm
    g, found = jnp.concatenate(g, axis=1), []
    for w, h in zip(layers[::-1], streams[-2::-1], strict=True):
        gradients, inputs = backward.layer_gradients(h, g, w, rope, **how)
        given = {
            **dict.fromkeys("qkv", inputs.attention), "o": inputs.o, "down": inputs.down,
            "gate": inputs.mlp, "up": inputs.mlp,
        }  # fmt: skip
        matrices = {
            part: np.tensordot(gradients.outputs[part], given[part], [[1, 2], [1, 2]])
            for part in MATRICES
        }
        found.insert(0, (gradients, matrices))
        g = gradients.before
    return found, of_norm


def theirs(judge, tokens, labels):
    """By layer: gradients at the outputs of its matrices; the parameters have theirs in .grad."""
    outputs = [{} for _ in judge.model.layers]
    streams = []

    def keep(place, name):
        def hook(module, given, out):
            out.register_hook(lambda g: place.__setitem__(name, g.numpy().transpose(2, 0, 1)))

        return hook

    for layer, place in zip(judge.model.layers, outputs, strict=True):
        for part in MATRICES:
            block = layer.self_attn if part in "qkvo" else layer.mlp
            getattr(block, f"{part}_proj").register_forward_hook(keep(place, part))
        layer.register_forward_pre_hook(
            lambda module, given: streams.append(given[0]) or given[0].retain_grad()
        )
    logits = judge(torch.tensor(tokens)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(labels).flatten(), reduction="sum"
    )
    loss.backward()
    return outputs, [h.grad.numpy().transpose(2, 0, 1) for h in streams]


def compare(model, judge, tokens, labels, within):
    def assert_same(found, expected):
        assert found.shape == expected.shape
        assert np.linalg.norm(found - expected) < within * np.linalg.norm(expected)

    found, of_norm = ours(model, tokens, labels)
    outputs, streams = theirs(judge, tokens, labels)
    assert_same(of_norm, judge.model.norm.weight.grad.numpy())
    named = dict(judge.model.named_parameters())
    for n, ((gradients, matrices), at, before) in enumerate(
        zip(found, outputs, streams, strict=True)
    ):
        assert_same(gradients.before, before)
        for part in MATRICES:
            assert_same(gradients.outputs[part], at[part])
            block = "self_attn" if part in "qkvo" else "mlp"
            assert_same(
                matrices[part], named[f"layers.{n}.{block}.{part}_proj.weight"].grad.numpy()
            )
        names = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
        names |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
        for part, value in gradients.norms.items():
            assert_same(value, named[f"layers.{n}.{names[part]}.weight"].grad.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(forward, "QUERY_BLOCK", 10)
    path = write_checkpoint(tmp_path / "dense", tiny_config(**KINDS[kind]))
    judge = load(path).requires_grad_()
    compare(open_model(str(path)), judge, TOKENS, LABELS, within=3e-5)


def test_gradients_of_a_real_model_are_those_of_autograd(smollm2, wikitext):
    from tests.test_real import ids_of

    ids = ids_of(wikitext / "wiki.test.raw", smollm2)[: 2 * 513].reshape(2, 513)
    compare(
        open_model(str(smollm2)),
        load(smollm2),
        ids[:, :-1],
        ids[:, 1:].astype(np.int64),
        within=3e-3,
    )
