import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from prunetool.llama import forward
from prunetool.llama.config import Rope, parse_config
from prunetool.llama.weights import Layer, map_layer
from prunetool.model import open_model
from prunetool.steps.evaluate import mean_loss
from tests import references
from tests.conftest import tiny_config

SHAPES = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "kv heads absent": {"num_key_value_heads": "absent"},
    "head_dim absent": {"head_dim": "absent"},
    "head_dim not hidden / heads": {"head_dim": 8},
    "tied": {"tie_word_embeddings": True},
    "attention biases": {"attention_bias": True},
    "mlp biases": {"mlp_bias": True},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROPES = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic, short": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "dynamic, long": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24,
    },
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama3 as rope_parameters": {
        "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "rope_theta": "absent",
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "yarn, attention_factor": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
            "attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2,
        },
    },
    "yarn, whose blend ends where it begins": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6,
        },
    },
    "yarn, not truncated": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
            "truncate": False,
        },
    },
    "yarn, mscale": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
            "mscale": 0.7, "mscale_all_dim": 0.4,
        },
    },
    "yarn, factor null": {
        "rope_scaling": {
            "rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32,
        },
    },
    "rope_scaling and rope_parameters": {
        "rope_scaling": {"type": "linear", "factor": 4},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
}  # fmt: skip


def hidden_after(model, tokens, dtype="float32"):
    """Our stream behind the last layer, (samples, N, D)."""
    config = model.config
    h = jnp.asarray(model.embedding()[tokens].astype(np.float32).transpose(2, 0, 1))
    rope = forward.rotation(
        config.rope, config.head_dim, tokens.shape[1], config.max_position_embeddings
    )
    for number in range(config.layers):
        w = map_layer(lambda part: jnp.asarray(part, jnp.dtype(dtype)), model.layer(number))
        h, _ = forward.decoder_layer(
            h, w, rope, head_dim=config.head_dim, eps=config.rms_norm_eps, window=config.window
        )
    return np.asarray(h).transpose(1, 2, 0)


def logits(model, tokens):
    h = hidden_after(model, tokens).astype(np.float64)
    normed = references.rms_norm(
        h, model.final_norm().astype(np.float64), model.config.rms_norm_eps
    )
    return normed @ model.head().astype(np.float64).T


@pytest.mark.parametrize("changes", [*SHAPES.values(), *ROPES.values()], ids=[*SHAPES, *ROPES])
def test_logits_are_those_of_transformers(checkpoint, changes):
    directory = checkpoint(shards=2, **changes)
    tokens = np.random.default_rng(0).integers(0, 260, (2, 40))
    judge = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = judge(torch.tensor(tokens)).logits.numpy()
    error = np.abs(logits(open_model(str(directory)), tokens) - expected)
    assert error.max() < 2e-5, (
        f"worst {error.max():.1e} at {np.unravel_index(error.argmax(), error.shape)}"
    )


def test_the_mean_loss_is_that_of_transformers(checkpoint):
    directory = checkpoint()
    tokens = np.random.default_rng(0).integers(0, 260, (3, 50)).astype(np.int32)
    judge = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor(tokens, dtype=torch.int64)
    with torch.no_grad():
        expected = judge(ids, labels=ids).loss.item()
    assert mean_loss(open_model(str(directory)), tokens, "float32") == pytest.approx(
        expected, abs=1e-5
    )


