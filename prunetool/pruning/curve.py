"""Loss curves: what a layer's output costs the model's log-likelihood as its units go.

To second order, changing the output of o_proj or down_proj from X W to X V costs

    ℓ(V) = ½ tr((W − V)ᵀ A' (W − V) M)   nats a token,

    A' = A/N + damping · mean(diag A/N) · I,   M = mix · G/N_g + (1 − mix) · tr(G/N_g)/D' · I,

with G = Σ_t g_t g_tᵀ, g the gradient of −log p(y) at that output and y drawn from the model itself:
G/N_g is the true Fisher information of the output, and A' ⊗ M approximates that of W (as in K-FAC).
The identity in M stands for what a few gradients do not show. With the rows p of V at zero, the
best V of the other rows does not depend on M, since M is positive definite. It leaves, C Cᵀ = M,

    ℓ_p = ½ tr(Cᵀ W_pᵀ ([A'⁻¹]_pp)⁻¹ W_p C).

Rows in an order π of removal: let A'⁻¹ = L Lᵀ, rows and columns in that order. Its leading block is
that of L times its transpose, so one factorisation gives the loss after every number k of rows:

    ℓ(k) = ½ Σ_{i≤k} ‖(L⁻¹ W_π C)_i‖².

L⁻¹ needs no inverse: A' = L⁻ᵀ L⁻¹, and L⁻ᵀ is upper triangular, so in the opposite order of rows it
is the Cholesky factor R of A', and L⁻¹ W_π C is Rᵀ W C with its rows in that order.

Blocks of rows (KV groups): with Q = A'⁻¹ and Y = Q_BB⁻¹ W_B C, removing B costs ½⟨W_B C, Y⟩ and
leaves the same problem without it, Q − Q_·B Q_BB⁻¹ Q_B· and W C − Q_·B Y.

| symbol | is | shape |
|---|---|---|
| N, N_g | tokens of the sums A and G | |
| G | Gram matrix of the gradients | (D', D') |
| M, C | metric of the outputs, and its Cholesky factor | (D', D') |

A, W: `prunetool.pruning`. Derived in FORMULAS.md §7, not from a paper.
"""

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.blas import dgemm

from prunetool.errors import NumericalError
from prunetool.pruning import gram
from prunetool.pruning.solve import damped_inverse, definite, factorise
from prunetool.pruning.structural import energy

MIX, DAMPING = 0.3, 0.01  # measured on SmolLM2-135M (FORMULAS.md §7)
# Measured loss over the sum of the layers' curves, each of which takes the others as whole: 1.4 to
# 1.6 on SmolLM2-135M from 10% to 50% removed (examples/methods.md).
INTERACTION = 1.5
MOST_SUBSETS = 256  # of KV groups, all of which are tried
# Rows that `greedy` removes at once: so many, or this part of all. Measured with 1536 rows.
BATCH, PART = 32, 48
COMPACT = 0.25  # of the rows that are gone before `greedy` leaves them out
MORE_TOKENS = "calibrate on more tokens"


class GroupCurve(NamedTuple):
    """The least loss after removing k of a layer's KV groups, k = 0 … n_kv − 1.

    Attributes:
      losses: (n_kv,), nats a token.
      removed: which groups go, (n_kv, n_kv) bool: row k has k of them.
    """

    losses: np.ndarray
    removed: np.ndarray


def metric_root(packed: np.ndarray, tokens: int, mix: float = MIX) -> np.ndarray:
    """C of M = mix · G/N_g + (1 − mix) · tr(G/N_g)/D' · I, lower triangular, (D', D').

    Args:
      packed: G, as from `gram.pack`, float64, squared nats per output unit.
      tokens: N_g.
      mix: weight of G; the rest is its mean diagonal.

    Raises:
      NumericalError: if G is zero or not finite.
    """
    G = gram.unpack_lower(packed)
    what = f"the {len(G)} x {len(G)} Gram matrix of the gradients"
    if not np.isfinite(packed).all():
        raise NumericalError(what, "contains NaN or infinity", "calibrate in another --dtype")
    mean = np.trace(G) / len(G)
    G *= mix / tokens
    G[np.diag_indices(len(G))] += (1 - mix) * mean / tokens
    with definite(what, todo=MORE_TOKENS):
        factorise(G)
    return G


def row_curve(
    packed: np.ndarray, WC: np.ndarray, order: np.ndarray, *, tokens: int, damping: float = DAMPING
) -> np.ndarray:
    """ℓ(k) for k = 0 … D, nats a token: the first k rows of ``order`` go.

    Args:
      packed: A, as from `gram.pack`, float64.
      WC: W C, (D, D').
      order: the rows, the first to go first, (D,) int.
      tokens: N.
      damping: fraction of the mean of A's diagonal.

    Raises:
      NumericalError: if A' is not positive definite.
    """
    opposite = order[::-1]
    R = gram.reordered(packed, opposite)
    R[np.diag_indices(len(R))] += damping * np.diagonal(R).mean()
    with definite(f"a {len(R)} x {len(R)} Gram matrix", todo=MORE_TOKENS):
        factorise(R)
    WC = WC[opposite]
    losses = np.empty(len(R))
    for rows in gram.blocks_of_rows(len(R)):  # R is zero above its diagonal
        losses[rows] = energy(R[rows.start :, rows].T @ WC[rows.start :])
    return np.concatenate([[0.0], np.cumsum(losses[::-1])]) / (2 * tokens)


