"""The mask of [AM]: gradient descent on the error of the attention matrix itself.

    L(M) = (1/n) ½‖P̃ − P‖²_F + ½λ‖M‖²_F,   P = rowsoftmax(X W Xᵀ),   P̃ = rowsoftmax(X (M∘W) Xᵀ)

[AM] is Liang et al., *Beyond Linear Approximations: A Novel Pruning Approach for Attention Matrix*,
arXiv 2410.11261; no code was released. From the paper: the loss, Algorithm 1 and its numbers
(`PUBLISHED`). Derived here: the Hessian at M = 1 and its diagonal, step sizes from its largest
eigenvalue, and the order by M²∘diag H. The loss divides by n: the published η needs it.

This file has the fused form, W = W_Q W_Kᵀ, and what both forms share (Algorithm 1, λ_max);
`attention_loss` has the loss of a real Llama layer.

| symbol | is | shape |
|---|---|---|
| X | sequences; the loss is their average | (S, n, d) |
| W, M | fused weight and its mask, real-valued until it is cut | (d, d) |
| P, P̃ | attention matrices of W and of M∘W; 0 above the diagonal where causal | (S, n, n) |
| J_P[T] | softmax Jacobian, P∘(T − rowsum(P∘T)1ᵀ); symmetric | (S, n, n) |
| λ, η, T | regularisation, step size, steps | |
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

POWER_STEPS = 20  # λ_max only sets a step size: a few per cent of error do no harm


class Published(NamedTuple):
    """Numbers printed in [AM]; T is not given for the real model: the synthetic T is used."""

    lam: float
    learning_rate: float
    iterations: int


PUBLISHED = Published(0.05, 0.005, 100)  # Llama-3.2-1B, §6.2
PUBLISHED_SYNTHETIC = Published(0.04, 0.1 / 0.04, 100)  # d = 64, n = 128, §6.1


def attention_matrix(X: jax.Array, W: jax.Array, *, causal: bool) -> jax.Array:
    """P = rowsoftmax(X W Xᵀ), (S, n, n)."""
    S = jnp.einsum("snd,de,sme->snm", X, W, X, precision="highest")
    if causal:
        n = X.shape[1]
        S = jnp.where(jnp.tril(jnp.ones((1, n, n), bool)), S, -jnp.inf)
    return jax.nn.softmax(S, axis=-1)


def jacobian_product(P: jax.Array, T: jax.Array) -> jax.Array:
    """J_P[T] = P∘(T − rowsum(P∘T)1ᵀ), row by row; rows are the last axis."""
    return P * (T - jnp.sum(P * T, axis=-1, keepdims=True))


def loss(M: jax.Array, X: jax.Array, W: jax.Array, *, lam: float, causal: bool) -> jax.Array:
    """L(M) of the module docstring, a scalar."""
    error = attention_matrix(X, M * W, causal=causal) - attention_matrix(X, W, causal=causal)
    return 0.5 * jnp.sum(error**2) / (X.shape[0] * X.shape[1]) + 0.5 * lam * jnp.sum(M**2)


def gradient(M: jax.Array, X: jax.Array, W: jax.Array, *, lam: float, causal: bool) -> jax.Array:
    """∇L(M) = (1/n) W∘(Xᵀ J_P̃[P̃ − P] X) + λM, (d, d)."""
    P_M = attention_matrix(X, M * W, causal=causal)
    error = P_M - attention_matrix(X, W, causal=causal)
    return _on_weights(jacobian_product(P_M, error), X, W) + lam * M


def hessian_product(
    V: jax.Array, X: jax.Array, W: jax.Array, *, lam: float, causal: bool
) -> jax.Array:
    """∇²L(1)·V = (1/n) W∘(Xᵀ J_P[J_P[X (V∘W) Xᵀ]] X) + λV, (d, d): exact, since P̃ = P there."""
    P = attention_matrix(X, W, causal=causal)
    T = jnp.einsum("snd,de,sme->snm", X, V * W, X, precision="highest")
    return _on_weights(jacobian_product(P, jacobian_product(P, T)), X, W) + lam * V


def hessian_diagonal(X: jax.Array, W: jax.Array, *, lam: float, causal: bool) -> jax.Array:
    """The diagonal of ∇²L(1), (d, d): Wanda's score with the softmax taken into account.

    W²∘((X²)ᵀq)/n + λ,  q = P²X² − 2μ∘(P²X) + μ²∘(P²1),  μ = PX; squares elementwise.
    """
    P = attention_matrix(X, W, causal=causal)
    mu = jnp.einsum("snm,smd->snd", P, X, precision="highest")
    P2 = P**2
    q = (
        jnp.einsum("snm,smd->snd", P2, X**2, precision="highest")
        - 2 * mu * jnp.einsum("snm,smd->snd", P2, X, precision="highest")
        + mu**2 * jnp.sum(P2, axis=-1, keepdims=True)
    )
    moments = jnp.einsum("snd,sne->de", X**2, q, precision="highest")
    return W**2 * moments / (X.shape[0] * X.shape[1]) + lam


def _on_weights(dS: jax.Array, X: jax.Array, W: jax.Array) -> jax.Array:
    """W∘(Xᵀ dS X), averaged over sequences and rows."""
    dW = jnp.einsum("snd,snm,sme->de", X, dS, X, precision="highest", optimize=True)
    return W * dW / (X.shape[0] * X.shape[1])


def descend(
    value_and_gradient: Callable[[Any], tuple[jax.Array, Any]],
    start: Any,
    learning_rate: jax.Array | float,
    steps: int,
) -> tuple[Any, jax.Array]:
    """Algorithm 1's loop, M ← M − η∇L(M), as one scan.

    Args:
      value_and_gradient: returns L and its gradient at an array or a tree of arrays.
      start: M₀; the paper starts at 1.
      learning_rate: η.
      steps: T.

    Returns:
      M_T, and the loss before each step, (T,).
    """

    def step(M: Any, _: None) -> tuple[Any, jax.Array]:
        value, slope = value_and_gradient(M)
        return jax.tree.map(lambda m, g: m - learning_rate * g, M, slope), value

    return lax.scan(step, start, None, length=steps)


def largest_eigenvalue(product: Callable[[Any], Any], like: Any) -> jax.Array:
    """λ_max of a symmetric positive semidefinite operator, by power iteration from random signs.

    Args:
      product: V ↦ H·V on trees of arrays.
      like: a tree with V's shapes and dtypes.
    """
    leaves, kind = jax.tree.flatten(like)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    start = jax.tree.unflatten(
        kind,
        [
            jax.random.rademacher(key, leaf.shape, leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ],
    )

    def step(V: Any, _: None) -> tuple[Any, jax.Array]:
        length = jnp.sqrt(sum(jnp.sum(v**2) for v in jax.tree.leaves(V)))
        # Under the zero operator the vector becomes zero after one step; let it stay zero.
        unit = jax.tree.map(lambda v: jnp.where(length > 0, v / length, v), V)
        return product(unit), length

    last, _ = lax.scan(step, start, None, length=POWER_STEPS)
    return jnp.sqrt(sum(jnp.sum(v**2) for v in jax.tree.leaves(last)))


@partial(jax.jit, static_argnames=("causal", "steps"))
def gradient_descent_mask(
    X: jax.Array, W: jax.Array, *, lam: float, learning_rate: float, steps: int, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Algorithm 1 of [AM] in the fused form: M_T from M₀ = 1, and the losses, (T,).

    `unstructured.keep` cuts the result to a binary mask.
    """

    def value_and_gradient(M: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (loss(M, X, W, lam=lam, causal=causal), gradient(M, X, W, lam=lam, causal=causal))

    return descend(value_and_gradient, jnp.ones_like(W), learning_rate, steps)
