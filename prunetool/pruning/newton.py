"""The numerical score of [NP]: the real-valued mask that moves a matrix's output least.

    min_z ½ Σ_i ‖X W_i − X(z∘W_i)‖² + ½ λ (1ᵀz − r)²  =  min_y ½ yᵀKy + ½ λ (s − 1ᵀy)²

with y = 1 − z, gradient K(z − 1) + λ(1ᵀz − r)1 and Hessian K + λ11ᵀ (eq. 6, 7). λ is relative to
an X of spectral norm 1, as in the paper. Symbols: `prunetool.pruning`.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_solve
from scipy.linalg.blas import dsymv
from scipy.sparse.linalg import LinearOperator, eigsh

from prunetool.pruning import gram
from prunetool.pruning.solve import definite, factorise

# A unit whose own contribution K_ii is this far below the median is dead: removing it costs
# nothing and keeping it would make the system singular.
DEAD_FRACTION = 1e-12
BOX_STEPS = 50  # 200 random instances needed at most 7


class Info(NamedTuple):
    """How an iteration ended."""

    steps: int
    residual: float
    converged: bool


def contribution_gram(W: np.ndarray, A: np.ndarray, norm: float = 1.0) -> np.ndarray:
    """K = (W Wᵀ) ∘ A / norm: K_ij = ⟨x_i w_iᵀ, x_j w_jᵀ⟩, x_i column i of X.

    Args:
      W: (D, D'), float64.
      A: XᵀX, (D, D), float64; only its lower triangle is read.
      norm: the spectral norm of A, to scale that of the inputs to 1.

    Returns:
      K, overwriting A, (D, D); only its lower triangle is valid.
    """
    for rows in gram.blocks_of_rows(len(A)):
        A[rows, : rows.stop] *= (W[rows] / norm) @ W[: rows.stop].T
    return A


def total(K: np.ndarray) -> float:
    """1ᵀK1 from the lower triangle of K: the output energy ‖XW‖² / norm of all units."""
    lower = (np.tril(K[rows, : rows.stop], rows.start) for rows in gram.blocks_of_rows(len(K)))
    return 2 * sum(float(panel.sum()) for panel in lower) - float(np.trace(K))


def spectral_norm(A: np.ndarray) -> float:
    """‖X‖₂², the largest eigenvalue of A = XᵀX, from its lower triangle."""
    if len(A) < 3:
        return float(np.linalg.eigvalsh(A)[-1])
    # BLAS is column-major: the lower triangle by rows is the upper one of the transpose.
    product = LinearOperator(A.shape, lambda x: dsymv(1.0, A.T, x, lower=0), dtype=A.dtype)
    return float(eigsh(product, k=1, v0=np.ones(len(A)), return_eigenvectors=False)[0])


def alive(K: np.ndarray) -> np.ndarray:
    """Which units contribute to the output at all, (D,) bool."""
    own = np.diagonal(K)
    return np.asarray(own > DEAD_FRACTION * np.median(own))


def newton(
    K: np.ndarray, s: float, *, lam: float = np.inf, damping: float = 0.0, overwrite: bool = False
) -> np.ndarray:
    """The exact minimiser in closed form, with one Cholesky factorisation.

        z = 1 − [λs / (1 + λκ)] K⁻¹1,   κ = 1ᵀK⁻¹1;   for λ = ∞: z = 1 − (s/κ) K⁻¹1

    The objective is quadratic: one Newton step from any start is the minimiser, so this equals
    Algorithm 1 of [NP] for every T ≥ 1 (`newton_iterated`). z is not confined to [0, 1], despite
    Theorem 2 of [NP]; in `newton_box` it is.

    Args:
      K: (D, D), float64; only its lower triangle is read.
      s: units to remove, ρD.
      lam: λ, may be infinite.
      damping: γ in K + γ diag(K), scale-free.
      overwrite: factorise K in place.

    Returns:
      z, (D,), float64; −∞ for a dead unit, which goes first.

    Raises:
      NumericalError: if K + γ diag(K) is not positive definite.
    """
    live = alive(K)
    # A dead unit is decoupled from the others and solves to 0, so that K needs no copy.
    work = K if overwrite else K.copy()
    work[~live] = 0
    work[:, ~live] = 0
    work[~live, ~live] = 1
    work[np.diag_indices(len(work))] *= 1 + damping
    u = _solve_in_place(work, live.astype(float))[live]
    kappa = u.sum()
    s_live = max(s - (~live).sum(), 0.0)
    c = s_live / kappa if np.isinf(lam) else lam * s_live / (1 + lam * kappa)
    z = np.full(len(K), -np.inf)
    z[live] = 1 - c * u
    return z


def newton_iterated(
    K: np.ndarray, s: float, *, lam: float, damping: float = 0.0, steps: int = 50
) -> np.ndarray:
    """Algorithm 1 of [NP] to the letter: z ← z − H⁻¹∇ from z = 1, H factorised in every step.

    Shows that the result equals `newton`; λ must be finite.
    """
    live = alive(K)
    K_live = _damped(K, live, damping)
    one = np.ones(len(K_live))
    r = len(K_live) - max(s - (~live).sum(), 0.0)
    z = one.copy()
    for _ in range(steps):
        gradient = K_live @ (z - one) + lam * (one @ z - r) * one
        z = z - _solve(K_live + lam * np.outer(one, one), gradient)
    out = np.full(len(K), -np.inf)
    out[live] = z
    return out


def newton_box(
    K: np.ndarray, s: float, *, lam: float = np.inf, damping: float = 0.0
) -> tuple[np.ndarray, np.ndarray, Info]:
    """The minimiser under 0 ≤ z ≤ 1, by a primal-dual active set.

    In y: K y − c1 = w with w ≥ 0 where y = 0, w ≤ 0 where y = 1, w = 0 between, and
    c = λ(s − 1ᵀy), or for λ = ∞ the multiplier of 1ᵀy = s.

    Returns:
      z, (D,), 0 for dead units.
      order, (D,): z, extended beyond the box by the multiplier w_i/K_ii, so that units at a bound
        are ordered too; −∞ for dead units.
      Info: residual is the largest violation of the conditions above, relative to c.

    Raises:
      NumericalError: as in `newton`.
    """
    live = alive(K)
    K_live = _damped(K, live, damping)
    D = len(K_live)
    s_live = float(np.clip(s - (~live).sum(), 0.0, D))
    lo, hi = np.zeros(D, bool), np.zeros(D, bool)
    soft = 0.0 if np.isinf(lam) else 1 / lam
    y, w, c = np.zeros(D), np.zeros(D), 0.0
    converged, step = False, 0
    while not converged and step < BOX_STEPS:
        step += 1
        free = ~(lo | hi)
        pull = K_live[np.ix_(free, hi)].sum(axis=1)
        right = np.stack([np.ones(free.sum()), -pull], axis=1)
        u, v = (_solve(K_live[np.ix_(free, free)], right) if free.any() else right).T
        room = u.sum() + soft
        c = (s_live - hi.sum() - v.sum()) / room if room > 0 else 0.0
        y = hi.astype(float)
        y[free] = c * u + v
        w = K_live @ y - c
        new_lo = (lo & (w > 0)) | (free & (y < 0))
        new_hi = (hi & (w < 0)) | (free & (y > 1))
        converged = bool((new_lo == lo).all() and (new_hi == hi).all())
        lo, hi = new_lo, new_hi
    free = ~(lo | hi)
    violation = np.where(lo, -w, np.where(hi, w, np.abs(w))).clip(min=0).max(initial=0.0)
    scale = abs(c) or 1.0
    z, order = np.zeros(len(K)), np.full(len(K), -np.inf)
    z[live] = 1 - y.clip(0, 1)
    order[live] = z[live] + np.where(free, 0.0, w / np.diagonal(K_live))
    return z, order, Info(step, float(violation / scale), converged)


def tie(K: np.ndarray, blocks: int) -> np.ndarray:
    """K_g[B, B'] = Σ_{i∈B, j∈B'} K_ij, (blocks, blocks): one mask value per block."""
    size = len(K) // blocks
    return np.asarray(K.reshape(blocks, size, blocks, size).sum(axis=(1, 3)))


def _damped(K: np.ndarray, live: np.ndarray, damping: float) -> np.ndarray:
    """K + γ diag(K) of the live units, a new array."""
    out = K[np.ix_(live, live)]
    out[np.diag_indices(len(out))] *= 1 + damping
    return np.asarray(out)


def _solve(K: np.ndarray, right: np.ndarray) -> np.ndarray:
    """K⁻¹ right by Cholesky, scaled to a unit diagonal first (Jacobi)."""
    return _solve_in_place(K.copy(), right)


def _solve_in_place(K: np.ndarray, right: np.ndarray) -> np.ndarray:
    """As `_solve`, but reads only K's lower triangle and overwrites it with the factor."""
    scale = 1 / np.sqrt(np.diagonal(K))
    for rows in gram.blocks_of_rows(len(K)):
        K[rows, : rows.stop] *= scale[: rows.stop]
        K[rows, : rows.stop] *= scale[rows, None]
    with definite(f"a {len(K)} x {len(K)} system"):
        factor = factorise(K)
    scaled = (right.T * scale).T
    return np.asarray((cho_solve(factor, scaled, check_finite=False).T * scale).T)
