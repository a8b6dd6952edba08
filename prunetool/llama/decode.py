"""Decoding: the forward of a whole model, one token of B sequences at a time, with a cache.

The equations are those of `forward`; only attention reads its keys and values from the cache. The
layers lie side by side in memory, and one compiled function serves all of the same shape.

| symbol | is | shape |
|---|---|---|
| h | residual stream of the current tokens, float32 | (D, B, 1) |
| L | positions that the blocks of the cache have room for | |
| u | uniform random numbers in [0, 1), float64 | (B,) |
"""

from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prunetool.llama import forward
from prunetool.llama.forward import MASKED, Rotation
from prunetool.llama.weights import Layer

# The cache begins with a block for this many positions, and grows by further ones, of a quarter of
# it or of this size: each number of blocks is compiled once, and attention reads little that is
# empty.
ROOM = 256
BLOCK = 256  # tokens of the vocabulary whose probabilities are summed first


class Cache(NamedTuple):
    """A layer's keys, rotated, and values of a block of positions, as rounded by the forward.

    In float32: on a CPU, bfloat16 took up to 1.4 times as long in products of so few rows.
    """

    k: jax.Array  # (n_kv, B, d, its part of L)
    v: jax.Array  # (n_kv, B, its part of L, d)

    @property
    def room(self) -> int:
        """Positions that it has room for."""
        return self.v.shape[2]


def room_for(position: int, length: int) -> int:
    """Positions that the cache has room for once ``position`` is in it, at most ``length``."""
    room = ROOM
    while room <= position:
        room += max(ROOM, room // 4)
    return min(room, length)


def attention(
    q: jax.Array, blocks: Sequence[Cache], position: jax.Array, window: int | None
) -> jax.Array:
    """softmax(qᵀk) v of the current queries over the cache.

    Args:
      q: queries, already scaled by 1/√d, (n_kv, g, d, B, 1).
      blocks: the cache, this position included.
      position: of the queries, () int32; what lies behind it is not seen.
      window: how many keys a query sees, up to its own; None for all.

    Returns:
      The heads' outputs, (n_kv · g · d, B, 1), in the dtype of ``q``.
    """
    ends = list(accumulate(block.room for block in blocks))
    back = position - jnp.arange(ends[-1], dtype=jnp.int32)  # (L,)
    seen = (back >= 0) & (back < (ends[-1] if window is None else window))
    rows = q[..., 0].transpose(0, 3, 1, 2).astype(jnp.float32)  # (n_kv, B, g, d)
    S = jnp.concatenate([_matmul(rows, block.k) for block in blocks], axis=3)  # (n_kv, B, g, L)
    S = jnp.where(seen[None, None, None], S, jnp.float32(MASKED))
    P = jnp.exp(S - jnp.max(S, axis=3, keepdims=True))
    total = jnp.sum(P, axis=3, keepdims=True)
    parts = jnp.split(P, ends[:-1], axis=3)
    summed = [_matmul(part, block.v) for part, block in zip(parts, blocks, strict=True)]
    out = reduce(jnp.add, summed) / total  # (n_kv, B, g, d)
    return out.transpose(0, 2, 3, 1).reshape(-1, q.shape[3], 1).astype(q.dtype)


_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def layer(
    h: jax.Array,
    w: Layer,
    full: Sequence[Cache],
    last: Cache,
    rope: Rotation,
    position: jax.Array,
    *,
    head_dim: int,
    eps: float,
    window: int | None,
) -> tuple[jax.Array, Cache]:
    """One decoder layer for the tokens at ``position``.

    Args:
      h: (D, B, 1), float32.
      w: the layer's weights.
      full: the blocks of its cache before the last.
      last: the block that this position is in.
      rope: the angles of all positions.
      position: () int32.
      head_dim, eps, window: as in `forward.decoder_layer`.

    Returns:
      h after the layer, and the last block with this position.
    """
    here = Rotation(*(lax.dynamic_slice_in_dim(angles, position, 1, 1) for angles in rope))
    x, q, k, v = forward.attention_inputs(h, w, here, head_dim=head_dim, eps=eps)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 3, 1)  # (n_kv, B, d, 1), (n_kv, B, 1, d)
    place = position - jnp.int32(sum(block.room for block in full))
    last = Cache(
        lax.dynamic_update_slice_in_dim(last.k, k.astype(jnp.float32), place, 3),
        lax.dynamic_update_slice_in_dim(last.v, v.astype(jnp.float32), place, 2),
    )
    a = attention(q, [*full, last], position, window)
    return forward.after_attention(h, x, a, w, eps=eps)[0], last


