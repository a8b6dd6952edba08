"""The mean loss of a checkpoint on sequences, layer by layer."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from prunetool import console, streaming
from prunetool.checkpoint.writer import need_room
from prunetool.llama import forward
from prunetool.llama.weights import Layer
from prunetool.model import Model

LOGIT_TOKENS = 256  # tokens whose logits, (V, 256) float32, exist at a time


def mean_loss(model: Model, tokens: np.ndarray, dtype: str) -> float:
    """Mean of -log p over every predicted token, in nats.

    Args:
      model: the checkpoint.
      tokens: (samples, N), int32.
      dtype: of the products.
    """
    samples, length = tokens.shape
    need = 2 * tokens.size * model.config.hidden_size * 4
    with tempfile.TemporaryDirectory(prefix="prunetool-") as directory:
        need_room(Path(directory), need)
        stream = streaming.HiddenStates(
            Path(directory) / "hidden", model.config.hidden_size, samples, length
        )
        streaming.embed(model, tokens, stream)
        step, rope = _layer_step(model), streaming.rotation(model, length)
        layers = console.progress(model.padded_layers(), "evaluate", model.layers)
        for number, layer in layers:
            weights = streaming.to_device(layer, dtype)
            # Read before it is replaced: the new file takes the name when it is whole.
            with stream.writing() as write:
                for batch in streaming.batches(0, samples, length):
                    h = np.asarray(step(jnp.asarray(stream.read(batch)), weights, rope))
                    streaming.check_finite(h, number)
                    write(batch, h)
        return _mean_loss(model, stream, tokens, dtype)


def _layer_step(model: Model) -> Callable[[jax.Array, Layer, forward.Rotation], jax.Array]:
    """The compiled layer without its inputs, for an evaluation."""
    config = model.config

    @jax.jit
    def step(h: jax.Array, w: Layer, rope: forward.Rotation) -> jax.Array:
        return forward.decoder_layer(h, w, rope, head_dim=config.head_dim, eps=config.rms_norm_eps)[
            0
        ]

    return step


def _mean_loss(
    model: Model, stream: streaming.HiddenStates, tokens: np.ndarray, dtype: str
) -> float:
    """Mean -log p(next token) of the stream behind the last layer, in nats.

    Args:
      model: for its final norm and head.
      stream: the residual stream behind the last layer.
      tokens: the sequences, (samples, N), int32.
      dtype: of the product with the head.
    """
    norm = jnp.asarray(model.final_norm(), jnp.float32)
    head = jnp.asarray(model.head(), jnp.dtype(dtype))
    eps = model.config.rms_norm_eps

    @jax.jit
    def losses(h: jax.Array, norm: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
        return forward.token_losses(forward.logits(h, norm, head, eps=eps), targets)

    total = 0.0
    for batch in streaming.batches(0, stream.samples, stream.length):
        for sample, h in zip(batch, stream.read(batch).swapaxes(0, 1), strict=True):
            for start in range(0, stream.length - 1, LOGIT_TOKENS):
                stop = min(start + LOGIT_TOKENS, stream.length - 1)
                targets = jnp.asarray(tokens[sample, start + 1 : stop + 1])
                part = jnp.asarray(h[:, None, start:stop])
                found = losses(part, norm, head, targets)
                total += float(jnp.sum(found, dtype=jnp.float64))
    return total / (stream.samples * (stream.length - 1))
