"""The equations of a decoder layer of Llama and its families, in JAX.

Everything is feature-major: a stream of B sequences of N tokens is (features, B, N). A checkpoint
stores a matrix as (out, in), so every projection is a plain product W x, and the input of each
matrix comes out as (features, tokens), the fastest layout for its Gram matrix.

| symbol | is | shape |
|---|---|---|
| h | residual stream, float32 | (D, B, N) |
| x, y | normalised input of attention, of the MLP | (D, B, N) |
| a | input of o_proj: the heads' outputs | (H d, B, N) |
| z | input of down_proj: SiLU(gate) ∘ up | (I, B, N) |
| c, s | cosines and sines of the rotary embedding | (d/2, N) |
| g | query heads that share a KV head, H / n_kv | |
"""

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from prunetool.llama.config import GRID_ROPE, Rope
from prunetool.llama.weights import Layer

QUERY_BLOCK = 128  # queries per step; 64, 256, 512 were no faster on a CPU with 2 MiB L2 per core
# On a CPU, XLA's product with a matrix larger than this in both dimensions is 1.2 to 2.4 times
# slower than in tiles.
WHOLE, TILE = 2048, (1024, 4096)
MASKED = -1e30  # far below any logit, and finite: no NaN from inf - inf


class Rotation(NamedTuple):
    """Cosines and sines of every position, (d/2, N) each, float32."""

    c: jax.Array
    s: jax.Array


class Taps(NamedTuple):
    """Inputs of a layer's matrices, and the residual stream that their outputs join."""

    attention: jax.Array  # x, input of q, k and v, (D, B, N)
    o: jax.Array  # a, (H d, B, N)
    mlp: jax.Array  # y, input of gate and up, (D, B, N)
    down: jax.Array  # z, (I, B, N)
    before_attention: jax.Array  # h, (D, B, N), float32
    before_mlp: jax.Array  # h + attention, (D, B, N), float32


def rotation(rope: Rope, head_dim: int, length: int, max_position_embeddings: int) -> Rotation:
    """Angles of the rotary embedding for positions 0 … length - 1.

    Computed in float32 as in transformers, for the types default, linear, dynamic (NTK for
    sequences beyond max_position_embeddings), llama3 and yarn; for llamagen_2d see `_grid`.
    """
    p = rope.parameters
    if rope.type == GRID_ROPE:
        return _grid(rope, head_dim, length)
    theta, scale = rope.theta, 1.0
    if rope.type == "dynamic":
        stretch = p["factor"] * max(length, max_position_embeddings) / max_position_embeddings
        theta *= (stretch - (p["factor"] - 1)) ** (head_dim / (head_dim - 2))
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = (1.0 / np.float32(theta) ** exponent).astype(np.float32)
    if rope.type == "linear":
        inverse = inverse / np.float32(p["factor"])
    elif rope.type == "llama3":
        inverse = _llama3(inverse, **{k: p[k] for k in _LLAMA3_KEYS})
    elif rope.type == "yarn":
        inverse, scale = _yarn(inverse, rope, head_dim)
    angle = inverse[:, None].astype(np.float32) * np.arange(length, dtype=np.float32)  # (d/2, N)
    c, s = np.cos(angle) * np.float32(scale), np.sin(angle) * np.float32(scale)
    return Rotation(jnp.asarray(c, jnp.float32), jnp.asarray(s, jnp.float32))


def _grid(rope: Rope, head_dim: int, length: int) -> Rotation:
    """LlamaGen's table (arXiv 2406.06525): code p is at row ⌊p / G⌋ and column p mod G of a grid.

    The first d/4 pairs turn with the row, the others with the column. The class before the codes
    has cosine 0, not 1: its query and key are zero vectors.
    """
    grid = rope.parameters["grid"]
    exponent = np.arange(0, head_dim, 4, dtype=np.float32) / np.float32(head_dim)
    inverse = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)[:, None]  # (d/4, 1)
    places = np.divmod(np.arange(grid**2), grid)  # rows, columns
    angle = np.concatenate([inverse * place.astype(np.float32) for place in places])
    c, s = (np.pad(f(angle), ((0, 0), (1, 0)))[:, :length] for f in (np.cos, np.sin))
    return Rotation(jnp.asarray(c, jnp.float32), jnp.asarray(s, jnp.float32))


