"""The loss of [AM] for a real Llama layer: masks of W_q and W_k under its own attention.

    P̃^h = softmax(q̃^hᵀ k̃^{⌊h/g⌋}),   L = 1/(2 B H N) Σ ‖P̃^h − P^h‖² + ½λ(‖M_q‖² + ‖M_k‖²)

causal, or with a window; q̃ and k̃ come from z = (M∘W) x + b through a function `Turn` that applies
rotary embedding, scale and any norms of heads. JAX differentiates it; it must not mix tokens or
heads. Rotary embedding makes the fused W depend on the distance of two tokens, and it would be many
times larger than the two factors: so each factor has a mask (derived here, not in [AM]).

Attention matrices exist in blocks of `QUERY_BLOCK` queries of one KV group: memory is O(block · N).

| symbol | is | shape |
|---|---|---|
| w | (W_q, W_k) as a checkpoint stores them | (H d, D), (n_kv d, D) |
| z | W x + b of each, before the rotary embedding | (H d, B, N), (n_kv d, B, N) |
| q, k | rotated and scaled queries, rotated keys | (n_kv, g, d, B, N), (n_kv, d, B, N) |
| P, R | a block's attention, and a residual of it | (g · block, keys) |
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from prunetool.pruning.attention_mask import descend, jacobian_product, largest_eigenvalue

QUERY_BLOCK = 128
PROBES = 16  # of the diagonal; every sequence adds one sample per probe

Pair = tuple[jax.Array, jax.Array]  # one for queries, one for keys: weights, masks or z
Turn = Callable[..., Pair]  # (z_q, z_k, *norms) -> (q, k)
Residual = Callable[..., jax.Array]


class AttentionInputs(NamedTuple):
    """The inputs of a layer's attention."""

    x: jax.Array  # normalised input, (D, B, N)
    q_bias: jax.Array | None  # (H d,)
    k_bias: jax.Array | None  # (n_kv d,)
    norms: tuple[jax.Array | None, ...] = (None, None)  # weights of q's and k's, (d,), for `Turn`
    window: int | None = None  # how many keys a query sees, up to its own


