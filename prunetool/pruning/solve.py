"""Positive definite systems, solved in place, and what is said when they are not definite."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from scipy.linalg import cho_factor
from scipy.linalg.lapack import dpotri

from prunetool.errors import NumericalError
from prunetool.pruning.gram import mirror


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

    Args:
      A: (D, D), float64, row-major; only its lower triangle is read and overwritten.

    Raises:
      numpy.linalg.LinAlgError: where A is not positive definite.
    """
    # LAPACK is column-major: the lower triangle by rows is the upper one of the transpose.
    factor: tuple[np.ndarray, bool] = cho_factor(
        A.T, lower=False, overwrite_a=True, check_finite=False
    )
    return factor


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