class Decoder:
    """A whole model in memory and the cache of B sequences.

    Args:
      layers: all layers, on the device, in the dtype of the products.
      embedding: (V, D), on the host.
      norm: the final norm's weight, (D,).
      head: lm_head or the embedding, (V, D), on the device.
      rope: the angles for all N positions of a sequence.
      head_dim, eps, window: as in `forward.decoder_layer`.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        embedding: np.ndarray,
        norm: jax.Array,
        head: jax.Array,
        rope: Rotation,
        *,
        head_dim: int,
        eps: float,
        window: int | None,
    ) -> None:
        self._layers, self._embedding, self._norm, self._head = layers, embedding, norm, head
        self._rope, self._head_dim = rope, head_dim
        self._step, self._scores = _compiled(head_dim, eps, window)
        self._caches: list[list[Cache]] = []  # blocks, for each layer

    def __call__(self, ids: np.ndarray, position: int) -> jax.Array:
        """Scores of the tokens after these, (V, B), float32.

        Args:
          ids: the sequences' tokens at ``position``, (B,), int32.
          position: 0 begins new sequences; the others follow in order.
        """
        if position == 0:
            self._caches = [[] for _ in self._layers]
        room = room_for(position, self._rope.c.shape[1])
        if more := room - sum(block.room for block in self._caches[0]):
            for w, blocks in zip(self._layers, self._caches, strict=True):
                blocks.append(self._empty(w, len(ids), more))
        h = jnp.asarray(self._embedding[ids].astype(np.float32).T[:, :, None])
        at = jnp.int32(position)
        for w, blocks in zip(self._layers, self._caches, strict=True):
            h, blocks[-1] = self._step(h, w, blocks[:-1], blocks[-1], self._rope, at)
        scores: jax.Array = self._scores(h, self._norm, self._head)
        return scores

    def _empty(self, w: Layer, B: int, room: int) -> Cache:
        d = self._head_dim
        n_kv = w.k.shape[0] // d
        k, v = (jnp.zeros((n_kv, B, *size), jnp.float32) for size in ((d, room), (room, d)))
        return Cache(k, v)


@cache
def _compiled(
    head_dim: int, eps: float, window: int | None
) -> tuple[Callable[..., tuple[jax.Array, Cache]], Callable[..., jax.Array]]:
    """The compiled layer, which updates its last block in place, and the compiled head."""
    step = partial(layer, head_dim=head_dim, eps=eps, window=window)

    def scores(h: jax.Array, norm: jax.Array, head: jax.Array) -> jax.Array:
        return forward.logits(h.swapaxes(1, 2), norm, head, eps=eps)

    return jax.jit(step, donate_argnums=3), jax.jit(scores)


@jax.jit
def draw(scores: jax.Array, u: jax.Array) -> jax.Array:
    """Tokens drawn from softmax(scores), temperature 1, by inverting the distribution function.

    Token t is drawn where P(0) + … + P(t - 1) ≤ u < P(0) + … + P(t); the sums are of blocks first,
    then within a block, in float64.

    Args:
      scores: logits, (V, B), float32.
      u: (B,), float64.

    Returns:
      (B,), int32.
    """
    V, B = scores.shape
    p = jnp.exp(scores - jnp.max(scores, axis=0)[None])
    p = jnp.pad(p, ((0, -V % BLOCK), (0, 0))).reshape(-1, BLOCK, B)
    upto = jnp.cumsum(jnp.sum(p, axis=1, dtype=jnp.float64), axis=0)  # (blocks, B)
    target = u * upto[-1]
    block = _first_above(upto, target)
    chosen = jnp.take_along_axis(p, block[None, None], axis=0)[0]  # (BLOCK, B)
    before = jnp.take_along_axis(upto, block[None], axis=0)[0] - jnp.sum(
        chosen, axis=0, dtype=jnp.float64
    )
    within = _first_above(jnp.cumsum(chosen.astype(jnp.float64), axis=0), target - before)
    return block * BLOCK + within


@jax.jit
def guided(scores: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance (arXiv 2207.12598): null + s (class − null).

    Args:
      scores: logits of B sequences with their class, then with the null class, (V, 2 B).
      scale: s.

    Returns:
      (V, B).
    """
    own, null = jnp.split(scores, 2, axis=1)
    return null + scale.astype(scores.dtype) * (own - null)


@partial(jax.jit, static_argnames=("top_k", "top_p"))
def filtered(scores: jax.Array, *, top_k: int, top_p: float) -> jax.Array:
    """Scores (V, B) with all but the likeliest tokens of each sequence at `MASKED`.

    Args:
      scores: logits, (V, B).
      top_k: keep all that are at least the k-th largest; 0: all.
      top_p: of these, keep the fewest whose probabilities sum to more than p, at least one; 1: all.
    """
    V = scores.shape[0]
    if 0 < top_k < V:
        least = lax.top_k(scores.T, top_k)[0][:, -1]
        scores = jnp.where(scores >= least[None], scores, jnp.float32(MASKED))
    if top_p < 1:
        order = jnp.argsort(-scores, axis=0)
        p = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=0), axis=0)
        before = jnp.cumsum(p, axis=0) - p
        keep = jnp.zeros_like(before, dtype=bool)
        keep = keep.at[order, jnp.arange(scores.shape[1])[None]].set(before <= jnp.float32(top_p))
        scores = jnp.where(keep, scores, jnp.float32(MASKED))
    return scores


def _first_above(sums: jax.Array, target: jax.Array) -> jax.Array:
    """Along the first axis, where the sums first exceed the target, or reach their end."""
    found = (sums > target[None]) | (sums >= sums[-1:])  # rounding may leave the target at the end
    return jnp.argmax(found, axis=0).astype(jnp.int32)
