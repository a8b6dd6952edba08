"""Scores of single weights, and masks cut from them at an exact sparsity.

Here W is a matrix as stored in a checkpoint, output = X Wᵀ, so that a row makes one output:

| symbol | is | shape |
|---|---|---|
| W | weight | (D', D) |
| A | Gram matrix XᵀX of its inputs | (D, D) |
"""

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cholesky

from prunetool.errors import NumericalError
from prunetool.pruning.solve import damped_inverse, definite

COLUMN_BLOCK = 128  # inputs that SparseGPT masks at a time, as in its paper


def keep(score: np.ndarray, sparsity: float, pattern: str = "unstructured") -> np.ndarray:
    """Cut a score to a mask that keeps exactly the largest; ties go to the first.

    Args:
      score: (D', D).
      sparsity: fraction to remove, of the matrix or of each row; 2:4 always removes half.
      pattern: unstructured: over the whole matrix. per-output: the same count in each row. 2:4: two
        of every four neighbours along the input.

    Returns:
      (D', D) bool.

    Raises:
      NumericalError: if a score is NaN.
      ValueError: if the inputs are not a multiple of 4 for 2:4.
    """
    if np.isnan(score).any():
        raise NumericalError("the score", "contains NaN", "check the model and the calibration")
    if pattern == "unstructured":
        rows = score.reshape(1, -1)
    elif pattern == "2:4":
        if score.shape[1] % 4:
            raise ValueError(f"2:4 needs a multiple of 4 inputs, not {score.shape[1]}")
        rows, sparsity = score.reshape(-1, 4), 0.5
    else:
        rows = score
    width = rows.shape[1]
    lost = round(sparsity * width)
    if lost == 0 or lost == width:
        return np.full(score.shape, lost == 0)
    threshold = np.partition(rows, lost, axis=1)[:, lost, None]
    above, tied = rows > threshold, rows == threshold
    room = width - lost - above.sum(axis=1, keepdims=True)
    return np.asarray(above | (tied & (np.cumsum(tied, axis=1) <= room))).reshape(score.shape)


def magnitude(W: np.ndarray, A: np.ndarray | None = None) -> np.ndarray:
    """|W_ij|, (D', D)."""
    return np.asarray(np.abs(W))


def random(W: np.ndarray, A: np.ndarray | None = None, *, seed: Sequence[int]) -> np.ndarray:
    """Uniform numbers, (D', D)."""
    return np.random.default_rng(seed).random(W.shape)


def wanda(W: np.ndarray, A: np.ndarray) -> np.ndarray:
    """|W_ij| ‖X_j‖, (D', D) (Sun et al., arXiv 2306.11695, eq. 1)."""
    return np.asarray(np.abs(W) * np.sqrt(np.diagonal(A)))


def chosen_by_sparsegpt(
    W: np.ndarray, A: np.ndarray, *, sparsity: float, pattern: str, damping: float
) -> np.ndarray:
    """The mask that `sparsegpt` chooses, (D', D) bool."""
    return sparsegpt(W, A, damping=damping, sparsity=sparsity, pattern=pattern)[0]


def sparsegpt(
    W: np.ndarray,
    A: np.ndarray,
    *,
    damping: float,
    sparsity: float = 0.0,
    pattern: str = "unstructured",
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Remove weights column by column, compensating each removal in the columns to its right.

    With U the upper Cholesky factor of A'⁻¹ = (A + damping·mean(diag A)·I)⁻¹, a weight's score is
    w²/U_jj², and the removal of w_ij moves the rest of its row by −(w_ij/U_jj) U_j,j:.

    Args:
      W: (D', D).
      A: (D, D), float64.
      damping: fraction of the mean of A's diagonal.
      sparsity, pattern: as in `keep`; unstructured is cut in blocks of `COLUMN_BLOCK` inputs, after
        their update, to the exact total count.
      mask: use this mask instead of choosing one.

    Returns:
      The mask, (D', D) bool, and the weights on it, float64.

    Raises:
      NumericalError: if A' is not positive definite.

    Source: Frantar & Alistarh, SparseGPT, arXiv 2301.00774, Algorithm 1.
    """
    W = W.astype(np.float64)
    A = A.copy()
    dead = np.diagonal(A) <= 0
    A[dead, dead] = 1.0  # an input that is always zero: its weights have no effect
    W[:, dead] = 0.0
    inverse = damped_inverse(A, damping, overwrite=True)
    with definite(f"a {len(A)} x {len(A)} Gram matrix"):
        U = cholesky(inverse, lower=False, overwrite_a=True, check_finite=False)
    kept = np.ones(W.shape, bool) if mask is None else mask.copy()
    own = np.diagonal(U)
    D = W.shape[1]
    for start in range(0, D, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, D)
        block = slice(start, stop)
        if mask is None and pattern != "2:4":
            kept[:, block] = _cut(W[:, block] / own[block], start, sparsity, pattern, D)
        errors = np.empty((len(W), stop - start))
        for j in range(start, stop):
            if mask is None and pattern == "2:4" and j % 4 == 0:
                four = slice(j, j + 4)
                kept[:, four] = keep(np.abs(W[:, four] / own[four]), 0.5, pattern)
            gone = np.where(kept[:, j], 0.0, W[:, j]) / own[j]
            W[:, j:stop] -= np.outer(gone, U[j, j:stop])
            errors[:, j - start] = gone
        W[:, stop:] -= errors @ U[block, stop:]
    return kept, np.where(kept, W, 0.0)


def _cut(score: np.ndarray, start: int, sparsity: float, pattern: str, width: int) -> np.ndarray:
    """The mask of a block of columns, such that all blocks together meet the exact count."""
    rows = len(score) if pattern == "unstructured" else 1

    def lost_before(column: int) -> int:
        whole = round(sparsity * rows * width)
        return round(whole * column / width)

    lost = lost_before(start + score.shape[1]) - lost_before(start)
    return keep(np.abs(score), lost / (rows * score.shape[1]), pattern)
