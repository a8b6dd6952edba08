from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from prunetool.pruning import attention_loss as al
from tests import references
from tests.pruning.test_attention_mask import relative, slopes

D, HEADS, KV_HEADS, HEAD_DIM = 5, 4, 2, 4
INVERSE, EPS = np.array([1.0, 0.2]), 0.01
KINDS = {
    "plain": {},
    "biased": {"biased": True},
    "in a window": {"window": 3},
    "normed": {"normed": True},
    "all": {"biased": True, "normed": True, "window": 5},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def turn(z_q, z_k, *norms):
    """The norms if any, the rotary embedding by complex numbers, and the scale; float64."""

    def rotated(z, norm=None):
        _, B, N = z.shape
        if norm is not None:
            z = z.reshape(-1, HEAD_DIM, B, N)
            z = z / jnp.sqrt(jnp.mean(z**2, axis=1, keepdims=True) + EPS)
            z = z * norm[None, :, None, None]
        z = z.reshape(-1, 2, HEAD_DIM // 2, B, N)
        angle = jnp.asarray(INVERSE)[:, None, None] * jnp.arange(N, dtype=z.dtype)[None, None]
        turned = lax.complex(z[:, 0], z[:, 1]) * lax.complex(jnp.cos(angle), jnp.sin(angle))[None]
        return jnp.concatenate([turned.real, turned.imag], axis=1)

    q, k = rotated(z_q, *norms[:1]) * HEAD_DIM**-0.5, rotated(z_k, *norms[1:])
    return q.reshape(k.shape[0], -1, *k.shape[1:]), k


def problem(B=2, N=9, biased=False, normed=False, window=None, seed=0):
    random = np.random.default_rng(seed)
    w = tuple(
        jnp.asarray(random.standard_normal((heads * HEAD_DIM, D))) for heads in (HEADS, KV_HEADS)
    )
    x = jnp.asarray(random.standard_normal((D, B, N)))
    biases = [jnp.asarray(random.standard_normal(len(W))) if biased else None for W in w]
    moved = tuple(W + 0.3 * jnp.asarray(random.standard_normal(W.shape)) for W in w)
    norms = tuple(jnp.asarray(random.uniform(0.5, 2, HEAD_DIM)) for _ in w) if normed else ()
    return w, moved, al.AttentionInputs(x, *biases, norms, window)


def matrices(w, inputs):
    """P of every head and sequence, (B, H, N, N), by loops."""
    biases = [0 if b is None else np.asarray(b) for b in (inputs.q_bias, inputs.k_bias)]
    return np.stack(
        [
            references.layer_attention(
                np.asarray(inputs.x)[:, b].T, *map(np.asarray, w), *biases,
                HEADS, KV_HEADS, INVERSE, [np.asarray(norm) for norm in inputs.norms], EPS,
                inputs.window,
            )
            for b in range(inputs.x.shape[1])
        ]
    )  # fmt: skip


def whole_loss(w, inputs, dense):
    P = matrices(w, inputs)
    return 0.5 * ((P - dense) ** 2).sum() / (P.size / P.shape[-1])


@pytest.fixture(scope="module", autouse=True)
def _blocks_of_four():
    """Nine tokens are three blocks; the references know whole matrices only."""
    whole, al.QUERY_BLOCK = al.QUERY_BLOCK, 4
    jax.clear_caches()
    yield
    al.QUERY_BLOCK = whole
    jax.clear_caches()


@kinds
def test_the_loss_is_that_of_whole_matrices(kind):
    w, moved, inputs = problem(**kind)
    dense = al.queries_keys(turn, w, inputs)
    value, _ = al.value_and_gradient(turn, moved, inputs, dense)
    P0, P = matrices(w, inputs), matrices(moved, inputs)
    assert float(value) == pytest.approx(whole_loss(moved, inputs, P0), rel=1e-12)
    measured, errors = al.measure(turn, moved, inputs, dense)
    assert float(measured) == pytest.approx(float(value), rel=1e-12)
    by_head = np.sqrt(((P - P0) ** 2).sum((0, 2, 3)) / (P0**2).sum((0, 2, 3)))
    np.testing.assert_allclose(np.ravel(errors), by_head, rtol=1e-10)


@kinds
def test_the_gradient_is_that_of_finite_differences(kind):
    w, moved, inputs = problem(**kind)
    dense = al.queries_keys(turn, w, inputs)
    _, found = al.value_and_gradient(turn, moved, inputs, dense)
    P0 = matrices(w, inputs)
    for side in (0, 1):

        def of_side(W, side=side):
            both = (W, moved[1]) if side == 0 else (moved[0], W)
            return whole_loss(both, inputs, P0)

        assert relative(found[side], slopes(of_side, moved[side])) < 1e-6


def jacobian(w, inputs):
    """∂P/∂W of both weights by finite differences: (weights, entries of P)."""
    parts = []
    for side in (0, 1):

        def of_side(W, side=side):
            return matrices((W, w[1]) if side == 0 else (w[0], W), inputs).ravel()

        slope = slopes(of_side, w[side])
        parts.append(slope.reshape(-1, slope.shape[-1]))
    return np.concatenate(parts)


@kinds
def test_the_hessian_product_is_that_of_finite_differences(kind):
    w, _, inputs = problem(N=6, **kind)
    J = jacobian(w, inputs)
    count = inputs.x.shape[1] * HEADS * inputs.x.shape[2]
    random = np.random.default_rng(1)
    V = tuple(jnp.asarray(random.standard_normal(W.shape)) for W in w)
    flat = np.concatenate([np.ravel(v) for v in V])
    found = np.concatenate([np.ravel(v) for v in al.hessian_product(turn, V, w, inputs)])
    assert relative(found, J @ (J.T @ flat) / count) < 1e-6


@kinds
def test_the_diagonal_is_unbiased(kind):
    w, _, inputs = problem(N=6, **kind)
    J = jacobian(w, inputs)
    expected = (J**2).sum(axis=1) / (inputs.x.shape[1] * HEADS * inputs.x.shape[2])
    probes = 4000
    found = al.hessian_diagonal(turn, w, inputs, jax.random.key(0), probes=probes)
    found = np.concatenate([np.ravel(part) for part in found])
    # One probe of a sum of signs has a relative spread of at most √2; five of its errors.
    assert (np.abs(found / expected - 1) < 5 * np.sqrt(2 / probes)).all()


def test_the_curvature_on_masks_is_the_largest_eigenvalue():
    w, _, inputs = problem(N=6)
    J = jacobian(w, inputs) * np.concatenate([np.ravel(W) for W in w])[:, None]
    count = inputs.x.shape[1] * HEADS * inputs.x.shape[2]
    expected = np.linalg.eigvalsh(J @ J.T / count)[-1]
    assert float(al.mask_curvature(turn, w, inputs)) == pytest.approx(expected, rel=0.05)


def test_mask_steps_are_algorithm_1_on_the_layers_loss():
    w, _, inputs = problem()
    dense = al.queries_keys(turn, w, inputs)
    lam, rate = 0.01, 0.5
    M, losses = al.descend_mask(
        turn, tuple(map(jnp.ones_like, w)), w, inputs, dense, lam, rate, steps=3
    )
    P0 = matrices(w, inputs)

    def loss(masks):
        held = sum(float((m**2).sum()) for m in masks)
        masked = [np.asarray(W) * m for W, m in zip(w, masks, strict=True)]
        return whole_loss(masked, inputs, P0) + 0.5 * lam * held

    masks = [np.ones(W.shape) for W in w]
    for number in range(3):
        assert float(losses[number]) == pytest.approx(loss(masks), rel=1e-9)
        of_q, of_k = (lambda m, k=masks[1]: loss([m, k]), lambda m, q=masks[0]: loss([q, m]))
        steps = [slopes(of_q, masks[0]), slopes(of_k, masks[1])]
        masks = [m - rate * s for m, s in zip(masks, steps, strict=True)]
    for found, expected in zip(M, masks, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_refining_lowers_the_loss_and_stays_on_the_support():
    w, _, inputs = problem(N=20)
    dense = al.queries_keys(turn, w, inputs)
    random = np.random.default_rng(2)
    support = tuple(jnp.asarray(random.random(W.shape) > 0.3, W.dtype) for W in w)
    start = tuple(W * s for W, s in zip(w, support, strict=True))
    zeros = tuple(map(jnp.zeros_like, w))
    refine = partial(al.refine, turn)
    state, losses = refine(
        al.Refining(start, zeros, zeros), support, inputs, dense,
        (jnp.float64(0.1), jnp.float64(0.1)), jnp.float64(0), jnp.float64(60), steps=60,
    )  # fmt: skip
    assert losses[-1] < 0.7 * losses[0]
    for W, s in zip(state.w, support, strict=True):
        assert (np.asarray(W)[np.asarray(s) == 0] == 0).all()
    # In two parts it is the same.
    half, _ = refine(
        al.Refining(start, zeros, zeros), support, inputs, dense,
        (jnp.float64(0.1), jnp.float64(0.1)), jnp.float64(0), jnp.float64(60), steps=25,
    )  # fmt: skip
    whole, _ = refine(
        half, support, inputs, dense, (jnp.float64(0.1), jnp.float64(0.1)), jnp.float64(25),
        jnp.float64(60), steps=35,
    )  # fmt: skip
    np.testing.assert_allclose(whole.w[0], state.w[0], rtol=1e-9)