def group_curve(
    A: np.ndarray, WC: np.ndarray, blocks: int, *, tokens: int, damping: float = DAMPING
) -> GroupCurve:
    """The best groups to remove, for each number of them.

    All subsets are compared where there are at most `MOST_SUBSETS`; else the groups go one by one,
    each time the one of least loss.

    Args:
      A: (D, D), float64; only its lower triangle is read, and A is overwritten.
      WC: W C, (D, D').
      blocks: n_kv; a group is a block of D/n_kv rows.
      tokens: N.
      damping: fraction of the mean of A's diagonal.

    Raises:
      NumericalError: if A' is not positive definite.
    """
    Q = _inverse(A, damping)
    if 2**blocks <= MOST_SUBSETS:
        losses, removed = _best_subsets(Q, WC, blocks)
    else:
        order, steps = _one_by_one(Q, WC, blocks)
        losses = np.concatenate([[0.0], np.cumsum(steps[:-1])])
        removed = np.argsort(order) < np.arange(blocks)[:, None]
    return GroupCurve(losses / (2 * tokens), removed)


def greedy(
    A: np.ndarray, WC: np.ndarray, *, damping: float, blocks: int = 0, batch: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Remove what costs least, refit all others, and again, until nothing is left.

    Rows go ``batch`` at a time, as if each went alone, which saves passes over A'⁻¹ (a heuristic);
    blocks of rows one by one.

    Args:
      A: (D, D), float64; only its lower triangle is read, and A is overwritten.
      WC: W C, or W for C = I, (D, D').
      damping: fraction of the mean of A's diagonal.
      blocks: as in `group_curve`; 0 for rows.
      batch: rows at a time; None for the default.

    Returns:
      The rows or blocks, the first to go first, and twice the loss of each at its turn times N.

    Raises:
      NumericalError: if A' is not positive definite.
    """
    Q = _inverse(A, damping)
    if blocks:
        return _one_by_one(Q, WC, blocks)
    batch = batch or max(BATCH, len(Q) // PART)
    left, gone, WC = np.arange(len(Q)), np.zeros(len(Q), bool), WC.copy()
    order, losses = [], []
    while not gone.all():
        loss = np.where(gone, np.inf, energy(WC) / np.where(gone, 1, np.diagonal(Q)))
        p = np.argsort(loss, kind="stable")[: min(batch, int((~gone).sum()))]
        order.append(left[p])
        losses.append(loss[p])
        gone[p] = True
        Q_p = Q[p]
        X, Y = _solved(Q[np.ix_(p, p)], Q_p, WC[p])
        _subtract(Q, Q_p, X)
        _subtract(WC, Q_p, Y)
        if gone.mean() > COMPACT:
            Q, WC, left = Q[np.ix_(~gone, ~gone)], WC[~gone], left[~gone]
            gone = np.zeros(len(Q), bool)
    return np.concatenate(order), np.concatenate(losses)


def _subtract(C: np.ndarray, A: np.ndarray, B: np.ndarray) -> None:
    """C −= Aᵀ B in place, without a product beside it, which would be as large as C."""
    made = dgemm(-1.0, B, A.T, 1.0, C.T, trans_a=True, trans_b=True, overwrite_c=True)
    if not np.shares_memory(made, C):
        raise AssertionError("C is not a whole float64 array by rows")


def _inverse(A: np.ndarray, damping: float) -> np.ndarray:
    return damped_inverse(A, damping, overwrite=True)


def _solved(Q_BB: np.ndarray, *right: np.ndarray) -> list[np.ndarray]:
    """Q_BB⁻¹ times each of ``right``."""
    with definite(f"a {len(Q_BB)} x {len(Q_BB)} block of the inverse of a Gram matrix"):
        factor = cho_factor(Q_BB, lower=True, check_finite=False)
    return [cho_solve(factor, each, check_finite=False) for each in right]


def _without(
    Q: np.ndarray, WC: np.ndarray, B: np.ndarray, rest: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Q and W C of the rows ``rest`` once the rows B are gone, and twice the loss of that."""
    Q_rB = Q[np.ix_(rest, B)]
    X, Y = _solved(Q[np.ix_(B, B)], Q_rB.T, WC[B])
    return Q[np.ix_(rest, rest)] - Q_rB @ X, WC[rest] - Q_rB @ Y, float(np.vdot(WC[B], Y))


def _best_subsets(Q: np.ndarray, WC: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """The least loss (twice) of removing k blocks, and which, by trying all."""
    best, removed = np.full(blocks, np.inf), np.zeros((blocks, blocks), bool)
    size = len(Q) // blocks

    def visit(Q: np.ndarray, WC: np.ndarray, gone: tuple[int, ...], loss: float) -> None:
        """Q and WC are of the blocks behind the last one gone: only they may still follow."""
        if loss < best[len(gone)]:
            best[len(gone)] = loss
            removed[len(gone)] = np.isin(np.arange(blocks), gone)
        if len(gone) == blocks - 1:
            return
        places = np.arange(len(Q)).reshape(-1, size)
        first = blocks - len(places)
        for number, B in enumerate(places):
            Q_rest, WC_rest, more = _without(Q, WC, B, places[number + 1 :].ravel())
            visit(Q_rest, WC_rest, (*gone, first + number), loss + more)

    visit(Q, WC, (), 0.0)
    return best, removed


def _one_by_one(Q: np.ndarray, WC: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks in the order of removal, and twice the loss of each at its turn."""
    size, left = len(Q) // blocks, list(range(blocks))
    order, losses = [], []
    while left:
        places = np.arange(len(Q)).reshape(-1, size)
        each = [np.vdot(WC[B], _solved(Q[np.ix_(B, B)], WC[B])[0]) for B in places]
        number = int(np.argmin(each))
        rest = np.delete(places, number, axis=0).ravel()
        Q, WC, loss = _without(Q, WC, places[number], rest)
        order.append(left.pop(number))
        losses.append(loss)
    return np.array(order), np.array(losses)
