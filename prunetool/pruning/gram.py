"""Sums over calibration tokens that scores and refits need, accumulated in float64.

One batch's Gram matrix is a float32 product of the batch's (features, tokens) inputs; the batches
are added in float64. The token-weighted sums (weight 1/‖h_t‖², h_t the residual stream that the
matrix's output joins) count an error relative to what the next norm will divide by.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Sums(NamedTuple):
    """Sums over tokens t of an input x_t of one matrix; float64, None where not wanted."""

    gram: Any  # Σ x xᵀ, (D, D)
    total: Any  # Σ x, (D,)
    token_diagonal: Any = None  # Σ x² / ‖h‖², (D,)
    token_blocks: Any = None  # Σ x_B x_Bᵀ / ‖h‖² of each block B, (blocks, D / blocks, D / blocks)
    token_gram: Any = None  # Σ x xᵀ / ‖h‖², (D, D)


def zeros(size: int, *, blocks: int = 0, diagonal: bool = False, full: bool = False) -> Sums:
    """Sums of nothing, over inputs of ``size`` features.

    Args:
      size: D.
      blocks: how many diagonal blocks of the token-weighted Gram matrix to keep; 0 for none.
      diagonal, full: keep its diagonal, all of it.
    """

    def of(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.float64)

    block = size // blocks if blocks else 0
    return Sums(
        of(size, size),
        of(size),
        of(size) if diagonal else None,
        of(blocks, block, block) if blocks else None,
        of(size, size) if full else None,
    )


def add(sums: Sums, x: jax.Array, h: jax.Array) -> Sums:
    """Add a batch.

    Args:
      sums: so far.
      x: the matrix's inputs, (D, B, N), float32 or bfloat16.
      h: the residual stream its output joins, (·, B, N), float32.
    """
    # The barrier keeps XLA from computing x once for each of its uses.
    x = x.reshape(x.shape[0], -1)  # (D, T)
    x = lax.optimization_barrier(x)  # type: ignore[no-untyped-call]
    energy = jnp.sum(jnp.square(h.reshape(h.shape[0], -1)), axis=0, keepdims=True)  # ‖h_t‖², (1, T)
    weight = jnp.where(energy > 0, 1 / energy, jnp.zeros_like(energy))
    weighted = x * jnp.sqrt(weight).astype(x.dtype)

    def sum_of(so_far: Any, batch: Callable[[], jax.Array]) -> Any:
        return None if so_far is None else so_far + batch().astype(jnp.float64)

    def blocks() -> jax.Array:
        count = sums.token_blocks.shape[0]
        return _gram(weighted.reshape(count, -1, x.shape[1]))

    return Sums(
        sum_of(sums.gram, lambda: _gram(x)),
        sum_of(sums.total, lambda: jnp.sum(x, axis=1, dtype=jnp.float32)),
        sum_of(
            sums.token_diagonal,
            lambda: jnp.sum(jnp.square(x.astype(jnp.float32)) * weight, axis=1),
        ),
        sum_of(sums.token_blocks, blocks),
        sum_of(sums.token_gram, lambda: _gram(weighted)),
    )


def _gram(x: jax.Array) -> jax.Array:
    """X Xᵀ over the last axis, (…, D, T) -> (…, D, D), float32."""
    batch = tuple(range(x.ndim - 2))
    return lax.dot_general(
        x,
        x,
        (((x.ndim - 1,), (x.ndim - 1,)), (batch, batch)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def pack(A: np.ndarray) -> np.ndarray:
    """The upper triangle of a symmetric matrix by rows, (D (D + 1) / 2,), float32."""
    return np.concatenate([row[i:] for i, row in enumerate(A)], dtype=np.float32)


def unpack(packed: np.ndarray) -> np.ndarray:
    """The symmetric matrix, (D, D), float64, of its packed upper triangle."""
    size = int((np.sqrt(8 * packed.size + 1) - 1) / 2)
    A = np.empty((size, size))
    start = 0
    for i in range(size):
        stop = start + size - i
        A[i, i:] = A[i:, i] = packed[start:stop]
        start = stop
    return A
