"""Refit of the rows that stay, in closed form ([NP] eq. 11, in the kept rows).

The paper's δW = −(2A)⁻¹M_p(M_pᵀ(2A)⁻¹M_p)⁻¹M_pᵀW needs the inverse of all of A; solving for the
kept rows agrees to 4e-14, is stable, and costs a third. Symbols: `prunetool.pruning`; k
marks the rows that stay and p those that go.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_solve

from prunetool.errors import NumericalError
from prunetool.pruning import gram
from prunetool.pruning.gram import Partition
from prunetool.pruning.solve import definite, factorise

# In wider models a sample of outputs chooses the damping: each trial costs D² per output.
CHOICE_OUTPUTS = 1024


class Refit:
    """Refit of the kept rows of W so that the output moves least when the others go.

    With the pruned rows at zero, the error over tokens of Gram matrix A is a quadratic in δW_k:

        e(δW_k) = ‖X(W + δW) − XW‖²
                = tr(W_pᵀ A_pp W_p) − 2⟨δW_k, A_kp W_p⟩ + tr(δW_kᵀ A_kk δW_k)

    Args:
      A: Gram matrix XᵀX, float64, squared activation units.
      W_p: rows of the weight that go, (p, D'), float64, output = X W.
    """

    def __init__(self, A: Partition, W_p: np.ndarray) -> None:
        self._A = A
        self._W_p = W_p
        self._B = A.kp @ W_p  # (k, D')

    def solve(self, damping: float) -> np.ndarray:
        """The minimiser of e, damped.

            δW_k = A'_kk⁻¹ A_kp W_p,   A' = A + damping · mean(diag A) · I

        The damping pulls towards W_k, not towards 0.

        Args:
          damping: fraction of the mean of A's diagonal.

        Returns:
          δW_k, (k, D').

        Raises:
          NumericalError: if A'_kk is not positive definite.
        """
        return _solve(self._A.kk, self._B, damping * _mean_diagonal(self._A))

    @cached_property
    def removed(self) -> float:
        """e(0), the error of plain removal."""
        return output_energy(self._A.pp, self._W_p)

    def error(self, dW_k: np.ndarray) -> float:
        """e(δW_k)."""
        pull = self._A.kk @ dW_k
        pull -= 2 * self._B
        return self.removed + float(np.vdot(dW_k, pull))


def _mean_diagonal(A: Partition) -> float:
    return float((np.trace(A.kk) + np.trace(A.pp)) / (len(A.kk) + len(A.pp)))


def _solve(A_kk: np.ndarray, B: np.ndarray, ridge: float) -> np.ndarray:
    """(A_kk + ridge · I)⁻¹ B, (k, D').

    The factor overwrites A_kk's lower triangle, which is restored from the upper one.
    """
    diagonal = np.diag_indices(len(A_kk))
    own = A_kk[diagonal]
    A_kk[diagonal] += ridge
    try:
        with definite(f"the Gram matrix of {len(A_kk)} kept rows", f"at ridge {ridge:.1e}"):
            factor = factorise(A_kk)
        return np.asarray(cho_solve(factor, B, check_finite=False))
    finally:
        gram.mirror(A_kk, upper=True)
        A_kk[diagonal] = own


def output_energy(A: np.ndarray, W: np.ndarray) -> float:
    """‖X W‖² = tr(Wᵀ A W), squared output units summed over tokens."""
    return float(np.vdot(W, A @ W))


def energy_of_both(A: Partition, W_k: np.ndarray, W_p: np.ndarray) -> float:
    """`output_energy` of kept and pruned rows together."""
    both = 2 * float(np.vdot(W_k, A.kp @ W_p))
    return output_energy(A.kk, W_k) + both + output_energy(A.pp, W_p)


def outputs_to_choose_by(count: int) -> np.ndarray:
    """Evenly spaced numbers of outputs, at most `CHOICE_OUTPUTS`."""
    some = min(count, CHOICE_OUTPUTS)
    return np.unique(np.linspace(0, count - 1, some).round().astype(int))


def centred(
    A: Partition, total: np.ndarray, tokens: int, about: np.ndarray, kept: np.ndarray
) -> Partition:
    """Σ (x − m)(x − m)ᵀ from A = Σ x xᵀ and total = Σ x, for any m = ``about``.

    Args:
      A: partitioned by ``kept``, (D,) bool.
      total, about: (D,).
      tokens: number of x.
    """

    def block(M: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        moved = tokens * about[columns] - total[columns]
        return M + np.outer(about[rows], moved) - np.outer(total[rows], about[columns])

    return Partition(block(A.kk, kept, kept), block(A.kp, kept, ~kept), block(A.pp, ~kept, ~kept))


class Choice(NamedTuple):
    """The damping that served unseen tokens best.

    Attributes:
      damping: the best of the grid; None if no refit beat plain removal.
      before, after: output error on the held-out tokens, after plain removal and after the refit.
    """

    damping: float | None
    before: float
    after: float


def choose_damping(
    fit: Partition, held: Partition, W_p: np.ndarray, grid: tuple[float, ...]
) -> Choice:
    """Refit on one part of the tokens with the dampings of the grid, and measure on another.

    Too little damping with too few tokens fits their noise and is worse than no refit at all. The
    grid is tried from the largest damping down, until the held-out error rises (a heuristic: only
    one minimum has been observed).

    Args:
      fit, held: Gram matrices of the two parts.
      W_p: as in `Refit`.
      grid: dampings.

    Raises:
      NumericalError: if no damping of the grid gives a positive definite system.
    """
    refit, unseen = Refit(fit, W_p), Refit(held, W_p)
    best = Choice(None, unseen.removed, unseen.removed)
    for damping in sorted(grid, reverse=True):
        try:
            after = unseen.error(refit.solve(damping))
        except NumericalError:
            if damping == max(grid):
                raise
            break
        if best.damping is not None and after >= best.after:
            break
        if after < best.after:
            best = Choice(damping, unseen.removed, after)
    return best