@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_is_the_numpy_layer(checkpoint, biased):
    model = open_model(str(checkpoint(attention_bias=biased, mlp_bias=biased)))
    config, shape = model.config, model.config.layer_shapes[0]
    h = np.random.default_rng(0).standard_normal((config.hidden_size, 2, 37))
    inverse = 1 / config.rope.theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    rope = forward.rotation(config.rope, config.head_dim, 37, 128)
    layer = model.layer(0)
    w = map_layer(lambda part: jnp.asarray(part, jnp.float32), layer)
    out, inputs = forward.decoder_layer(
        jnp.asarray(h, jnp.float32), w, rope, head_dim=config.head_dim, eps=config.rms_norm_eps
    )
    for sequence in range(2):
        expected = references.decoder_layer(
            h[:, sequence].T, layer._asdict(), shape.heads, shape.kv_heads, config.head_dim,
            inverse, config.rms_norm_eps,
        )  # fmt: skip
        got = (out, inputs.o, inputs.down, inputs.before_mlp)
        for ours, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(np.asarray(ours)[:, sequence].T, theirs, atol=2e-5)


def test_a_product_in_tiles_is_the_product(monkeypatch):
    random = np.random.default_rng(0)
    W, x = random.standard_normal((2100, 2050)), random.standard_normal((2050, 2, 2))
    monkeypatch.setattr(forward, "TILE", (1024, 1000))
    out = forward.product(jnp.asarray(W, jnp.float32), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(np.asarray(out), np.einsum("od,dbn->obn", W, x), atol=1e-3)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_attention_in_blocks_is_attention(length, window):
    random = np.random.default_rng(length)
    q = random.standard_normal((2, 3, 8, 2, length))
    k, v = random.standard_normal((2, 2, 8, 2, length))
    out = np.asarray(forward.attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), window))
    scores = np.einsum("kgdbi,kdbj->kgbij", q, k)
    back = np.arange(length)[:, None] - np.arange(length)
    scores[..., (back < 0) | (back >= (window or length))] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = np.einsum("kgbij,kdbj->kgdbi", p, v).reshape(48, 2, length)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_bfloat16_products_are_no_further_off_than_those_of_transformers(checkpoint):
    directory = checkpoint(dtype="bfloat16")
    model = open_model(str(directory))
    tokens = np.random.default_rng(0).integers(0, 260, (1, 64))
    exact = hidden_after(model, tokens, "float32")
    judge = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    judge.model.norm = torch.nn.Identity()  # the stream behind the last layer
    with torch.no_grad():
        theirs = judge.model(torch.tensor(tokens)).last_hidden_state.float().numpy()
    ours = hidden_after(model, tokens, "bfloat16")
    our_error, their_error = (np.linalg.norm(x - exact) for x in (ours, theirs))
    assert 0 < our_error <= their_error, f"{our_error:.2e}, transformers {their_error:.2e}"


def test_no_array_is_of_all_heads_and_all_pairs_of_tokens():
    N, config = 1024, parse_config(tiny_config(), "test")
    shapes = forward.Rotation(*[jnp.zeros((8, N), jnp.float32)] * 2)
    part = {"input_norm": 64, "post_norm": 64}
    w = Layer(**{name: jnp.zeros(size, jnp.float32) for name, size in part.items()},
              q=jnp.zeros((64, 64), jnp.float32), k=jnp.zeros((32, 64), jnp.float32),
              v=jnp.zeros((32, 64), jnp.float32), o=jnp.zeros((64, 64), jnp.float32),
              gate=jnp.zeros((96, 64), jnp.float32), up=jnp.zeros((96, 64), jnp.float32),
              down=jnp.zeros((64, 96), jnp.float32))  # fmt: skip
    import jax

    def layer(h):
        return forward.decoder_layer(
            h, w, shapes, head_dim=config.head_dim, eps=config.rms_norm_eps
        )[0]

    compiled = jax.jit(layer).lower(jnp.zeros((64, 1, N), jnp.float32)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * N * N * 4, f"{temporary:,} bytes; 4 heads of N x N are {4 * N * N * 4:,}"


def test_the_first_frequency_is_one_radian_a_token():
    default = forward.rotation(Rope(), 8, 5, 128)
    np.testing.assert_allclose(np.asarray(default.c[0]), np.cos(np.arange(5)), atol=1e-6)
    np.testing.assert_allclose(np.asarray(default.s[0]), np.sin(np.arange(5)), atol=1e-6)
