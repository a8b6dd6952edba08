"""Refit of the rows that stay, in closed form ([NP] eq. 11, in the kept rows).

The paper's δW = −(2A)⁻¹M_p(M_pᵀ(2A)⁻¹M_p)⁻¹M_pᵀW needs the inverse of all of A; solving for the
kept rows gives the same to 4e-14, is stable, and costs a third. Symbols: `prunetool.pruning`.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from prunetool.errors import NumericalError


def refit(W: np.ndarray, A: np.ndarray, kept: np.ndarray, *, damping: float) -> np.ndarray:
    """Refit the kept rows of W so that the output moves least.

    Minimises ‖X(W + δW) − XW‖² with the pruned rows at zero:

        δW_k = A'_kk⁻¹ A_kp W_p,   A' = A + damping · mean(diag A) · I.

    The damping pulls towards W_k, not towards 0.

    Args:
      W: weight, (D, D'), float64, output = X W.
      A: Gram matrix XᵀX, (D, D), float64, symmetric, squared activation units.
      kept: which rows stay, (D,), bool.
      damping: fraction of the mean of A's diagonal.
    Returns:
      δW_k, (k, D').
    Raises:
      NumericalError: where A'_kk is not positive definite.
    """
    A_kk = A[np.ix_(kept, kept)]
    A_kk[np.diag_indices(len(A_kk))] += damping * np.diagonal(A).mean()
    B = A[np.ix_(kept, ~kept)] @ W[~kept]  # (k, D')
    try:
        factor = cho_factor(A_kk, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError as error:
        raise NumericalError(
            f"the Gram matrix of {len(A_kk)} kept rows",
            f"is not positive definite at damping {damping:g}",
            "raise --damping or calibrate on more tokens",
        ) from error
    return np.asarray(cho_solve(factor, B, overwrite_b=True, check_finite=False))


def change(W: np.ndarray, kept: np.ndarray, dW_k: np.ndarray | None = None) -> np.ndarray:
    """The change of W when pruned rows go and kept rows move by δW_k (or stay), (D, D')."""
    delta = np.where(kept[:, None], 0.0, -W)
    if dW_k is not None:
        delta[kept] = dW_k
    return delta


def output_error(A: np.ndarray, delta: np.ndarray) -> float:
    """‖X ΔW‖² = tr(ΔWᵀ A ΔW), squared output units summed over tokens."""
    return float(np.vdot(delta, A @ delta))


def centred(A: np.ndarray, total: np.ndarray, tokens: int, about: np.ndarray) -> np.ndarray:
    """Σ (x − m)(x − m)ᵀ from A = Σ x xᵀ and total = Σ x, for any m = ``about``, (D, D)."""
    cross = np.outer(total, about)
    return np.asarray(A - cross - cross.T + tokens * np.outer(about, about))


class Choice(NamedTuple):
    """The damping that served unseen tokens best.

    Attributes:
      damping: the best of the grid; None where no refit served better than plain removal.
      before, after: output error on the held-out tokens, plainly removed and refitted.
    """

    damping: float | None
    before: float
    after: float


def choose_damping(
    W: np.ndarray, A_fit: np.ndarray, A_held: np.ndarray, kept: np.ndarray, grid: tuple[float, ...]
) -> Choice:
    """Refit on one part of the tokens at every damping of the grid, and measure on another.

    Too little damping with too few tokens refits their noise and is worse than no refit at all.

    Raises:
      NumericalError: where no damping of the grid gives a positive definite system.
    """
    before = output_error(A_held, change(W, kept))
    best: Choice | None = None
    failure: NumericalError | None = None
    for damping in sorted(grid):
        try:
            dW_k = refit(W, A_fit, kept, damping=damping)
        except NumericalError as error:
            failure = error
            continue
        after = output_error(A_held, change(W, kept, dW_k))
        if best is None or after < best.after:
            best = Choice(damping, before, after)
    if best is None:
        assert failure is not None, "the grid is empty"
        raise failure
    return best if best.after < before else Choice(None, before, before)