class _Block(NamedTuple):
    """One block of queries of one group: its position, and how to cut arrays to it."""

    start: int
    stop: int
    window: int | None

    def rows(self, q: jax.Array) -> jax.Array:
        """(g, d, N) -> (g · block, d)."""
        return q[:, :, self.start : self.stop].transpose(0, 2, 1).reshape(-1, q.shape[1])

    def attention(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """P, (g · block, stop): a query sees no key at or beyond ``stop``."""
        S = _dot(self.rows(q), k[:, : self.stop])
        back = jnp.arange(self.start, self.stop)[:, None] - jnp.arange(self.stop)[None, :]
        seen = back >= 0 if self.window is None else (back >= 0) & (back < self.window)
        return jax.nn.softmax(jnp.where(jnp.tile(seen, (q.shape[0], 1)), S, -jnp.inf), axis=1)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """A b, in float32 at least."""
    dtype = jnp.float32 if a.dtype.itemsize < 4 else a.dtype
    return jnp.matmul(a, b, precision="highest", preferred_element_type=dtype)


def _blocks(length: int, window: int | None) -> list[_Block]:
    starts = range(0, length, QUERY_BLOCK)
    return [_Block(start, min(start + QUERY_BLOCK, length), window) for start in starts]


def _flat(x: jax.Array) -> jax.Array:
    """(n_kv, …, B, N) -> (B n_kv, …, N): the first axis is mapped over."""
    x = jnp.moveaxis(x, -2, 0)
    return x.reshape(-1, *x.shape[2:])


def _unflat(x: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.moveaxis(x.reshape(like.shape[-2], -1, *x.shape[1:]), 0, -2)


def project(w: Pair, inputs: AttentionInputs) -> Pair:
    """z_q and z_k."""

    def one(W: jax.Array, bias: jax.Array | None) -> jax.Array:
        z = _dot(W, inputs.x.reshape(inputs.x.shape[0], -1))
        z = z if bias is None else z + bias[:, None]
        return z.reshape(-1, *inputs.x.shape[1:])

    return one(w[0], inputs.q_bias), one(w[1], inputs.k_bias)


def _turned(turn: Turn, w: Pair, inputs: AttentionInputs) -> Pair:
    """Q and k of the weights."""
    return turn(*project(w, inputs), *inputs.norms)


def pull_back(
    q: jax.Array, k: jax.Array, residual: Residual, given: Any, window: int | None
) -> tuple[Any, Pair]:
    """Pull a residual R of P back to q and k: dS = J_P[R], dq = k dSᵀ, dk = q dS.

    Args:
      q, k: the point at which P is computed.
      residual: ``residual(P, block, q, k, *given)`` returns R of one block.
      given: further arguments of ``residual``, arrays with a leading axis B · n_kv.
      window: as in `AttentionInputs`.

    Returns:
      ‖R‖² over all blocks, and (dq, dk) in the shapes of q and k.
    """

    def one_group(group: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, Pair]:
        q, k, given = group  # (g, d, N), (d, N)
        g, d, N = q.shape
        energy, dq, dk = jnp.zeros((), q.dtype), [], jnp.zeros_like(k)
        for block in _blocks(N, window):
            P = block.attention(q, k)
            R = residual(P, block, q, k, *given)
            energy += jnp.sum(R**2)
            dS = jacobian_product(P, R)
            rows = _dot(dS, k[:, : block.stop].T)  # (g n, d)
            dq.append(rows.reshape(g, -1, d).transpose(0, 2, 1))
            dk = dk.at[:, : block.stop].add(_dot(block.rows(q).T, dS))
        return energy, (jnp.concatenate(dq, axis=2), dk)

    energy, (dq, dk) = lax.map(one_group, (_flat(q), _flat(k), given))
    return jnp.sum(energy), (_unflat(dq, q), _unflat(dk, k))


def _difference(P: jax.Array, block: _Block, _q: Any, _k: Any, q0: Any, k0: Any) -> jax.Array:
    return P - block.attention(q0, k0)


def _change(P: jax.Array, block: _Block, q: Any, k: Any, q_dot: Any, k_dot: Any) -> jax.Array:
    """J_P[Ṡ]: how P changes with q and k."""
    to = block.stop
    S_dot = _dot(block.rows(q_dot), k[:, :to]) + _dot(block.rows(q), k_dot[:, :to])
    return jacobian_product(P, S_dot)


def _signs(P: jax.Array, block: _Block, _q: Any, _k: Any, key: jax.Array) -> jax.Array:
    return jax.random.rademacher(jax.random.fold_in(key, block.start), P.shape, P.dtype)


def value_and_gradient(
    turn: Turn, w: Pair, inputs: AttentionInputs, dense: Pair
) -> tuple[Any, Pair]:
    """L without regularisation, and its gradient with respect to the weights.

    Args:
      turn: maps z to q and k.
      w: the weights.
      inputs: the layer's inputs.
      dense: q and k of the dense weights (`queries_keys`).
    """
    (q, k), back = jax.vjp(lambda w: _turned(turn, w, inputs), w)
    count = _count(q)
    flat = tuple(map(_flat, dense))
    energy, (dq, dk) = pull_back(q, k, _difference, flat, inputs.window)
    return 0.5 * energy / count, back((dq / count, dk / count))[0]


def hessian_product(turn: Turn, V: Pair, w: Pair, inputs: AttentionInputs) -> Pair:
    """The Hessian of L without regularisation times V, at the dense weights w.

    There P̃ = P, so the Hessian is its Gauss-Newton form: J_P applied twice.
    """

    def queries_keys_of(w: Pair) -> Pair:
        return _turned(turn, w, inputs)

    (q, k), back = jax.vjp(queries_keys_of, w)
    _, tangent = jax.jvp(queries_keys_of, (w,), (V,))
    _, (dq, dk) = pull_back(q, k, _change, tuple(map(_flat, tangent)), inputs.window)
    count = _count(q)
    product: Pair = back((dq / count, dk / count))[0]
    return product


@partial(jax.jit, static_argnames=("turn", "probes"))
def hessian_diagonal(
    turn: Turn, w: Pair, inputs: AttentionInputs, key: jax.Array, *, probes: int = PROBES
) -> Pair:
    """The diagonal of the Hessian of L at the dense weights w, estimated without bias.

    H = Σ_rows JᵀJ, so E_v[(∂⟨v, P⟩/∂W)²] over random signs v is its diagonal (Hutchinson). Terms
    of different v cancel in the mean and are squared separately, with less noise: for W_q those of
    each query, for W_k those of each sequence.
    """
    z = project(w, inputs)
    (q, k), back = jax.vjp(lambda *z: turn(*z, *inputs.norms), *z)
    x = inputs.x
    groups = x.shape[1] * k.shape[0]

    def one(total: Pair, key: jax.Array) -> tuple[Pair, None]:
        _, slope = pull_back(q, k, _signs, (jax.random.split(key, groups),), inputs.window)
        dz_q, dz_k = back(slope)
        flat = x.reshape(x.shape[0], -1)
        of_q = _dot(dz_q.reshape(dz_q.shape[0], -1) ** 2, flat.T**2)
        by_sequence = lax.map(
            lambda one: _dot(one[0], one[1].T) ** 2,
            (jnp.moveaxis(dz_k, 1, 0), jnp.moveaxis(x, 1, 0)),
        )
        return (total[0] + of_q, total[1] + jnp.sum(by_sequence, axis=0)), None

    zero = jax.tree.map(jnp.zeros_like, w)
    total, _ = lax.scan(one, zero, jax.random.split(key, probes))
    count = probes * _count(q)
    return total[0] / count, total[1] / count


def squared_errors(candidates: Sequence[Pair], dense: Pair, window: int | None) -> Pair:
    """‖P̃ − P‖² of every candidate and head, and ‖P‖² of every head, over all sequences.

    Args:
      candidates: q and k of each candidate.
      dense: q and k that produce P.
      window: as in `AttentionInputs`.

    Returns:
      (len(candidates), n_kv, g) and (n_kv, g).
    """

    def one_group(group: tuple[Pair, list[Pair]]) -> jax.Array:
        (q0, k0), others = group
        g = q0.shape[0]
        sums = []
        for block in _blocks(q0.shape[2], window):
            P = block.attention(q0, k0)
            parts = [P, *(block.attention(q, k) - P for q, k in others)]
            sums.append(jnp.stack([jnp.sum(R.reshape(g, -1) ** 2, axis=1) for R in parts]))
        return jnp.sum(jnp.stack(sums), axis=0)  # (1 + candidates, g)

    flat = jax.tree.map(_flat, (dense, list(candidates)))
    n_kv, g = dense[0].shape[:2]
    sums = lax.map(one_group, flat).reshape(-1, n_kv, 1 + len(candidates), g).sum(axis=0)
    sums = jnp.moveaxis(sums, 1, 0)
    return sums[1:], sums[0]


@partial(jax.jit, static_argnames="turn")
def queries_keys(turn: Turn, w: Pair, inputs: AttentionInputs) -> Pair:
    """Q and k of the weights."""
    return _turned(turn, w, inputs)


@partial(jax.jit, static_argnames="turn")
def measure(turn: Turn, w: Pair, inputs: AttentionInputs, dense: Pair) -> Pair:
    """L without regularisation, a scalar; and ‖P̃ − P‖_F/‖P‖_F of each head, (n_kv, g)."""
    q, k = _turned(turn, w, inputs)
    (error,), energy = squared_errors([(q, k)], dense, inputs.window)
    return 0.5 * jnp.sum(error) / _count(q), jnp.sqrt(error / energy)


def _count(q: jax.Array) -> float:
    """B H N."""
    return float(q.size / q.shape[2])


@partial(jax.jit, static_argnames="turn")
def mask_curvature(turn: Turn, w: Pair, inputs: AttentionInputs) -> jax.Array:
    """λ_max of the Hessian with respect to the masks at M = 1, without λ."""

    def on_masks(V: Pair) -> Pair:
        return _times(w, hessian_product(turn, _times(w, V), w, inputs))

    return largest_eigenvalue(on_masks, w)


def _times(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0], a[1] * b[1]


@partial(jax.jit, static_argnames=("turn", "steps"))
def descend_mask(
    turn: Turn,
    M: Pair,
    w: Pair,
    inputs: AttentionInputs,
    dense: Pair,
    lam: Any,
    rate: Any,
    *,
    steps: int,
) -> tuple[Pair, jax.Array]:
    """Steps of Algorithm 1 on both masks; returns the loss, with λ, before each step, (steps,)."""

    def of_masks(M: Pair) -> tuple[Any, Pair]:
        value, slope = value_and_gradient(turn, _times(M, w), inputs, dense)
        slope = jax.tree.map(lambda g, W, m: W * g + lam * m, slope, w, M)
        return value + regularisation(M, lam), slope

    return descend(of_masks, M, rate, steps)


def regularisation(M: Pair, lam: Any) -> Any:
    """½λ(‖M_q‖² + ‖M_k‖²)."""
    return 0.5 * lam * (jnp.sum(M[0] ** 2) + jnp.sum(M[1] ** 2))


class Refining(NamedTuple):
    """Weights on their support, and Adam's moments (Kingma & Ba, arXiv 1412.6980)."""

    w: Pair
    first: Pair
    second: Pair


ADAM = (0.9, 0.999, 1e-12)  # the paper's decays; ε far below any gradient here


@partial(jax.jit, static_argnames=("turn", "steps"))
def refine(
    turn: Turn,
    state: Refining,
    support: Pair,
    inputs: AttentionInputs,
    dense: Pair,
    rates: Pair,
    start: jax.Array,
    total: jax.Array,
    *,
    steps: int,
) -> tuple[Refining, jax.Array]:
    """Descend on the kept weights' values: Adam projected on the support, cosine schedule.

    Args:
      turn, inputs, dense: as in `value_and_gradient`.
      state: current state.
      support: 1 where weights are kept, else 0.
      rates: maximum step size for each matrix.
      start, total: steps done so far, and in the whole schedule.
      steps: steps to do now.

    Returns:
      The state, and the loss before each step, (steps,).
    """
    decay, decay2, epsilon = ADAM

    def step(state: Refining, number: jax.Array) -> tuple[Refining, jax.Array]:
        value, slope = value_and_gradient(turn, state.w, inputs, dense)
        slope = _times(support, slope)
        schedule = 0.5 * (1 + jnp.cos(jnp.pi * number / total))

        def move(W: Any, m: Any, v: Any, g: Any, rate: Any) -> tuple[Any, Any, Any]:
            m, v = decay * m + (1 - decay) * g, decay2 * v + (1 - decay2) * g**2
            size = jnp.sqrt(v / (1 - decay2 ** (number + 1))) + epsilon
            return W - rate * schedule * m / (1 - decay ** (number + 1)) / size, m, v

        moved = [move(*parts) for parts in zip(*state, slope, rates, strict=True)]
        return Refining(*zip(*moved, strict=True)), value

    numbers = start + jnp.arange(steps, dtype=start.dtype)
    return lax.scan(step, state, numbers)
