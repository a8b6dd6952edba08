import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunetool.errors import NumericalError
from prunetool.pruning import compensation, gram
from tests import references


def problem(seed, D=14, outputs=6, tokens=70):
    random = np.random.default_rng(seed)
    X = random.standard_normal((tokens, D)) @ random.standard_normal((D, D)) + 1
    W = random.standard_normal((D, outputs))
    kept = random.permutation(D) >= 5
    return X, W, kept, X.T @ X


def split(A, kept):
    return gram.partition(gram.pack(A), kept)


@given(st.integers(0, 100), st.sampled_from([0.0, 1e-3, 0.1, 10.0]))
def test_the_refit_is_least_squares(seed, damping):
    X, W, kept, A = problem(seed)
    got = W[kept] + compensation.Refit(split(A, kept), W[~kept]).solve(damping)
    np.testing.assert_allclose(got, references.refit(X, W, kept, damping), atol=1e-7)


def test_it_is_the_papers_equation_11():
    _, W, kept, A = problem(1)
    M = np.eye(len(A))[:, ~kept]
    inverse = np.linalg.inv(2 * A)
    dW = -inverse @ M @ np.linalg.inv(M.T @ inverse @ M) @ M.T @ W
    np.testing.assert_allclose(dW[~kept], -W[~kept], atol=1e-9)
    dW_k = compensation.Refit(split(A, kept), W[~kept]).solve(0.0)
    np.testing.assert_allclose(dW_k, dW[kept], atol=1e-9)


@given(st.integers(0, 100), st.floats(0, 10))
def test_a_refit_never_raises_the_error_over_plain_removal(seed, damping):
    X, W, kept, A = problem(seed)
    refit = compensation.Refit(split(A, kept), W[~kept])
    dW_k = refit.solve(damping)
    assert refit.error(dW_k) <= refit.removed * (1 + 1e-12)
    V = np.where(kept[:, None], W, 0.0)
    assert refit.removed == pytest.approx(np.linalg.norm(X @ (V - W)) ** 2)
    V[kept] += dW_k
    assert refit.error(dW_k) == pytest.approx(np.linalg.norm(X @ (V - W)) ** 2, rel=1e-7)
    assert compensation.output_energy(A, W) == pytest.approx(np.linalg.norm(X @ W) ** 2)


def test_keeping_all_changes_nothing():
    _, W, _, A = problem(2)
    every = np.ones(14, bool)
    assert not compensation.Refit(split(A, every), W[~every]).solve(0.1).any()


def test_the_bias_takes_what_the_mean_carries():
    X, W, kept, A = problem(3)
    m = X.mean(axis=0)
    centred = compensation.centred(split(A, kept), X.sum(axis=0), len(X), m, kept)
    for got, expected in zip(centred, split((X - m).T @ (X - m), kept), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-8)
    dW_k = compensation.Refit(centred, W[~kept]).solve(0.0)
    bias = m[~kept] @ W[~kept] - m[kept] @ dW_k
    with_ones = np.concatenate([X[:, kept], np.ones((len(X), 1))], axis=1)
    best = np.linalg.lstsq(with_ones, X @ W, rcond=None)[0]
    np.testing.assert_allclose(W[kept] + dW_k, best[:-1], atol=1e-7)
    np.testing.assert_allclose(bias, best[-1], atol=1e-7)


def test_the_damping_chosen_is_the_best_on_the_held_out_tokens():
    grid = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    for seed in range(20):
        X, W, kept, _ = problem(seed, tokens=40)
        fit, held = X[:12], X[12:]
        parts = split(fit.T @ fit, kept), split(held.T @ held, kept)
        choice = compensation.choose_damping(*parts, W[~kept], grid)
        errors = {}
        for damping in grid:
            V = references.refit(fit, W, kept, damping)
            errors[damping] = np.linalg.norm(held[:, kept] @ V - held @ W) ** 2
        # From the largest damping down, as long as the error falls.
        best = 1.0
        for damping in grid[-2::-1]:
            if errors[damping] >= errors[best]:
                break
            best = damping
        plain = np.linalg.norm(held[:, ~kept] @ W[~kept]) ** 2
        assert choice.before == pytest.approx(plain)
        assert choice.damping == (best if errors[best] < plain else None)
        assert choice.after == pytest.approx(min(errors[best], plain))


def test_a_singular_system_says_so():
    _, W, kept, A = problem(4)
    with pytest.raises(NumericalError, match="is not positive definite at ridge"):
        compensation.Refit(split(np.zeros_like(A), kept), W[~kept]).solve(0.0)


def test_the_systems_are_as_they_were_after_a_solve():
    _, W, kept, A = problem(5)
    parts = split(A, kept)
    compensation.Refit(parts, W[~kept]).solve(0.1)
    for got, expected in zip(parts, split(A, kept), strict=True):
        np.testing.assert_array_equal(got, expected)
