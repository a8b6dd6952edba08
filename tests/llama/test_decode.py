"""Decoding with a cache is the forward; tokens are drawn from their distribution."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LlamaForCausalLM

from prunetool.llama import decode, forward
from prunetool.model import open_model
from prunetool.steps.evaluate import Ends
from prunetool.steps.selftext import Sampler
from tests.conftest import tiny_config, write_checkpoint
from tests.llama.test_forward import ROPES, SHAPES, hidden_after, logits
from tests.test_families import FAMILIES

UNEQUAL = {
    "model_type": "pruned_llama",
    "architectures": ["PrunedLlamaForCausalLM"],
    "per_layer_config": {
        "1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40},
        "2": {"intermediate_size": 24},
    },
}
MODELS = {
    **SHAPES,
    **ROPES,
    **{
        name: {"attention_bias": "absent", "mlp_bias": "absent", **changes}
        for name, changes in FAMILIES.items()
    },
}
LENGTH = 40


def decoded(model, tokens, dtype="float32"):
    """Scores of the token after each, (samples, N, V), one position at a time."""
    decoder = Sampler(model, tokens.shape[1], None, dtype).decoder()
    scores = [np.asarray(decoder(column, n)) for n, column in enumerate(tokens.T)]
    return np.stack(scores).transpose(2, 0, 1)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_decoding_is_the_forward_of_whole_sequences(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(decode, "ROOM", 16)  # it grows twice
    config = tiny_config(**changes)
    model = open_model(str(write_checkpoint(tmp_path / "dense", config)))
    tokens = np.random.default_rng(0).integers(0, 260, (3, LENGTH)).astype(np.int32)
    error = np.abs(decoded(model, tokens) - logits(model, tokens))
    assert error.max() < 2e-5, (
        f"worst {error.max():.1e} at {np.unravel_index(error.argmax(), error.shape)}"
    )


def test_layers_that_differ_in_size_are_decoded(checkpoint):
    model = open_model(str(checkpoint(**UNEQUAL)))
    assert len(set(model.config.layer_shapes)) == 3
    tokens = np.random.default_rng(0).integers(0, 260, (2, LENGTH)).astype(np.int32)
    np.testing.assert_allclose(decoded(model, tokens), logits(model, tokens), atol=2e-5)


def test_bfloat16_is_about_as_far_off_as_the_forward(checkpoint):
    model = open_model(str(checkpoint(dtype="bfloat16")))
    tokens = np.random.default_rng(0).integers(0, 260, (4, 64)).astype(np.int32)
    exact = logits(model, tokens)
    ends = Ends.of(model, "bfloat16")
    h = jnp.asarray(hidden_after(model, tokens, "bfloat16").reshape(1, -1, 64)).transpose(2, 0, 1)
    whole = np.asarray(forward.logits(h, *ends[:2], eps=ends.eps)).T.reshape(exact.shape)
    ours, theirs = (np.linalg.norm(x - exact) for x in (decoded(model, tokens, "bfloat16"), whole))
    assert 0.9 * theirs < ours < 1.1 * theirs, f"{ours:.3e}, of the forward {theirs:.3e}"


def test_the_likeliest_tokens_are_those_of_transformers(checkpoint):
    directory = checkpoint()
    judge = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    first = np.array([3, 141, 59], np.int32)
    expected = judge.generate(
        torch.tensor(first[:, None], dtype=torch.int64), max_new_tokens=LENGTH - 1,
        min_new_tokens=LENGTH - 1, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    decoder = Sampler(open_model(str(directory)), LENGTH, None, "float32").decoder()
    ids = [first]
    for n in range(LENGTH - 1):
        ids.append(np.asarray(jnp.argmax(decoder(ids[-1], n), axis=0), np.int32))
    assert np.array_equal(np.stack(ids, 1), expected.numpy())


class TestDraw:
    def test_tokens_are_drawn_as_often_as_their_probabilities_say(self):
        random = np.random.default_rng(0)
        scores = random.standard_normal(11)
        p = np.exp(scores) / np.exp(scores).sum()
        draws = 20000
        u = jnp.asarray(random.random(draws))
        tokens = decode.draw(jnp.asarray(np.tile(scores[:, None], draws), jnp.float32), u)
        counts = np.bincount(np.asarray(tokens), minlength=11)
        assert stats.chisquare(counts, p * draws).pvalue > 0.01
        other = np.exp(scores / 1.1) / np.exp(scores / 1.1).sum()  # as if at temperature 1.1
        assert stats.chisquare(counts, other * draws).pvalue < 1e-6

    @pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 1000])
    def test_it_inverts_the_distribution_function(self, size):
        random = np.random.default_rng(size)
        scores = random.standard_normal((size, 500)).astype(np.float32) * 3
        u = random.random(500)
        p = np.exp(scores.astype(np.float64) - scores.max(0))
        expected = (np.cumsum(p, 0) <= u * p.sum(0)).sum(0)
        got = np.asarray(decode.draw(jnp.asarray(scores), jnp.asarray(u)))
        assert got.dtype == np.int32
        assert np.array_equal(got, expected)

    @pytest.mark.parametrize("only", [0, 255, 256, 299])
    def test_what_has_no_probability_is_never_drawn(self, only):
        scores = np.full((300, 3), -1e9, np.float32)
        scores[only] = 0
        u = jnp.asarray([0, 0.5, np.nextafter(1, 0)])
        assert np.array_equal(decode.draw(jnp.asarray(scores), u), [only] * 3)


def test_room_grows_by_steps_up_to_the_length():
    rooms = [decode.room_for(n, 5000) for n in range(5000)]
    assert all(room > n for n, room in enumerate(rooms))
    assert sorted(set(rooms)) == [
        256, 512, 768, 1024, 1280, 1600, 2000, 2500, 3125, 3906, 4882, 5000,
    ]  # fmt: skip
    assert decode.room_for(0, 40) == 40
