"""Scores of single weights, and masks cut from them at an exact sparsity.

Here W is a matrix as stored in a checkpoint, output = X Wᵀ, so that a row makes one output:

| symbol | is | shape |
|---|---|---|
| W | weight | (D', D) |
| A | Gram matrix XᵀX of its inputs | (D, D) |
| N | tokens of that sum | |
| g² | mean squared gradient of −log p(y) at each output, y drawn from the model | (D',) |

To second order, removing w_ij and refitting its row costs the model ½ g²_i w_ij² / (N [A'⁻¹]_jj)
nats a token, A' = A + damping · mean(diag A) · I: the saliency of OBS (Hassibi & Stork, 1993) with
the curvature diag(g²) ⊗ A'/N, of K-FAC's form (Martens & Grosse, arXiv 1503.05671).
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from scipy.linalg import cholesky

from prunetool.errors import NumericalError
from prunetool.pruning import gram
from prunetool.pruning.solve import damped_inverse, definite

COLUMN_BLOCK = 128  # inputs that SparseGPT masks at a time, as in its paper
# Bins of `histogram`: the first 16 bits of a float32 that is not negative, up to infinity.
BINS = 0x7F80 + 1


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


def chosen_by_fisher(
    W: np.ndarray, A: np.ndarray, g2: np.ndarray, *, sparsity: float, pattern: str, damping: float
) -> np.ndarray:
    """The mask that `sparsegpt` chooses if an error counts by the loss's curvature at its output.

    Args:
      W, A, sparsity, pattern, damping: as in `sparsegpt`.
      g2: (D',).
    """
    chosen = sparsegpt(W, A, damping=damping, sparsity=sparsity, pattern=pattern, outputs=g2)
    return chosen[0]


def inverse_diagonal(A: np.ndarray, damping: float) -> np.ndarray:
    """The diagonal of A'⁻¹, (D,), infinite for an input that is always zero; overwrites A.

    Args:
      A: (D, D), float64.
      damping: fraction of the mean of A's diagonal.

    Raises:
      NumericalError: if A' is not positive definite.
    """
    dead = _revive(A)
    own = np.diagonal(damped_inverse(A, damping, overwrite=True)).copy()
    own[dead] = np.inf
    return own


def histogram(W: np.ndarray, own: np.ndarray, g2: np.ndarray, tokens: int) -> np.ndarray:
    """How many weights have a loss in each bin, (BINS,), uint32.

    The bins are floating-point numbers cut after 7 bits of the mantissa, so 0.4 to 0.8% wide.

    Args:
      W: (D', D).
      own: diag A'⁻¹, (D,).
      g2: (D',).
      tokens: N.

    Raises:
      NumericalError: if a loss is NaN.
    """
    counts = np.zeros(BINS, np.int64)
    for rows in gram.blocks_of_rows(len(W)):
        loss = W[rows].astype(np.float64) ** 2 * g2[rows, None] / (2 * tokens * own)
        if np.isnan(loss).any():
            raise NumericalError(
                "the loss of its weights", "contains NaN", "check the model and the calibration"
            )
        bins = loss.astype(np.float32).view(np.uint32) >> 16
        counts += np.bincount(bins.ravel(), minlength=BINS)
    return counts.astype(np.uint32)


def sparsegpt(
    W: np.ndarray,
    A: np.ndarray,
    *,
    damping: float,
    sparsity: float = 0.0,
    pattern: str = "unstructured",
    mask: np.ndarray | None = None,
    outputs: np.ndarray | None = None,
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
      outputs: factor on the loss of each row, (D',): scores are then losses. It cancels in 2:4,
        where two weights are chosen by their loss together. None: as published.

    Returns:
      The mask, (D', D) bool, and the weights on it, float64.

    Raises:
      NumericalError: if A' is not positive definite.

    Source: Frantar & Alistarh, SparseGPT, arXiv 2301.00774, Algorithm 1.
    """
    V = W.T.astype(np.float64, order="C")  # (D, D'): the sweep takes its rows one by one
    A = A.copy()
    V[_revive(A)] = 0.0
    inverse = damped_inverse(A, damping, overwrite=True)
    with definite(f"a {len(A)} x {len(A)} Gram matrix"):
        U = cholesky(inverse, lower=False, overwrite_a=True, check_finite=False)
    kept = np.ones(V.shape, bool) if mask is None else mask.T.copy()
    own = np.diagonal(U)[:, None]
    by_row = np.ones(len(W)) if outputs is None else np.sqrt(outputs)
    D = len(V)
    for start in range(0, D, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, D)
        block = slice(start, stop)
        if mask is None and pattern != "2:4":
            score = (by_row * V[block] / own[block]).T
            kept[block] = _cut(score, start, sparsity, pattern, D).T
        errors = np.empty((stop - start, len(W)))
        for j in range(start, stop):
            if mask is None and pattern == "2:4" and j % 4 == 0:
                four = slice(j, j + 4)
                if outputs is None:
                    kept[four] = keep(np.abs(V[four] / own[four]).T, 0.5, pattern).T
                else:
                    kept[four] = _cheapest_pair(V[four], U[four, four])
            gone = np.where(kept[j], 0.0, V[j]) / own[j]
            V[j:stop] -= np.outer(U[j, j:stop], gone)
            errors[j - start] = gone
        V[stop:] -= U[block, stop:].T @ errors
    return np.ascontiguousarray(kept.T), np.ascontiguousarray(np.where(kept, V, 0.0).T)


def _revive(A: np.ndarray) -> np.ndarray:
    """Inputs that are always zero, (D,) bool: their weights have no effect. A_jj becomes 1."""
    dead = np.diagonal(A) <= 0
    A[dead, dead] = 1.0
    return dead


def _cheapest_pair(V: np.ndarray, U: np.ndarray) -> np.ndarray:
    """Which two of four weights stay if the two go whose removal, one by one, costs least.

    The loss of a pair a < b is (v_a/U_aa)² + (v_b − v_a U_ab/U_aa)²/U_bb²: the second is as the
    first's removal leaves it.

    Args:
      V: four columns of W as they are at this point of the sweep, (4, D').
      U: their block of U, (4, 4).

    Returns:
      (4, D') bool.
    """
    pairs = list(combinations(range(4), 2))
    first = V / np.diagonal(U)[:, None]
    losses = [first[a] ** 2 + ((V[b] - first[a] * U[a, b]) / U[b, b]) ** 2 for a, b in pairs]
    kept = np.array([~np.isin(range(4), pair) for pair in pairs])  # (6, 4)
    return np.asarray(kept[np.argmin(losses, axis=0)].T)


def _cut(score: np.ndarray, start: int, sparsity: float, pattern: str, width: int) -> np.ndarray:
    """The mask of a block of columns, such that all blocks together meet the exact count."""
    rows = len(score) if pattern == "unstructured" else 1

    def lost_before(column: int) -> int:
        whole = round(sparsity * rows * width)
        return round(whole * column / width)

    lost = lost_before(start + score.shape[1]) - lost_before(start)
    return keep(np.abs(score), lost / (rows * score.shape[1]), pattern)
