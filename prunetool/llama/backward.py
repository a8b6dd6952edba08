"""The gradient of a loss, from the residual stream after a layer to the one before it.

The loss is a sum over tokens at the top; g is its gradient with respect to the residual stream,
(D, B, N), float32. A layer is computed again from its input (`forward.decoder_layer`), so nothing
of the forward is kept but the stream. Sums over the gradients at a matrix's output, and the
gradient of the matrix itself, Σ_t g_t x_tᵀ, follow from `LayerGradients` and the layer's inputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prunetool.llama import forward
from prunetool.llama.parts import MATRICES, PARTS
from prunetool.llama.weights import Layer

NORMS = tuple(part for part in PARTS if part.endswith("_norm"))


class LayerGradients(NamedTuple):
    """Gradients of a layer.

    Attributes:
      before: with respect to the residual stream before the layer, (D, B, N), float32.
      outputs: at the output of each of the seven matrices, (O, B, N), float32.
      norms: of the weights of its norms, summed over all tokens, float32.
    """

    before: jax.Array
    outputs: dict[str, jax.Array]
    norms: dict[str, jax.Array]


def layer_gradients(
    h: jax.Array,
    g: jax.Array,
    w: Layer,
    rope: forward.Rotation,
    *,
    head_dim: int,
    eps: float,
    window: int | None = None,
) -> tuple[LayerGradients, forward.Taps]:
    """Gradients of a layer, and the inputs of its matrices.

    Args:
      h: residual stream before the layer, (D, B, N), float32.
      g: gradient with respect to the stream after it, (D, B, N), float32.
      w, rope, head_dim, eps, window: as in `forward.decoder_layer`.
    """

    def of_each_token(part: str) -> jax.Array:
        """A matrix's bias, given to every token, whose gradient is that of the output."""
        bias = getattr(w, f"{part}_bias")
        rows = jnp.zeros(getattr(w, part).shape[0], jnp.float32) if bias is None else bias
        return jnp.broadcast_to(rows.astype(jnp.float32)[:, None, None], (len(rows), *h.shape[1:]))

    def layer(
        h: jax.Array, biases: dict[str, jax.Array], norms: dict[str, jax.Array]
    ) -> tuple[jax.Array, forward.Taps]:
        parts = {f"{part}_bias": bias for part, bias in biases.items()}
        return forward.decoder_layer(
            h, w._replace(**parts, **norms), rope, head_dim=head_dim, eps=eps, window=window
        )

    biases = {part: of_each_token(part) for part in MATRICES}
    weights = {part: getattr(w, part) for part in NORMS}
    norms = {part: x.astype(jnp.float32) for part, x in weights.items() if x is not None}
    _, back, inputs = jax.vjp(layer, h, biases, norms, has_aux=True)
    return LayerGradients(*back(g)), inputs


def top(
    loss: Callable[[jax.Array], jax.Array],
    h: jax.Array,
    norm: jax.Array,
    head: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A loss at the top, and its gradients.

    Args:
      loss: of the logits, (V, n).
      h: residual stream after the last layer, (D, 1, n), float32.
      norm, head, eps: as in `forward.logits`.

    Returns:
      The loss, (); its gradients with respect to h, (D, 1, n), and to the norm's weight, (D,).
    """

    def of(h: jax.Array, norm: jax.Array) -> jax.Array:
        return loss(forward.logits(h, norm, head, eps=eps))

    value, (to_h, to_norm) = jax.value_and_grad(of, (0, 1))(h, norm)
    return value, to_h, to_norm
