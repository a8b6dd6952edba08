import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prunetool.pruning import attention_mask as am
from tests import references

LAM = 0.03
causality = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def problem(S=3, n=7, d=5, seed=0):
    random = np.random.default_rng(seed)
    X, W = random.standard_normal((S, n, d)), random.standard_normal((d, d)) / np.sqrt(d)
    M = 1 + 0.3 * random.standard_normal((d, d))
    return jnp.asarray(X), jnp.asarray(W), jnp.asarray(M)


def slopes(function, at, step=1e-5):
    """Central differences, one entry at a time."""
    at = np.asarray(at)
    out = np.zeros((*at.shape, *np.shape(function(at))))
    for i in np.ndindex(at.shape):
        move = np.zeros(at.shape)
        move[i] = step
        out[i] = (np.asarray(function(at + move)) - np.asarray(function(at - move))) / (2 * step)
    return out


def relative(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@causality
def test_the_loss_is_the_papers(causal):
    X, W, M = problem()
    expected = references.attention_loss(*map(np.asarray, (M, X, W)), LAM, causal)
    assert float(am.loss(M, X, W, lam=LAM, causal=causal)) == pytest.approx(expected, rel=1e-12)


@causality
def test_the_gradient_is_that_of_finite_differences_and_of_jax(causal):
    X, W, M = problem()
    found = am.gradient(M, X, W, lam=LAM, causal=causal)
    by_hand = slopes(
        lambda M: references.attention_loss(M, np.asarray(X), np.asarray(W), LAM, causal), M
    )
    assert relative(found, by_hand) < 1e-6
    by_jax = jax.grad(am.loss)(M, X, W, lam=LAM, causal=causal)
    np.testing.assert_allclose(found, by_jax, rtol=1e-11, atol=1e-14)


@causality
def test_the_hessian_at_one_is_that_of_finite_differences(causal):
    X, W, _ = problem()
    one = np.ones(W.shape)
    H = slopes(lambda M: am.gradient(jnp.asarray(M), X, W, lam=LAM, causal=causal), one, 1e-4)
    V = np.random.default_rng(1).standard_normal(W.shape)
    found = am.hessian_product(jnp.asarray(V), X, W, lam=LAM, causal=causal)
    assert relative(found, np.einsum("ijkl,kl->ij", H, V)) < 1e-6
    diagonal = am.hessian_diagonal(X, W, lam=LAM, causal=causal)
    assert relative(diagonal, np.einsum("ijij->ij", H)) < 1e-6


@causality
def test_the_largest_eigenvalue_is_that_of_the_whole_hessian(causal):
    X, W, _ = problem()

    def product(V):
        return am.hessian_product(V, X, W, lam=LAM, causal=causal)

    columns = [np.asarray(product(jnp.asarray(e.reshape(W.shape)))).ravel() for e in np.eye(W.size)]
    expected = np.linalg.eigvalsh(np.stack(columns))[-1]
    assert float(am.largest_eigenvalue(product, W)) == pytest.approx(expected, rel=0.05)


def test_the_zero_operator_has_eigenvalue_zero():
    assert float(am.largest_eigenvalue(jnp.zeros_like, jnp.ones((2, 2)))) == 0


@causality
def test_algorithm_1_is_its_loop(causal):
    X, W, _ = problem()
    M, losses = am.gradient_descent_mask(X, W, lam=0.04, learning_rate=2.5, steps=4, causal=causal)
    expected = jnp.ones_like(W)
    for number in range(4):
        assert losses[number] == pytest.approx(
            references.attention_loss(*map(np.asarray, (expected, X, W)), 0.04, causal)
        )
        expected = expected - 2.5 * am.gradient(expected, X, W, lam=0.04, causal=causal)
    np.testing.assert_allclose(M, expected, rtol=1e-10)


def test_steps_below_two_over_the_largest_eigenvalue_converge_and_above_do_not():
    X, W, _ = problem()

    def product(V):
        return am.hessian_product(V, X, W, lam=LAM, causal=False)

    largest = float(am.largest_eigenvalue(product, W))
    rates = [1 / largest, 2.5 / LAM]
    good, bad = (
        am.gradient_descent_mask(X, W, lam=LAM, learning_rate=rate, steps=200, causal=False)[1]
        for rate in rates
    )
    assert (np.diff(good) <= 1e-12).all()
    assert not bad[-1] < bad[0]
