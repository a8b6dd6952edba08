import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunetool.pruning import gram


def sums_of(x, h, cuts, **kept):
    sums = gram.zeros(len(x), **kept)
    for part in np.split(np.arange(x.shape[1]), cuts):
        if part.size:
            sums = gram.add(
                sums,
                jnp.asarray(x[:, None, part], jnp.float32),
                jnp.asarray(h[:, None, part], jnp.float32),
            )
    return sums


def whole(tiles, size):
    """The symmetric matrix of a sum's tiles."""
    return gram.unpack(gram.pack_tiles(tiles, size, np.float64))


# Few places, since each width of a part is compiled.
@given(st.lists(st.sampled_from([0, 1, 7, 20, 39, 40]), max_size=3), st.integers(0, 10))
def test_any_split_into_batches_gives_the_same_sums(cuts, seed):
    random = np.random.default_rng(seed)
    x, h = random.standard_normal((12, 40)), random.standard_normal((5, 40))
    kept = {"blocks": 3, "diagonal": True, "full": True}
    once, split = (jax.tree.leaves(sums_of(x, h, c, **kept)) for c in ([], sorted(cuts)))
    for one, other in zip(once, split, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("panel", "width", "tiles"), [(2, 2, 6), (2, 4, 4), (512, 2048, 1)])
def test_the_sums_are_what_they_say(panel, width, tiles, monkeypatch):
    monkeypatch.setattr(gram, "PANEL", panel)
    monkeypatch.setattr(gram, "WIDTH", width)
    random = np.random.default_rng(0)
    x, h = random.standard_normal((6, 50)), random.standard_normal((4, 50))
    sums = sums_of(x, h, [20], blocks=2, diagonal=True, full=True)
    assert len(sums.gram) == tiles
    weight = 1 / (h**2).sum(axis=0)
    weighted = (x * weight) @ x.T
    np.testing.assert_allclose(whole(sums.gram, 6), x @ x.T, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(sums.total), x.sum(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole(sums.token_gram, 6), weighted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(sums.token_diagonal), np.diagonal(weighted), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(sums.token_blocks[1]), weighted[3:, 3:], rtol=1e-4)
    eigenvalues = np.linalg.eigvalsh(whole(sums.gram, 6))
    assert eigenvalues.min() > -1e-5 * eigenvalues.max()
    assert all(np.asarray(value).dtype == np.float64 for value in jax.tree.leaves(sums))


def test_a_token_of_no_energy_has_no_weight():
    sums = sums_of(np.ones((2, 3)), np.zeros((4, 3)), [], diagonal=True)
    np.testing.assert_array_equal(np.asarray(sums.token_diagonal), 0)


def test_batches_add_in_float64():
    # In float32 the ones would be lost against 2^25.
    sums = gram.zeros(1)
    big = jnp.full((1, 1, 1), 2.0**13, jnp.float32)
    one = jnp.ones((1, 1, 1), jnp.float32)
    sums = gram.add(sums, big, one)
    for _ in range(8):
        sums = gram.add(sums, one, one)
    assert float(sums.gram[0][0, 0]) == 2.0**26 + 8


def test_sums_without_float64_are_refused():
    with jax.enable_x64(False), pytest.raises(AssertionError, match="call devices"):
        gram.zeros(3)


@given(st.integers(1, 30), st.sampled_from([3, 8, 512]))
def test_unpack_undoes_pack(size, panel):
    A = np.random.default_rng(size).standard_normal((size, size)).astype(np.float32)
    A = A + A.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "PANEL", panel)
        np.testing.assert_array_equal(gram.unpack(gram.pack(A)), A)
        patch.setattr(gram, "WIDTH", 2 * panel)
        tiles = tuple(A[place] for place in gram._tiles(size))
        for part in (size, size // 2):
            packed = gram.pack_tiles(tiles, part, np.float32)
            np.testing.assert_array_equal(packed, gram.pack(A[:part, :part]) if part else [])
        np.testing.assert_array_equal(gram.mirror(np.triu(A), upper=True), A)


@given(st.integers(1, 30), st.integers(0, 100))
def test_a_partition_has_the_blocks(size, seed):
    random = np.random.default_rng(seed)
    A = random.standard_normal((size, size))
    A, kept = A + A.T, random.random(size) < 0.6
    parts = gram.partition(gram.pack(A), kept)
    for part, place in zip(parts, [(kept, kept), (kept, ~kept), (~kept, ~kept)], strict=True):
        np.testing.assert_array_equal(part, A[np.ix_(*place)])


@given(st.integers(1, 30), st.integers(0, 100))
def test_a_reordered_gram_matrix_has_its_features_in_that_order(size, seed):
    random = np.random.default_rng(seed)
    A = random.standard_normal((size, size))
    A, order = A + A.T, random.permutation(size)
    np.testing.assert_array_equal(
        gram.reordered(gram.pack(A), order), np.tril(A[np.ix_(order, order)])
    )
