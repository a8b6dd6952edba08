"""The curves are those of explicit refits: each V solved for by least squares, in float64."""

import itertools

import numpy as np
import pytest

from prunetool.errors import NumericalError
from prunetool.pruning import curve, gram

D, OUT, TOKENS, GRADIENTS = 24, 10, 90, 70


class Layer:
    """Inputs, a weight and gradients of outputs, all random."""

    def __init__(self, seed=0, dead=(), gradients=GRADIENTS):
        random = np.random.default_rng(seed)
        self.X = random.standard_normal((TOKENS, D)) @ random.standard_normal((D, D))
        self.X[:, list(dead)] = 0
        self.A, self.W = self.X.T @ self.X, random.standard_normal((D, OUT))
        self.g = random.standard_normal((gradients, OUT)) @ random.standard_normal((OUT, OUT))
        self.G = self.g.T @ self.g

    @property
    def WC(self):
        return self.W @ curve.metric_root(gram.pack(self.G), len(self.g))

    def refitted(self, gone, damping=0.01, mix=0.3):
        """½ tr((W − V)ᵀ A' (W − V) M) at the best V whose rows ``gone`` are zero."""
        kept = np.setdiff1d(np.arange(D), gone)
        mean = np.diagonal(self.A).mean() / TOKENS
        A = self.A / TOKENS + damping * mean * np.eye(D)
        V = np.zeros_like(self.W)
        root = np.linalg.cholesky(A).T
        V[kept] = np.linalg.lstsq(root[:, kept], root @ self.W, rcond=None)[0]
        G = self.G / len(self.g)
        M = mix * G + (1 - mix) * np.trace(G) / OUT * np.eye(OUT)
        return 0.5 * np.trace((self.W - V).T @ A @ (self.W - V) @ M)


LAYERS = {
    "full": Layer(),
    "dead inputs": Layer(1, dead=(0, 5, 23)),
    "fewer gradients than outputs": Layer(2, gradients=3),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("panel", [7, 512])
def test_a_curve_of_rows_is_that_of_explicit_refits(layer, panel, monkeypatch):
    monkeypatch.setattr(gram, "PANEL", panel)
    order = np.random.default_rng(3).permutation(D)
    losses = curve.row_curve(gram.pack(layer.A), layer.WC, order, tokens=TOKENS)
    assert losses[0] == 0
    expected = [layer.refitted(order[:k]) for k in range(1, D + 1)]
    np.testing.assert_allclose(losses[1:], expected, rtol=1e-10)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("blocks", [1, 2, 6])
def test_of_groups_the_best_subset_of_each_size_goes(layer, blocks):
    found = curve.group_curve(layer.A.copy(), layer.WC, blocks, tokens=TOKENS)
    rows = np.arange(D).reshape(blocks, -1)
    for k in range(blocks):
        losses = {p: layer.refitted(rows[[*p]]) for p in itertools.combinations(range(blocks), k)}
        best = min(losses, key=losses.get)
        assert tuple(np.flatnonzero(found.removed[k])) == best
        np.testing.assert_allclose(found.losses[k], losses[best], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_of_many_groups_the_one_of_least_loss_goes_next(layer):
    blocks = 12
    assert 2**blocks > curve.MOST_SUBSETS
    found = curve.group_curve(layer.A.copy(), layer.WC, blocks, tokens=TOKENS)
    rows, gone = np.arange(D).reshape(blocks, -1), []
    for k in range(blocks):
        assert set(np.flatnonzero(found.removed[k])) == set(gone)
        np.testing.assert_allclose(
            found.losses[k], layer.refitted(rows[gone].ravel()), rtol=1e-10, atol=1e-14
        )
        left = [b for b in range(blocks) if b not in gone]
        gone.append(min(left, key=lambda b: layer.refitted(rows[[*gone, b]].ravel())))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_greedy_removes_the_batch_of_least_losses_of_what_is_left(layer):
    order, losses = curve.greedy(layer.A.copy(), layer.WC, damping=0.01, batch=5)
    assert sorted(order) == list(range(D))
    for start in range(0, D, 5):
        gone = order[:start]
        before = layer.refitted(gone)
        left = np.setdiff1d(np.arange(D), gone)
        alone = np.array([layer.refitted([*gone, row]) - before for row in left])
        cheapest = np.argsort(alone)[:5]
        np.testing.assert_array_equal(order[start : start + 5], left[cheapest])
        expected = 2 * TOKENS * alone[cheapest]
        np.testing.assert_allclose(losses[start : start + 5], expected, rtol=1e-8)


def test_greedy_blocks_are_those_of_the_curve():
    layer = LAYERS["full"]
    order, losses = curve.greedy(layer.A.copy(), layer.WC, damping=curve.DAMPING, blocks=12)
    found = curve.group_curve(layer.A.copy(), layer.WC, 12, tokens=TOKENS)
    np.testing.assert_allclose(np.cumsum(losses)[:-1] / (2 * TOKENS), found.losses[1:])
    np.testing.assert_array_equal(np.argsort(order) < 5, found.removed[5])


def test_only_the_lower_triangle_of_a_gram_matrix_is_read():
    layer = LAYERS["full"]
    lower = np.where(np.tri(D, dtype=bool), layer.A, np.nan)
    found = curve.group_curve(lower, layer.WC, 4, tokens=TOKENS)
    assert np.isfinite(found.losses).all()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (np.nan, "contains NaN or infinity"),
        (np.inf, "contains NaN"),
        (0.0, "not positive definite"),
    ],
)
def test_gradients_that_give_no_metric_say_so(fault, words):
    G = gram.pack(np.ones((3, 3)))
    G[:] = np.where(np.arange(len(G)) == 1, fault, 0)
    with pytest.raises(NumericalError, match=f"3 x 3 Gram matrix of the gradients: .*{words}"):
        curve.metric_root(G, 5)


def test_inputs_that_are_all_zero_say_so():
    packed, WC = gram.pack(np.zeros((4, 4))), np.ones((4, 2))
    with pytest.raises(NumericalError, match="4 x 4 Gram matrix: is not positive definite"):
        curve.row_curve(packed, WC, np.arange(4), tokens=3)
    with pytest.raises(NumericalError, match="4 x 4 Gram matrix: is not positive definite"):
        curve.group_curve(np.zeros((4, 4)), WC, 2, tokens=3)
