"""Other scores for rows of W, and for blocks of rows, from the same statistics.

A score is what removing the unit loses: the lowest go first. Symbols: `prunetool.pruning`; B is a
block of contiguous rows (a KV group's rows of o_proj), w_i row i of W, n_B the number of blocks.
"""

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from prunetool.pruning.solve import damped_inverse, definite


def energy(W: np.ndarray) -> np.ndarray:
    """‖w_i‖² of each row, (D,)."""
    return np.asarray(np.square(W).sum(axis=1))


def wanda(W: np.ndarray, second_moment: np.ndarray) -> np.ndarray:
    """‖w_i‖² E[x_i²], (D,): the output energy of each row alone (structured Wanda, 2306.11695).

    Args:
      W: (D, D').
      second_moment: A_ii / N, or the token-weighted one, (D,).
    """
    return np.asarray(energy(W) * second_moment)


def flap(W: np.ndarray, second_moment: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """‖w_i‖² Var(x_i), standardised within the layer, (D,) (FLAP's WIFV, arXiv 2312.11983)."""
    score = energy(W) * np.clip(second_moment - np.square(mean), 0, None)
    return standardise(score)


def standardise(score: np.ndarray) -> np.ndarray:
    """Zero mean and unit deviation; all zero if there is no spread."""
    spread = score.std(ddof=1) if score.size > 1 else 0.0
    return np.asarray((score - score.mean()) / spread if spread > 0 else np.zeros_like(score))


def block_energy(W: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Σ_{i,j∈B} (W Wᵀ)_ij A_ij = ‖X_B W_B‖² of each block, (n_B,).

    Args:
      W: (D, D').
      blocks: the diagonal blocks of A, weighted or not, (n_B, D/n_B, D/n_B).
    """
    W_B = W.reshape(len(blocks), -1, W.shape[1])
    return np.asarray(np.einsum("bio,bij,bjo->b", W_B, blocks, W_B, optimize=True))


def obs(W: np.ndarray, A: np.ndarray, *, damping: float, blocks: int = 0) -> np.ndarray:
    """The loss from removing one row or block, after the best refit of all others.

        row:   ‖w_i‖² / [A'⁻¹]_ii          block:   tr(W_Bᵀ ([A'⁻¹]_BB)⁻¹ W_B)

    with A' = A + damping · mean(diag A) · I (Hassibi & Stork's OBS for a whole row).

    Args:
      W: (D, D').
      A: (D, D), float64.
      damping: fraction of the mean of A's diagonal.
      blocks: how many blocks to score; 0 scores the rows.

    Returns:
      (D,) or (n_B,), in A's squared output units.

    Raises:
      NumericalError: if A' is not positive definite.
    """
    inverse = damped_inverse(A, damping)
    if not blocks:
        return np.asarray(energy(W) / np.diagonal(inverse))
    size = len(A) // blocks
    losses = np.empty(blocks)
    for block in range(blocks):
        rows = slice(block * size, (block + 1) * size)
        with definite(f"a {len(A)} x {len(A)} Gram matrix"):
            inner = cho_factor(inverse[rows, rows], lower=True, check_finite=False)
        losses[block] = np.vdot(W[rows], cho_solve(inner, W[rows], check_finite=False))
    return losses
