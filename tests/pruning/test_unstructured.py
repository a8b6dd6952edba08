from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunetool.errors import NumericalError
from prunetool.methods import PATTERNS
from prunetool.pruning import unstructured
from tests import references


def problem(rows=6, width=20, tokens=60, seed=0):
    random = np.random.default_rng(seed)
    X = random.standard_normal((tokens, width)) @ random.standard_normal((width, width))
    return random.standard_normal((rows, width)), X.T @ X


@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 9),
    sparsity=st.floats(0, 1),
    pattern=st.sampled_from(["unstructured", "per-output"]),
    seed=st.integers(0, 99),
)
def test_the_count_is_exact_whatever_the_ties(rows, width, sparsity, pattern, seed):
    score = np.random.default_rng(seed).integers(0, 3, (rows, width)).astype(float)
    kept = unstructured.keep(score, sparsity, pattern)
    if pattern == "unstructured":
        assert (~kept).sum() == round(sparsity * score.size)
        assert score[kept].min(initial=9) >= score[~kept].max(initial=-1)
    else:
        assert ((~kept).sum(axis=1) == round(sparsity * width)).all()


def test_two_of_four_neighbours_stay():
    score = np.random.default_rng(0).random((5, 12))
    fours = unstructured.keep(score, 0.5, "2:4").reshape(-1, 4)
    assert (fours.sum(axis=1) == 2).all()
    for four, kept in zip(score.reshape(-1, 4), fours, strict=True):
        assert set(np.argsort(four)[2:]) == set(np.flatnonzero(kept))
    with pytest.raises(ValueError, match="multiple of 4"):
        unstructured.keep(np.ones((2, 6)), 0.5, "2:4")


def test_nan_is_refused():
    with pytest.raises(NumericalError, match="contains NaN"):
        unstructured.keep(np.array([[1.0, np.nan]]), 0.5)


