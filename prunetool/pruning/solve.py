"""Positive definite systems: what they have in common, and what is said when they are not."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from prunetool.errors import NumericalError


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


def damped_inverse(A: np.ndarray, damping: float) -> np.ndarray:
    """(A + damping · mean(diag A) · I)⁻¹, (D, D), of a Gram matrix A; A is left as it is.

    Raises:
      NumericalError: where that is not positive definite.
    """
    damped = A.copy()
    damped[np.diag_indices(len(A))] += damping * np.diagonal(A).mean()
    with definite(f"a {len(A)} x {len(A)} Gram matrix"):
        factor = cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)
    inverse = cho_solve(factor, np.eye(len(A)), overwrite_b=True, check_finite=False)
    return np.asarray(inverse)
