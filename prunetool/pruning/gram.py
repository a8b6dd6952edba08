"""Sums over calibration tokens for scores and refits, accumulated in float64.

One batch's Gram matrix is a float32 product of the batch's (features, tokens) inputs; the batches
are added in float64. The token-weighted sums (weight 1/‖h_t‖², h_t the residual stream that the
matrix's output joins) count an error relative to what the next norm will divide by.

A Gram matrix is summed in tiles of its lower triangle: half the arithmetic and half the memory of
the whole. It is stored as that triangle by rows (`pack`).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PANEL = 512  # rows; at 11008 features 1.5 to 2.5 times as fast as no panels; 1024 was no faster
WIDTH = 2048  # columns per tile, a multiple of PANEL; 1.3 times as fast as none at 11008


class Sums(NamedTuple):
    """Sums over tokens t of an input x_t of one matrix; float64, None if not requested.

    A Gram matrix is a tuple of tiles (`_tiles`).
    """

    gram: Any  # Σ x xᵀ, (D, D)
    total: Any  # Σ x, (D,)
    token_diagonal: Any = None  # Σ x² / ‖h‖², (D,)
    token_blocks: Any = None  # Σ x_B x_Bᵀ / ‖h‖² of each block B, (blocks, D / blocks, D / blocks)
    token_gram: Any = None  # Σ x xᵀ / ‖h‖², (D, D)


def zeros(size: int, *, blocks: int = 0, diagonal: bool = False, full: bool = False) -> Sums:
    """Empty sums over inputs of ``size`` features.

    Args:
      size: D.
      blocks: number of diagonal blocks of the token-weighted Gram matrix to keep; 0 for none.
      diagonal, full: keep its diagonal, or all of it.
    """
    if not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise AssertionError("JAX has no float64: call devices.start first")

    def of(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.float64)

    block = size // blocks if blocks else 0
    return Sums(
        zero_tiles(size),
        of(size),
        of(size) if diagonal else None,
        of(blocks, block, block) if blocks else None,
        zero_tiles(size) if full else None,
    )


def zero_tiles(size: int) -> tuple[jax.Array, ...]:
    """Tiles of an empty Gram matrix of ``size`` features."""
    shapes = ((i.stop - i.start, j.stop - j.start) for i, j in _tiles(size))
    return tuple(jnp.zeros(shape, jnp.float64) for shape in shapes)


def add_to_tiles(tiles: tuple[jax.Array, ...], x: jax.Array) -> tuple[jax.Array, ...]:
    """Add X Xᵀ of a batch, (D, T), float32 or bfloat16."""
    return tuple(
        tile + _product(x[i], x[j]).astype(jnp.float64)
        for tile, (i, j) in zip(tiles, _tiles(len(x)), strict=True)
    )


def add(sums: Sums, x: jax.Array, h: jax.Array) -> Sums:
    """Add a batch.

    Args:
      sums: the sums so far.
      x: the matrix's inputs, (D, B, N), float32 or bfloat16.
      h: the residual stream its output joins, (·, B, N), float32.
    """
    # The barrier keeps XLA from recomputing x for each of its uses.
    x = x.reshape(x.shape[0], -1)  # (D, T)
    x = lax.optimization_barrier(x)  # type: ignore[no-untyped-call]
    energy = jnp.sum(jnp.square(h.reshape(h.shape[0], -1)), axis=0, keepdims=True)  # ‖h_t‖², (1, T)
    weight = jnp.where(energy > 0, 1 / energy, jnp.zeros_like(energy))
    weighted = x * jnp.sqrt(weight).astype(x.dtype)

    def sum_of(so_far: Any, batch: Callable[[], jax.Array]) -> Any:
        return None if so_far is None else so_far + batch().astype(jnp.float64)

    def blocks() -> jax.Array:
        B = weighted.reshape(sums.token_blocks.shape[0], -1, x.shape[1])
        return _product(B, B)

    return Sums(
        add_to_tiles(sums.gram, x),
        sum_of(sums.total, lambda: jnp.sum(x, axis=1, dtype=jnp.float32)),
        sum_of(
            sums.token_diagonal, lambda: jnp.sum(jnp.square(x.astype(jnp.float32)) * weight, axis=1)
        ),
        sum_of(sums.token_blocks, blocks),
        None if sums.token_gram is None else add_to_tiles(sums.token_gram, weighted),
    )


def _panels(size: int) -> list[tuple[int, int]]:
    """Start and stop row of each panel; its columns end at its stop row."""
    return [(start, min(start + PANEL, size)) for start in range(0, size, PANEL)]


def _tiles(size: int) -> list[tuple[slice, slice]]:
    """Rows and columns of each tile of the lower triangle, panel by panel."""
    return [
        (slice(start, stop), slice(left, min(left + WIDTH, stop)))
        for start, stop in _panels(size)
        for left in range(0, stop, WIDTH)
    ]


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """X Yᵀ over the last axis, (…, D, T) and (…, E, T) -> (…, D, E), float32."""
    batch = tuple(range(x.ndim - 2))
    return lax.dot_general(
        x,
        y,
        (((x.ndim - 1,), (x.ndim - 1,)), (batch, batch)),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def pack_tiles(tiles: tuple[Any, ...], size: int, dtype: Any) -> np.ndarray:
    """The lower triangle, by rows, of a sum's first ``size`` features, (D (D + 1) / 2,)."""
    out = np.empty(size * (size + 1) // 2, dtype)
    for (rows, columns), tile in zip(_tiles(size), tiles, strict=False):
        for i, row in enumerate(np.asarray(tile)[: rows.stop - rows.start], rows.start):
            count = max(min(columns.stop, i + 1) - columns.start, 0)
            out[_begin(i) + columns.start :][:count] = row[:count]
    return out


def pack(A: np.ndarray) -> np.ndarray:
    """The lower triangle of a symmetric matrix by rows, (D (D + 1) / 2,)."""
    return np.concatenate([row[: i + 1] for i, row in enumerate(A)])


def unpack_lower(packed: np.ndarray) -> np.ndarray:
    """The lower triangle of the matrix, (D, D), float64; zero above it."""
    size = _size(packed)
    A = np.zeros((size, size))
    for i in range(size):
        A[i, : i + 1] = packed[_begin(i) : _begin(i + 1)]
    return A


def unpack(packed: np.ndarray) -> np.ndarray:
    """The symmetric matrix, (D, D), float64."""
    return mirror(unpack_lower(packed))


def diagonal(packed: np.ndarray) -> np.ndarray:
    """The diagonal of a packed matrix, (D,)."""
    return np.asarray(packed[_begin(np.arange(_size(packed)) + 1) - 1])


class Partition(NamedTuple):
    """A Gram matrix partitioned into features that stay (k) and go (p), float64."""

    kk: np.ndarray  # (k, k)
    kp: np.ndarray  # (k, p)
    pp: np.ndarray  # (p, p)


def partition(packed: np.ndarray, kept: np.ndarray) -> Partition:
    """The blocks of a packed Gram matrix, without unpacking all of it.

    Args:
      packed: as from `pack`.
      kept: which features stay, (D,) bool.
    """
    kp = np.empty((int(kept.sum()), int((~kept).sum())))
    m = n = 0  # rows of k and of p so far
    for i, stays in enumerate(kept):
        row = packed[_begin(i) : _begin(i + 1)]
        if stays:
            kp[m, :n] = row[~kept[: i + 1]]
            m += 1
        else:
            kp[:m, n] = row[kept[: i + 1]]
            n += 1
    return Partition(block(packed, kept), kp, block(packed, ~kept))


def block(packed: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The block of a packed Gram matrix for some features, float64.

    Args:
      packed: as from `pack`.
      rows: which features, (D,) bool.
    """
    places = np.flatnonzero(rows)
    A = np.empty((len(places), len(places)))
    for m, i in enumerate(places):
        A[m, : m + 1] = packed[_begin(int(i)) :][places[: m + 1]]
    return mirror(A)


def reordered(packed: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The lower triangle of a packed Gram matrix with its features in another order, (D, D).

    Args:
      packed: as from `pack`.
      order: the features, (D,) int.

    Returns:
      float64; zero above the diagonal.
    """
    A = np.zeros((len(order), len(order)))
    for m, i in enumerate(order):
        before = order[: m + 1]
        A[m, : m + 1] = packed[_begin(np.maximum(i, before)) + np.minimum(i, before)]
    return A


def mirror(A: np.ndarray, *, upper: bool = False) -> np.ndarray:
    """Make A symmetric in place from its lower triangle, or its upper one; returns A."""
    source = A.T if upper else A
    for start, stop in _panels(len(A)):
        source[:start, start:stop] = source[start:stop, :start].T
        block = source[start:stop, start:stop]
        above = np.triu_indices(stop - start, 1)
        block[above] = block.T[above]
    return A


def blocks_of_rows(size: int) -> Iterator[slice]:
    """The rows of a matrix in panels, for in-place work."""
    return (slice(*panel) for panel in _panels(size))


def _begin(row: Any) -> Any:
    """Offset of a row, or of each of several, in the packed triangle."""
    return row * (row + 1) // 2


def _size(packed: np.ndarray) -> int:
    return int((np.sqrt(8 * packed.size + 1) - 1) / 2)
