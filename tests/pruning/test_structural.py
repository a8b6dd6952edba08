import numpy as np
import pytest

from prunetool.errors import NumericalError
from prunetool.pruning import structural
from tests import references

random = np.random.default_rng(0)
X = random.standard_normal((80, 12)) @ random.standard_normal((12, 12))
W = random.standard_normal((12, 5))
A = X.T @ X


def test_wanda_is_the_output_energy_of_each_row_alone():
    expected = [np.linalg.norm(np.outer(X[:, i], W[i])) ** 2 / 80 for i in range(12)]
    np.testing.assert_allclose(structural.wanda(W, np.diagonal(A) / 80), expected)


def test_flap_is_the_standardised_variance_of_each_row():
    score = np.array([np.linalg.norm(W[i]) ** 2 * X[:, i].var() for i in range(12)])
    expected = (score - score.mean()) / score.std(ddof=1)
    got = structural.flap(W, np.diagonal(A) / 80, X.mean(axis=0))
    np.testing.assert_allclose(got, expected)
    np.testing.assert_array_equal(structural.standardise(np.ones(3)), 0)


def test_block_energy_is_the_output_energy_of_each_block_alone():
    blocks = np.stack([A[b * 4 : b * 4 + 4, b * 4 : b * 4 + 4] for b in range(3)])
    expected = [
        np.linalg.norm(X[:, b * 4 : b * 4 + 4] @ W[b * 4 : b * 4 + 4]) ** 2 for b in range(3)
    ]
    np.testing.assert_allclose(structural.block_energy(W, blocks), expected)


def loss_without(pruned):
    """Of removing these rows and refitting all others, by least squares."""
    kept = ~np.isin(np.arange(12), pruned)
    V = references.refit(X, W, kept, 0.0)
    return np.linalg.norm(X[:, kept] @ V - X @ W) ** 2


def test_obs_is_the_loss_after_the_best_refit():
    rows = structural.obs(W, A, damping=0.0)
    np.testing.assert_allclose(rows, [loss_without([i]) for i in range(12)], rtol=1e-8)
    blocks = structural.obs(W, A, damping=0.0, blocks=3)
    expected = [loss_without(range(b * 4, b * 4 + 4)) for b in range(3)]
    np.testing.assert_allclose(blocks, expected, rtol=1e-8)


def test_a_singular_gram_matrix_says_so():
    with pytest.raises(NumericalError, match="12 x 12 Gram matrix: is not positive definite"):
        structural.obs(W, np.zeros((12, 12)), damping=0.1)
