"""Methods that rank a layer's units: KV groups by their rows of o_proj, channels by down_proj's.

Each takes the `Evidence` of one of the two matrices, and the options of its row in
`prunetool.methods`. Symbols: `prunetool.pruning`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from prunetool.pruning import curve, gram, structural
from prunetool.pruning import newton as numerical


class Evidence(NamedTuple):
    """The data on a matrix whose inputs the units produce.

    Attributes:
      W: (D, D'), float64.
      A: Gram matrix of the inputs, (D, D), float64; only the lower triangle is valid. A method
        may overwrite it.
      second: E[x_i²], (D,), all tokens weighted equally.
      mean: E[x_i], (D,).
      blocks: KV groups, each a block of rows of W; 0 if each row is a unit.
      weighted: output energy of each unit alone, with weighted tokens; None without --weighting.
      place: layer, and whether units are blocks; with the seed, determines random scores.
      root: C of the outputs' metric C Cᵀ (`curve`), (D', D'); None if all directions count equally.
      slopes: the layer's sums over w and the loss's slope g by name (`stats.WEIGHT_SUMS`), for a
        method with ``needs_slopes``.
    """

    W: np.ndarray
    A: np.ndarray
    second: np.ndarray
    mean: np.ndarray
    blocks: int
    weighted: np.ndarray | None
    place: Sequence[int]
    root: np.ndarray | None = None
    slopes: Callable[[str], np.ndarray] | None = None

    def by_unit(self, rows: np.ndarray, merge: Callable[..., np.ndarray] = np.sum) -> np.ndarray:
        """Turn scores of rows into scores of units: the sum over a block, or another ``merge``."""
        return merge(rows.reshape(self.blocks, -1), axis=1) if self.blocks else rows


class Ranking(NamedTuple):
    """Scores of the units; the lowest go first.

    Attributes:
      scores: one per unit.
      energy: ‖XW‖² of all units together, from a method with ``sums_energy``.
      warning: what to tell the user.
    """

    scores: np.ndarray
    energy: float | None = None
    warning: str = ""


def magnitude(of: Evidence) -> Ranking:
    """‖w_i‖², summed over a block."""
    return Ranking(of.by_unit(structural.energy(of.W)))


def wanda_sp(of: Evidence) -> Ranking:
    """The output energy of each unit alone, with weighted tokens if available."""
    if of.weighted is not None:
        return Ranking(of.weighted)
    return Ranking(of.by_unit(structural.wanda(of.W, of.second)))


def flap(of: Evidence) -> Ranking:
    """`structural.flap`, averaged over a block; tokens count equally, even with --weighting."""
    return Ranking(of.by_unit(structural.flap(of.W, of.second, of.mean), np.mean))


# The matrices of which a unit has rows or columns, the first the root; by whether units are blocks.
MEMBERS = {True: ("q", "k", "v", "o"), False: ("gate", "up", "down")}
MERGED: dict[str, Callable[..., np.ndarray]] = {
    "sum": np.sum,
    "mean": np.mean,
    "max": np.max,
    "prod": np.prod,
    "first": lambda members, axis: members[0],
}


def taylor(of: Evidence, *, taylor: str, reduce: str) -> Ranking:
    """LLM-Pruner's importance (arXiv 2305.11627): what the loss's Taylor series says of a unit.

    First within each matrix, `stats.WEIGHT_SUMS`, for every index of a head or channel; then over
    the matrices, index by index; then over a head's indices. The query heads of a KV group, which
    are neighbours, are added up first; LLM-Pruner's own code adds those n_kv apart.

    Args:
      of: the evidence.
      taylor: which of the sums.
      reduce: how the matrices are merged.
    """
    assert of.slopes is not None
    members = [of.slopes(f"{matrix}.{taylor}") for matrix in MEMBERS[of.blocks > 0]]
    if of.blocks:
        groups = min(map(len, members))
        members = [
            rows.reshape(of.blocks, -1, groups // of.blocks).sum(axis=1).ravel() for rows in members
        ]
    return Ranking(of.by_unit(MERGED[reduce](members, axis=0)))


def random(of: Evidence, *, seed: int) -> Ranking:
    """Uniform numbers."""
    generator = np.random.default_rng([seed, *map(int, of.place)])
    return Ranking(generator.random(of.blocks or len(of.W)))


def obs(of: Evidence, *, damping: float) -> Ranking:
    """`structural.obs`."""
    return Ranking(structural.obs(of.W, of.A, damping=damping, blocks=of.blocks))


def greedy(of: Evidence, *, damping: float) -> Ranking:
    """`curve.greedy`: the cheapest unit, or batch of rows, goes and the others are refitted, again.

    A later unit may cost less at its turn than one before it. To keep the order, the i-th to go
    scores the i-th smallest of the losses.
    """
    WC = of.W if of.root is None else of.W @ of.root
    order, losses = curve.greedy(of.A, WC, damping=damping, blocks=of.blocks)
    scores = np.empty(len(order))
    scores[order] = np.sort(losses)
    return Ranking(scores)


def newton(
    of: Evidence, *, sparsity: float, lam: float, damping: float, newton_iterations: int | None
) -> Ranking:
    """The paper's numerical score of rows, averaged over a block (`newton.newton`)."""
    K, energy = _contributions(of)
    s = sparsity * len(K)
    if newton_iterations:
        z = numerical.newton_iterated(
            gram.mirror(K), s, lam=lam, damping=damping, steps=newton_iterations
        )
    else:
        z = numerical.newton(K, s, lam=lam, damping=damping, overwrite=True)
    return Ranking(_means(of, z), energy)


def newton_box(of: Evidence, *, sparsity: float, lam: float, damping: float) -> Ranking:
    """As `newton`, with every z in [0, 1] (`newton.newton_box`)."""
    K, energy = _contributions(of)
    z, warning = _in_box(gram.mirror(K), sparsity * len(K), lam, damping)
    return Ranking(_means(of, z), energy, warning)


def newton_tied(of: Evidence, *, sparsity: float, lam: float, damping: float) -> Ranking:
    """As `newton`, with one z for all rows of a block."""
    K, energy = _contributions(of)
    K = gram.mirror(K)
    if of.blocks:
        K = numerical.tie(K, of.blocks)
    z, warning = _in_box(K, sparsity * len(K), lam, damping)
    return Ranking(z, energy, warning)


def _contributions(of: Evidence) -> tuple[np.ndarray, float]:
    """K for inputs of spectral norm 1, overwriting A, and the output energy."""
    norm = numerical.spectral_norm(of.A)
    K = numerical.contribution_gram(of.W, of.A, norm)
    return K, norm * numerical.total(K)


def _in_box(K: np.ndarray, s: float, lam: float, damping: float) -> tuple[np.ndarray, str]:
    _, scores, info = numerical.newton_box(K, s, lam=lam, damping=damping)
    if info.converged:
        return scores, ""
    return scores, (
        f"the box solve stopped after {info.steps} steps at residual {info.residual:.1e}; the "
        "order is that of its last step; raise --damping"
    )


def _means(of: Evidence, z: np.ndarray) -> np.ndarray:
    """The mean over the live rows of each block; −∞ if there are none."""
    if not of.blocks:
        return z
    by_group = z.reshape(of.blocks, -1)
    live = np.isfinite(by_group)
    means = np.where(live, by_group, 0).sum(axis=1) / np.maximum(live.sum(axis=1), 1)
    return np.where(live.any(axis=1), means, -np.inf)