_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _llama3(
    inverse: np.ndarray,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> np.ndarray:
    """Long wavelengths are slowed by ``factor``, short ones kept, those between blended."""
    turns = original_max_position_embeddings * inverse / (2 * math.pi)  # in the original context
    blend = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return np.asarray((1 - blend) * inverse / factor + blend * inverse, np.float32)


def _yarn(inverse: np.ndarray, rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """YaRN (arXiv 2309.00071): blend by a dimension's turns, and scale cos and sin."""
    p = rope.parameters
    factor, original = p["factor"], p["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    def mscale(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0  # as in transformers
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    scale = p.get("attention_factor")
    if scale is None and p.get("mscale") and p.get("mscale_all_dim"):
        scale = mscale(p["mscale"]) / mscale(p["mscale_all_dim"])
    blended = inverse / np.float32(factor) * ramp + inverse * (1 - ramp)
    return blended.astype(np.float32), float(mscale() if scale is None else scale)


def product(W: jax.Array, x: jax.Array) -> jax.Array:
    """W x for W (O, D) and x (D, …): (O, …), summed and returned in float32."""
    x_flat = x.reshape(x.shape[0], -1).astype(W.dtype)
    tiled = min(W.shape) > WHOLE and jax.default_backend() == "cpu"
    rows, columns = TILE if tiled else W.shape
    tiles = [
        [
            _product(W[i : i + rows, j : j + columns], x_flat[j : j + columns], 0)
            for j in range(0, W.shape[1], columns)
        ]
        for i in range(0, W.shape[0], rows)
    ]
    out = jnp.concatenate([reduce(jnp.add, row) for row in tiles])
    return out.reshape(W.shape[0], *x.shape[1:])


def dot(A: jax.Array, B: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """A over one of its axes times B over one of its own, summed and returned in float32."""
    return lax.dot_general(
        A,
        B,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=lax.Precision.HIGHEST,  # float32 means float32 on a GPU too, not TF32
        preferred_element_type=jnp.float32,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(A: jax.Array, B: jax.Array, axis: int) -> jax.Array:
    """A over its last axis times B over ``axis``, summed and returned in float32.

    Its gradients are products in the operands' dtype too: JAX's own rule would take float32.
    """
    return dot(A, B, (1, axis))


def _product_forward(A: jax.Array, B: jax.Array, axis: int) -> tuple[jax.Array, Any]:
    return dot(A, B, (1, axis)), (A, B)


def _product_backward(axis: int, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    A, B = saved
    g = g.astype(A.dtype)
    to_B = dot(_transposed(A), g, (1, 0)) if axis == 0 else dot(_transposed(g), A, (1, 0))
    return dot(g, B, (1, 1 - axis)).astype(A.dtype), to_B.astype(B.dtype)


def _transposed(A: jax.Array) -> jax.Array:
    """Aᵀ, moved in memory: XLA's product over the rows of bfloat16 is 4 times slower on a CPU."""
    by_rows = Layout(major_to_minor=(0, 1))
    transposed: jax.Array = with_layout_constraint(A.T, by_rows)  # type: ignore[no-untyped-call]
    return transposed


_product.defvjp(_product_forward, _product_backward)


def linear(W: jax.Array, b: jax.Array | None, x: jax.Array) -> jax.Array:
    """W x + b, (O, B, N), float32; b is (O,), or (O, B, N) with a bias for each token."""
    out = product(W, x)
    if b is None:
        return out
    b = b.astype(jnp.float32)
    return out + (b if b.ndim == out.ndim else b[:, None, None])


def shortcut(S: jax.Array | None, h: jax.Array) -> jax.Array:
    """The residual stream h, (k, B, N), in the basis that the output beside it is in, (k', B, N).

    S is (k', k); None: h itself.
    """
    return h if S is None else product(S, h)


def rms_norm(h: jax.Array, weight: jax.Array, eps: float, dtype: jnp.dtype) -> jax.Array:
    """H / sqrt(mean(h²) + ε) ∘ w over the features; statistics in float32."""
    scale = lax.rsqrt(jnp.mean(h * h, axis=0, keepdims=True) + jnp.float32(eps))
    return (h * scale * weight.astype(jnp.float32)[:, None, None]).astype(dtype)


def rotate(x: jax.Array, rope: Rotation) -> jax.Array:
    """The rotary embedding, half-split as Hugging Face stores it; x is (heads, d, B, N)."""
    half = x.shape[1] // 2
    a, b = x[:, :half], x[:, half:]
    c, s = rope.c[None, :, None], rope.s[None, :, None]
    return jnp.concatenate([a * c - b * s, b * c + a * s], axis=1)


def head_norm(x: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """Each head's x / sqrt(mean(x²) + ε) ∘ w, of (heads, d, B, N); x itself without a weight."""
    if weight is None:
        return x
    scale = lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + jnp.float32(eps))
    return x * scale * weight.astype(jnp.float32)[None, :, None, None]


def turn(
    z_q: jax.Array,
    z_k: jax.Array,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    rope: Rotation,
    *,
    head_dim: int,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """Rotated queries, scaled by 1/√d, and rotated keys, from the outputs of q_proj and k_proj.

    Args:
      z_q, z_k: (H d, B, N) and (n_kv d, B, N).
      q_norm, k_norm: weights of the heads' norms, (d,); None if the model has none.
      rope: the angles, for N positions.
      head_dim, eps: d, and the ε of the norms.

    Returns:
      (n_kv, g, d, B, N) and (n_kv, d, B, N).
    """
    q, k = (z.reshape(-1, head_dim, *z.shape[1:]) for z in (z_q, z_k))
    k = rotate(head_norm(k, k_norm, eps), rope)
    q = rotate(head_norm(q, q_norm, eps), rope) * jnp.float32(head_dim**-0.5)
    return q.reshape(k.shape[0], -1, *k.shape[1:]), k


def queries_keys(
    x: jax.Array, w: Layer, rope: Rotation, *, head_dim: int, eps: float
) -> tuple[jax.Array, jax.Array]:
    """A layer's queries and keys (`turn`) for attention input x, (D, B, N)."""
    z_q, z_k = linear(w.q, w.q_bias, x), linear(w.k, w.k_bias, x)
    q, k = turn(z_q, z_k, w.q_norm, w.k_norm, rope, head_dim=head_dim, eps=eps)
    return q.astype(w.q.dtype), k.astype(w.q.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None = None) -> jax.Array:
    """Causal softmax(qᵀk) v, one KV group and one block of queries at a time.

    The largest array is (g · block, N): none is (heads, N, N), in its gradient neither, for which
    every block is computed again.

    Args:
      q: queries, already scaled by 1/√d, (n_kv, g, d, B, N).
      k, v: (n_kv, d, B, N).
      window: how many keys a query sees, up to its own; None for all of these.

    Returns:
      The heads' outputs, (n_kv · g · d, B, N), in the dtype of ``v``.
    """
    n_kv, g, d, B, N = q.shape
    if N == 1:  # a token sees itself
        return jnp.broadcast_to(v[:, None], q.shape).reshape(-1, B, 1)

    def one_block(
        q: jax.Array, k: jax.Array, v: jax.Array, start: int, first: int, stop: int
    ) -> jax.Array:
        """Queries ``start`` to ``stop`` of a group over the keys they see from ``first``."""
        q, k, v = q[:, :, start:stop], k[:, first:stop], v[:, first:stop]
        n, keys = stop - start, stop - first
        q_rows = q.transpose(0, 2, 1).reshape(g * n, d)
        S = product(q_rows, k)  # (g n, keys)
        seen = jnp.arange(n)[:, None] >= jnp.arange(n)[None, :]
        last = jnp.where(seen, S[:, start - first :].reshape(g, n, n), jnp.float32(MASKED))
        S = lax.dynamic_update_slice(S, last.reshape(g * n, n), (0, start - first))
        if window is not None and keys > window:  # the block's last query sees fewer
            back = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)[None, :]
            S = jnp.where(jnp.tile(back < window, (g, 1)), S, jnp.float32(MASKED))
        # The largest logit cancels, so it has no gradient.
        largest = lax.stop_gradient(jnp.max(S, axis=1, keepdims=True))
        P = jnp.exp(S - largest).astype(v.dtype)
        # The same rounded P in numerator and denominator: the weights sum to one.
        total = jnp.sum(P, axis=1, dtype=jnp.float32)
        out = _product(v, P, 1) / total[None]  # (d, g n)
        return out.reshape(d, g, n).astype(v.dtype)

    def one_group(group: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = group  # (g, d, N), (d, N), (d, N)
        blocks = []
        for start in range(0, N, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, N)  # a query sees no key at or beyond stop
            first = 0 if window is None else max(0, start + 1 - window)
            block = jax.checkpoint(partial(one_block, start=start, first=first, stop=stop))
            blocks.append(block(q, k, v))  # (d, g, n)
        return jnp.concatenate(blocks, axis=2).swapaxes(0, 1)  # (g, d, N)

    def by_sequence(x: jax.Array) -> jax.Array:  # (n_kv, …, B, N) -> (B n_kv, …, N)
        x = jnp.moveaxis(x, -2, 0)
        return x.reshape(B * n_kv, *x.shape[2:])

    out = lax.map(one_group, (by_sequence(q), by_sequence(k), by_sequence(v)))
    return jnp.moveaxis(out.reshape(B, n_kv * g * d, N), 0, 1)


def attention_inputs(
    h: jax.Array, w: Layer, rope: Rotation, *, head_dim: int, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The normalised input x, and queries, keys and values, of a layer for its input h.

    Returns:
      (D, B, N), (n_kv, g, d, B, N) and twice (n_kv, d, B, N), in the dtype of the products.
    """
    dtype = w.q.dtype
    x = rms_norm(h, w.input_norm, eps, dtype)
    q, k = queries_keys(x, w, rope, head_dim=head_dim, eps=eps)
    v = linear(w.v, w.v_bias, x).reshape(-1, head_dim, *h.shape[1:])
    return x, q, k, v.astype(dtype)


def after_attention(
    h: jax.Array, x: jax.Array, a: jax.Array, w: Layer, *, eps: float
) -> tuple[jax.Array, Taps]:
    """The rest of a layer, from its input h, the normalised x and the heads' outputs a."""
    after = shortcut(w.o_shortcut, h) + linear(w.o, w.o_bias, a)

    y = rms_norm(after, w.post_norm, eps, w.q.dtype)
    gate, up = linear(w.gate, w.gate_bias, y), linear(w.up, w.up_bias, y)
    z = (jax.nn.silu(gate) * up).astype(w.q.dtype)
    out = shortcut(w.down_shortcut, after) + linear(w.down, w.down_bias, z)
    return out, Taps(x, a, y, z, h, after)


def decoder_layer(
    h: jax.Array, w: Layer, rope: Rotation, *, head_dim: int, eps: float, window: int | None = None
) -> tuple[jax.Array, Taps]:
    """One decoder layer: h + attention(norm(h)), then + mlp(norm(·)).

    Args:
      h: residual stream, (D, B, N), float32.
      w: the layer's weights; products take their dtype and sum in float32.
      rope: the angles, for N positions.
      head_dim, eps: d, and the ε of the norms.
      window: as in `attention`.

    Returns:
      The residual stream after the layer, and the inputs of its matrices.
    """
    x, q, k, v = attention_inputs(h, w, rope, head_dim=head_dim, eps=eps)
    return after_attention(h, x, attention(q, k, v, window), w, eps=eps)


def logits(h: jax.Array, norm: jax.Array, head: jax.Array, *, eps: float) -> jax.Array:
    """Scores of the next token, (V, n), float32.

    Args:
      h: residual stream after the last layer, (D, 1, n).
      norm: the final norm's weight, (D,).
      head: lm_head (or the tied embedding), (V, D).
      eps: ε of the norm.
    """
    return product(head, rms_norm(h, norm, eps, head.dtype))[:, 0]


def token_losses(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) of each token, (n,), float32.

    Args:
      scores: logits, (V, n).
      targets: the token that follows each, (n,), int32.
    """
    chosen = jnp.take_along_axis(scores, targets[None, :], axis=0)[0]
    return jax.nn.logsumexp(scores, axis=0) - chosen


def divergences(scores: jax.Array, other: jax.Array) -> jax.Array:
    """KL(p‖p') of each token's next-token distributions, from logits (V, n) of both; (n,), nats."""
    log_p, log_q = jax.nn.log_softmax(scores, axis=0), jax.nn.log_softmax(other, axis=0)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=0)
