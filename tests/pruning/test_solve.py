import numpy as np
import pytest
from scipy.linalg import cho_solve

from prunetool.errors import NumericalError
from prunetool.pruning import solve


@pytest.mark.parametrize("block", [1, 7, 16, 4096])
def test_a_factor_in_blocks_takes_the_lower_triangle_alone(block, monkeypatch):
    monkeypatch.setattr(solve, "LAPACK_ROWS", 0 if block < 4096 else 4096)
    monkeypatch.setattr(solve, "BLOCK", block)
    X = np.random.default_rng(0).standard_normal((40, 23))
    A = X.T @ X
    room = np.tril(A)
    room[np.triu_indices(23, 1)] = np.nan
    factor = solve.factorise(room)
    np.testing.assert_allclose(np.tril(room), np.linalg.cholesky(A), atol=1e-10)
    assert np.isnan(room[np.triu_indices(23, 1)]).all()
    np.testing.assert_allclose(A @ cho_solve((np.tril(room), True), np.ones(23)), 1, atol=1e-8)
    assert np.shares_memory(factor[0], room)


@pytest.mark.parametrize("block", [7, 4096])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_damped_inverse(overwrite, block, monkeypatch):
    monkeypatch.setattr(solve, "LAPACK_ROWS", 0 if block < 4096 else 4096)
    monkeypatch.setattr(solve, "BLOCK", block)
    X = np.random.default_rng(0).standard_normal((40, 23))
    A = X.T @ X
    damped = A + 0.1 * np.diagonal(A).mean() * np.eye(23)
    room = A.copy()
    inverse = solve.damped_inverse(room, 0.1, overwrite=overwrite)
    np.testing.assert_allclose(inverse @ damped, np.eye(23), atol=1e-10)
    assert np.array_equal(room, A) != overwrite


@pytest.mark.parametrize("block", [3, 4096])
def test_what_is_not_definite_in_any_block_says_so(block, monkeypatch):
    monkeypatch.setattr(solve, "LAPACK_ROWS", 0 if block < 4096 else 4096)
    monkeypatch.setattr(solve, "BLOCK", block)
    A = np.diag([1.0] * 7 + [-1.0])
    with pytest.raises(NumericalError, match="is not positive definite"):
        solve.damped_inverse(A, 0.0)
