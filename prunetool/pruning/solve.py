"""Positive definite systems, solved in place, and the error if they are not definite."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from scipy.linalg import cho_factor, cholesky, solve_triangular
from scipy.linalg.lapack import dpotri

from prunetool.errors import NumericalError
from prunetool.pruning.gram import mirror

LAPACK_ROWS, BLOCK = 11_008, 4096


@contextmanager
def definite(
    what: str, at: str = "", todo: str = "raise --damping or calibrate on more tokens"
) -> Iterator[None]:
    """Name the matrix if a Cholesky factorisation fails.

    Args:
      what: the matrix.
      at: further words, such as its damping.
      todo: what the user can do about it.

    Raises:
      NumericalError: instead of LAPACK's error.
    """
    try:
        yield
    except np.linalg.LinAlgError as error:
        raise NumericalError(
            what, " ".join(["is not positive definite", at]).rstrip(), todo
        ) from error


def factorise(A: np.ndarray) -> tuple[np.ndarray, bool]:
    """The Cholesky factor of A, for `scipy.linalg.cho_solve`; overwrites its lower triangle.

    Blocked beyond `LAPACK_ROWS`: OpenBLAS's own factorisation of 16384 rows or more segfaults
    (scipy 1.17.1, two threads). At 11008 rows it takes two thirds of the time.

    Args:
      A: (D, D), float64, row-major; only its lower triangle is read and overwritten.

    Raises:
      numpy.linalg.LinAlgError: if A is not positive definite.
    """
    if len(A) <= LAPACK_ROWS:
        # LAPACK is column-major: the lower triangle by rows is the upper one of the transpose.
        factor: tuple[np.ndarray, bool] = cho_factor(
            A.T, lower=False, overwrite_a=True, check_finite=False
        )
        return factor
    for start in range(0, len(A), BLOCK):
        stop = min(start + BLOCK, len(A))
        done = A[start:stop, :start]  # the factorised part of these rows
        own = A[start:stop, start:stop]
        L = cholesky(own - done @ done.T, lower=True, overwrite_a=True, check_finite=False)
        np.copyto(own, L, where=np.tri(stop - start, dtype=bool))
        for below in range(stop, len(A), BLOCK):
            rows = slice(below, min(below + BLOCK, len(A)))
            rest = A[rows, start:stop] - A[rows, :start] @ done.T
            A[rows, start:stop] = solve_triangular(
                L, rest.T, lower=True, overwrite_b=True, check_finite=False
            ).T
    return A.T, False


def damped_inverse(A: np.ndarray, damping: float, *, overwrite: bool = False) -> np.ndarray:
    """(A + damping · mean(diag A) · I)⁻¹, (D, D), for a Gram matrix A.

    Args:
      A: (D, D), float64; only its lower triangle is read.
      damping: fraction of the mean of its diagonal.
      overwrite: overwrite A with the inverse.

    Raises:
      NumericalError: if the damped matrix is not positive definite.
    """
    damped = A if overwrite else A.copy()
    damped[np.diag_indices(len(A))] += damping * np.diagonal(A).mean()
    with definite(f"a {len(A)} x {len(A)} Gram matrix"):
        factor, _ = factorise(damped)
    inverse, _ = dpotri(factor, lower=0, overwrite_c=1)
    return mirror(inverse.T)