def test_wanda_is_weight_times_input_norm():
    W, A = problem()
    expected = [[abs(w) * A[j, j] ** 0.5 for j, w in enumerate(row)] for row in W]
    np.testing.assert_allclose(unstructured.wanda(W, A), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block", [4, 8, 128])
def test_sparsegpt_is_obs_one_column_after_another(pattern, block, monkeypatch):
    monkeypatch.setattr(unstructured, "COLUMN_BLOCK", block)
    W, A = problem(rows=5, width=24, tokens=80)
    kept, values = unstructured.sparsegpt(W, A, damping=0.01, sparsity=0.5, pattern=pattern)
    expected_kept, expected = references.sparsegpt(W, A, 0.01, 0.5, pattern, block)
    np.testing.assert_array_equal(kept, expected_kept)
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_fisher_is_obs_with_the_curvature_of_each_output(pattern, monkeypatch):
    monkeypatch.setattr(unstructured, "COLUMN_BLOCK", 8)
    W, A = problem(rows=5, width=24, tokens=80)
    g2 = np.array([1e-3, 0.1, 1.0, 5.0, 1e3])
    kept = unstructured.chosen_by_fisher(W, A, g2, damping=0.01, sparsity=0.5, pattern=pattern)
    expected, values = references.sparsegpt(W, A, 0.01, 0.5, pattern, 8, g2)
    np.testing.assert_array_equal(kept, expected)
    _, updated = unstructured.sparsegpt(W, A, damping=0.01, mask=kept)
    np.testing.assert_allclose(updated, values, rtol=1e-9, atol=1e-12)
    plain, _ = unstructured.sparsegpt(W, A, damping=0.01, sparsity=0.5, pattern=pattern)
    assert (kept != plain).any() == (pattern != "per-output")  # where a row's factor cancels


def test_two_of_four_go_together_at_the_least_error_of_the_sweep():
    W, A = problem(rows=40, width=4, tokens=10)
    H = A + 0.01 * np.diagonal(A).mean() * np.eye(4)

    def errors(mask):
        _, values = unstructured.sparsegpt(W, A, damping=0.01, mask=mask)
        return np.einsum("oi,ij,oj->o", W - values, H, W - values)

    masks = [np.tile(np.isin(range(4), pair), (40, 1)) for pair in combinations(range(4), 2)]
    kept = unstructured.chosen_by_fisher(
        W, A, np.ones(40), damping=0.01, sparsity=0.5, pattern="2:4"
    )
    np.testing.assert_allclose(errors(kept), np.min([*map(errors, masks)], axis=0))


def edge(number):
    """The least loss of a bin: the float32 of these first bits."""
    return (np.array([number], np.uint32) << np.uint32(16)).view(np.float32)[0]


def test_the_histogram_counts_the_loss_of_each_weight_and_of_its_best_refit():
    W, A = problem(rows=5, width=12, tokens=80)
    g2 = np.array([1e-6, 0.1, 1.0, 5.0, 1e4])
    loss = [[references.weight_loss(W, A, g2, 80, 0.01, i, j) for j in range(12)] for i in range(5)]
    own = unstructured.inverse_diagonal(A.copy(), 0.01)
    counts = unstructured.histogram(W, own, g2, 80)
    assert counts.sum() == W.size
    for number in np.flatnonzero(counts):
        low, high = edge(number), edge(number + 1)
        assert 1 < high / low < 1.008
        assert counts[number] == ((low <= np.array(loss)) & (np.array(loss) < high)).sum()


def test_weights_of_an_input_that_is_always_zero_cost_nothing():
    W, A = problem()
    A[3], A[:, 3] = 0, 0
    own = unstructured.inverse_diagonal(A, 0.01)
    assert np.isinf(own[3])
    assert np.isfinite(own[[0, 1, 2, 4]]).all()
    assert unstructured.histogram(W, own, np.ones(6), 60)[0] == 6


def test_a_loss_of_nan_is_refused():
    W, A = problem()
    own = unstructured.inverse_diagonal(A, 0.01)
    with pytest.raises(NumericalError, match="the loss of its weights: contains NaN"):
        unstructured.histogram(W, own, np.array([1, 1, 1, 1, 1, np.nan]), 60)


@given(
    rows=st.integers(1, 7),
    width=st.integers(1, 40),
    sparsity=st.floats(0, 1),
    pattern=st.sampled_from(["unstructured", "per-output"]),
)
def test_sparsegpt_meets_the_exact_count_over_its_blocks(rows, width, sparsity, pattern):
    W, A = problem(rows, width, width + 10)
    block, unstructured.COLUMN_BLOCK = unstructured.COLUMN_BLOCK, 8
    try:
        kept, values = unstructured.sparsegpt(
            W, A, damping=0.01, sparsity=sparsity, pattern=pattern
        )
    finally:
        unstructured.COLUMN_BLOCK = block
    assert (values[~kept] == 0).all()
    if pattern == "unstructured":
        assert (~kept).sum() == round(sparsity * kept.size)
    else:
        assert ((~kept).sum(axis=1) == round(sparsity * width)).all()


def test_a_given_mask_is_updated_to_the_weights_that_chose_it():
    W, A = problem()
    kept, values = unstructured.sparsegpt(W, A, damping=0.01, sparsity=0.4)
    again, updated = unstructured.sparsegpt(W, A, damping=0.01, mask=kept)
    np.testing.assert_array_equal(again, kept)
    np.testing.assert_array_equal(updated, values)


def test_the_update_lowers_the_output_error():
    W, A = problem(width=30, tokens=200)
    kept, values = unstructured.sparsegpt(W, A, damping=0.01, sparsity=0.5)

    def error(V):
        return np.einsum("oi,ij,oj->", V - W, A, V - W)

    assert error(values) < 0.8 * error(W * kept)


def test_an_input_that_is_always_zero_loses_its_weights_first():
    W, A = problem()
    A[3], A[:, 3] = 0, 0
    kept, values = unstructured.sparsegpt(W, A, damping=0.01, sparsity=1 / 20, pattern="per-output")
    assert not kept[:, 3].any()
    assert np.isfinite(values).all()


def test_a_singular_gram_matrix_is_named():
    W, A = problem(width=20, tokens=60)
    A[0, 1] = A[1, 0] = 2 * A[0, 0] + A[1, 1]
    with pytest.raises(NumericalError, match="a 20 x 20 Gram matrix: is not positive definite"):
        unstructured.sparsegpt(W, A, damping=0.0, sparsity=0.5)
