import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunetool.errors import NumericalError
from prunetool.pruning import gram, newton
from tests import references


def problem(seed, D=12, outputs=5, tokens=60):
    random = np.random.default_rng(seed)
    X = random.standard_normal((tokens, D)) * np.exp(random.standard_normal(D))
    W = random.standard_normal((D, outputs))
    return X, W, gram.mirror(newton.contribution_gram(W, X.T @ X))


def test_K_is_the_gram_matrix_of_the_contributions():
    X, W, K = problem(0)
    for i in range(len(K)):
        for j in range(len(K)):
            expected = np.vdot(np.outer(X[:, i], W[i]), np.outer(X[:, j], W[j]))
            assert K[i, j] == pytest.approx(expected, abs=1e-9)


@given(st.integers(0, 50), st.sampled_from([1e-2, 1.0, 1e3]))
def test_the_closed_form_is_stationary(seed, lam):
    _, _, K = problem(seed)
    y = 1 - newton.newton(K, 3.0, lam=lam)
    gradient = K @ y - lam * (3.0 - y.sum())
    assert np.abs(gradient).max() < 1e-8 * np.abs(K).max()


@pytest.mark.parametrize("steps", [1, 2, 51])
def test_algorithm_1_gives_the_closed_form_after_any_number_of_steps(steps):
    _, _, K = problem(1)
    iterated = newton.newton_iterated(K, 3.0, lam=2.0, damping=1e-3, steps=steps)
    np.testing.assert_allclose(iterated, newton.newton(K, 3.0, lam=2.0, damping=1e-3), atol=1e-10)


def test_an_infinite_lambda_meets_the_count_exactly():
    _, _, K = problem(2)
    assert newton.newton(K, 4.0).sum() == pytest.approx(len(K) - 4.0)
    np.testing.assert_allclose(newton.newton(K, 4.0), newton.newton(K, 4.0, lam=1e12), atol=1e-6)


def test_the_closed_form_leaves_the_box_whatever_theorem_2_says():
    masks = [newton.newton(problem(seed)[2], 6.0) for seed in range(20)]
    assert min(z.min() for z in masks) < 0


@given(st.integers(0, 200), st.floats(0.5, 11.5), st.sampled_from([np.inf, 1.0]))
def test_the_box_solution_meets_its_conditions(seed, s, lam):
    _, _, K = problem(seed)
    z, order, info = newton.newton_box(K, s, lam=lam)
    assert info.converged
    assert info.residual < 1e-10
    assert (z >= 0).all()
    assert (z <= 1).all()
    if np.isinf(lam):
        assert (1 - z).sum() == pytest.approx(s)
    # No feasible direction goes down: gradient signs at the bounds.
    y = 1 - z
    c = lam * (s - y.sum()) if np.isfinite(lam) else np.median((K @ y)[(y > 0) & (y < 1)])
    if np.isfinite(c):
        w = (K @ y - c) / np.abs(K).max()
        assert (w[y <= 0] > -1e-9).all()
        assert (w[y >= 1] < 1e-9).all()
    assert (order[z == 1] >= 1).all()
    assert (order[z == 0] <= 0).all()


def test_the_box_solution_is_no_worse_than_any_feasible_one():
    random = np.random.default_rng(3)
    for seed in range(10):
        _, _, K = problem(seed)
        z, _, _ = newton.newton_box(K, 5.0, lam=1.0)
        best = references.objective(K, 1 - z, 5.0, 1.0)
        for _ in range(50):
            assert best <= references.objective(K, random.uniform(0, 1, len(K)), 5.0, 1.0)


def test_a_dead_unit_goes_first_and_does_not_make_the_system_singular():
    X, W, _ = problem(4)
    W[7] = 0
    K = gram.mirror(newton.contribution_gram(W, X.T @ X))
    for z in (newton.newton(K, 3.0), newton.newton_box(K, 3.0)[1]):
        assert z.argmin() == 7
        assert np.isfinite(np.delete(z, 7)).all()


SOLVERS = {
    "closed form": lambda K, s: newton.newton(K, s, lam=2.0),
    "hard constraint": lambda K, s: newton.newton(K, s),
    "iterated": lambda K, s: newton.newton_iterated(K, s, lam=2.0, steps=3),
    "box": lambda K, s: newton.newton_box(K, s, lam=2.0)[1],
    "box, hard constraint": lambda K, s: newton.newton_box(K, s)[1],
}


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_dead_units_count_as_removed(solve):
    X, W, _ = problem(4)
    live = np.arange(12) % 5 != 2  # two are dead
    W[~live] = 0
    K = gram.mirror(newton.contribution_gram(W, X.T @ X))
    without = K[np.ix_(live, live)]
    # The others are as if the dead ones had never been, and were not to be removed either.
    for s in (5.0, 2.0, 1.0):
        z = solve(K, s)
        assert (z[~live] == -np.inf).all()
        np.testing.assert_allclose(z[live], solve(without, max(s - 2.0, 0.0)), atol=1e-10)
    assert not np.allclose(solve(K, 5.0)[live], solve(without, 5.0))


def test_tied_blocks_are_solved_as_blocks():
    within = np.kron(np.eye(4), np.ones((3, 3)))
    for seed in range(10):
        _, _, K = problem(seed)
        tied = newton.tie(K, 4)
        assert tied[1, 2] == pytest.approx(K[3:6, 6:9].sum())
        # With one block to go and the others' interplay small, it is the cheapest block.
        tied = newton.tie(np.where(within, K, 1e-3 * K), 4)
        _, order, _ = newton.newton_box(tied, 1.0)
        assert (order.argmin(),) == references.best_blocks(tied, 1)


def test_permuting_units_permutes_scores():
    _, _, K = problem(5)
    order = np.random.default_rng(0).permutation(len(K))
    permuted = newton.newton(K[np.ix_(order, order)], 3.0)
    np.testing.assert_allclose(permuted, newton.newton(K, 3.0)[order], atol=1e-10)


def test_a_system_that_is_not_positive_definite_says_so():
    with pytest.raises(NumericalError, match="not positive definite; raise --damping"):
        newton.newton(np.ones((4, 4)), 1.0)


@pytest.mark.parametrize("D", [5, 700])  # within one panel, and over two
def test_K_is_made_scaled_and_solved_in_the_lower_triangle_alone(D):
    X, W, K = problem(7, D=D, tokens=2 * D)
    A, above = np.tril(X.T @ X), np.triu_indices(D, 1)
    A[above] = np.nan
    lower = newton.contribution_gram(W, A, norm=10.0)
    np.testing.assert_allclose(np.tril(lower), np.tril(K) / 10, atol=1e-12 * K.max())
    assert newton.total(lower) == pytest.approx(np.linalg.norm(X @ W) ** 2 / 10)
    expected = newton.newton(K / 10, 3.0, lam=2.0)
    got = newton.newton(lower, 3.0, lam=2.0, overwrite=True)
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_the_spectral_norm():
    X, _, _ = problem(6)
    assert newton.spectral_norm(X.T @ X) == pytest.approx(np.linalg.norm(X, 2) ** 2)
    assert newton.spectral_norm(np.tril(X.T @ X)) == pytest.approx(np.linalg.norm(X, 2) ** 2)
    assert newton.spectral_norm(np.diag([1.0, 4.0])) == 4.0
