"""Refit of the rows that stay, in closed form ([NP] eq. 11, in the kept rows).

The paper's δW = −(2A)⁻¹M_p(M_pᵀ(2A)⁻¹M_p)⁻¹M_pᵀW needs the inverse of all of A; solving for the
kept rows gives the same to 4e-14, is stable, and costs a third. Symbols: `prunetool.pruning`.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from prunetool.errors import NumericalError
from prunetool.pruning.solve import definite


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
    B = A[np.ix_(kept, ~kept)] @ W[~kept]  # (k, D')
    return _solve(A[np.ix_(kept, kept)], B, damping * np.diagonal(A).mean())


def _solve(A_kk: np.ndarray, B: np.ndarray, ridge: float) -> np.ndarray:
    """(A_kk + ridge · I)⁻¹ B, (k, D')."""
    damped = np.array(A_kk, order="F")
    damped[np.diag_indices(len(damped))] += ridge
    with definite(f"the Gram matrix of {len(A_kk)} kept rows", f"at ridge {ridge:.1e}"):
        factor = cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)
    return np.asarray(cho_solve(factor, B, check_finite=False))


def output_energy(A: np.ndarray, W: np.ndarray) -> float:
    """‖X W‖² = tr(Wᵀ A W), squared output units summed over tokens."""
    return float(np.vdot(W, A @ W))


class OutputError:
    """‖X ΔW‖² over tokens of Gram matrix A, as a quadratic in δW_k when the others go.

        e(δW_k) = tr(W_pᵀ A_pp W_p) − 2⟨δW_k, A_kp W_p⟩ + tr(δW_kᵀ A_kk δW_k)

    Args:
      W, A, kept: as for `refit`.

    Attributes:
      removed: e(0), the error of plain removal.
    """

    def __init__(self, W: np.ndarray, A: np.ndarray, kept: np.ndarray) -> None:
        W_p = W[~kept]
        self.A_kk = A[np.ix_(kept, kept)]
        self.B = A[np.ix_(kept, ~kept)] @ W_p  # (k, D')
        self.removed = output_energy(A[np.ix_(~kept, ~kept)], W_p)

    def __call__(self, dW_k: np.ndarray) -> float:
        """e(δW_k)."""
        pull = self.A_kk @ dW_k - 2 * self.B
        return self.removed + float(np.vdot(dW_k, pull))


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
    """Refit on one part of the tokens at dampings of the grid, and measure on another.

    Too little damping with too few tokens refits their noise and is worse than no refit at all.
    The grid is gone through from the largest damping down, until the held-out error rises (a
    heuristic: the error has been seen to have one minimum).

    Raises:
      NumericalError: where no damping of the grid gives a positive definite system.
    """
    fit, held = OutputError(W, A_fit, kept), OutputError(W, A_held, kept)
    scale = np.diagonal(A_fit).mean()
    best = Choice(None, held.removed, held.removed)
    for damping in sorted(grid, reverse=True):
        try:
            after = held(_solve(fit.A_kk, fit.B, damping * scale))
        except NumericalError:
            if damping == max(grid):
                raise
            break
        if best.damping is not None and after >= best.after:
            break
        if after < best.after:
            best = Choice(damping, held.removed, after)
    return best
