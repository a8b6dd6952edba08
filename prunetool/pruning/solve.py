"""Positive definite systems, solved in place, and what is said when they are not definite."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from scipy.linalg import cho_factor, cholesky, solve_triangular
from scipy.linalg.lapack import dpotri

from prunetool.errors import NumericalError
from prunetool.pruning.gram import mirror

LAPACK_ROWS, BLOCK = 11_008, 4096


@contextmanager
def definite(what: str, at: str = "") -> Iterator[None]:
    """Say which matrix a Cholesky factorisation refused.

    Args:
      what: the matrix.
      at: further words, as its damping.

    Raises:
      NumericalError: in place of LAPACK's.
    """
    try:
        yield
    except np.linalg.LinAlgError as error:
        raise NumericalError(
            what,
            " ".join(["is not positive definite", at]).rstrip(),
            "raise --damping or calibrate on more tokens",
        ) from error


def factorise(A: np.ndarray) -> tuple[np.ndarray, bool]:
    """The Cholesky factor of A, for `scipy.linalg.cho_solve`, in the place of its lower triangle.

    By blocks beyond `LAPACK_ROWS`: OpenBLAS's own factorisation of 16384 rows and more ends in a
    segmentation fault (scipy 1.17.1, two threads). At 11008 rows it takes two thirds of the time.

    Args:
      A: (D, D), float64, row-major; only its lower triangle is read and overwritten.

    Raises:
      numpy.linalg.LinAlgError: where A is not positive definite.
    """
    if len(A) <= LAPACK_ROWS:
        # LAPACK is column-major: the lower triangle by rows is the upper one of the transpose.
        factor: tuple[np.ndarray, bool] = cho_factor(
            A.T, lower=False, overwrite_a=True, check_finite=False
        )
        return factor
    for start in range(0, len(A), BLOCK):
        stop = min(start + BLOCK, len(A))
        done = A[start:stop, :start]  # of these rows, what is factorised
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
    """(A + damping · mean(diag A) · I)⁻¹, (D, D), of a Gram matrix A.

    Args:
      A: (D, D), float64; only its lower triangle is read.
      damping: fraction of the mean of its diagonal.
      overwrite: put the inverse in A's place.

    Raises:
      NumericalError: where that is not positive definite.
    """
    damped = A if overwrite else A.copy()
    damped[np.diag_indices(len(A))] += damping * np.diagonal(A).mean()
    with definite(f"a {len(A)} x {len(A)} Gram matrix"):
        factor, _ = factorise(damped)
    inverse, _ = dpotri(factor, lower=0, overwrite_c=1)
    return mirror(inverse.T)
