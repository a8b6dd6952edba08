"""How many KV groups and channels each layer loses to meet the requested sparsity.

[NP]'s α = 4d/3, a head's parameters counted in MLP channels, is taken as a weight in a quantile,
not a factor on its score: then any sparsity is met exactly (as a factor it would never remove a
head). With grouped-query attention a unit is a KV group with its query heads.
"""

from collections.abc import Sequence
from heapq import heapify, heapreplace
from itertools import product
from typing import NamedTuple

import numpy as np

from prunetool.errors import ConfigError

MOST = 0.8  # of a matrix that `allocate_weights` removes; measured on SmolLM2-135M


class Limits(NamedTuple):
    """The least a layer may keep of its channels.

    Attributes:
      multiple_of: a pruned layer keeps a multiple of this many channels.
      min_channels: it keeps at least this many.
    """

    multiple_of: int
    min_channels: int

    def fewest(self, channels: int) -> int:
        """Fewest channels that a layer with ``channels`` may keep."""
        least = -(-max(self.min_channels, 1) // self.multiple_of) * self.multiple_of
        return min(least, channels)

    def nearest(self, ideal: float, channels: int) -> int:
        """The multiple nearest to ``ideal``, or all ``channels`` if they are nearer."""
        kept = min(round(ideal / self.multiple_of) * self.multiple_of, channels)
        return channels if channels - ideal < abs(ideal - kept) else kept

    def removable(self, channels: int) -> np.ndarray:
        """All numbers of channels that a layer with ``channels`` may lose, ascending, int."""
        kept = np.arange(self.fewest(channels), channels, self.multiple_of)
        return np.concatenate([[0], channels - kept[::-1]])


class Counts(NamedTuple):
    """Units removed from each layer, (L,) int each."""

    groups: np.ndarray
    channels: np.ndarray


def allocate_global(
    group_scores: Sequence[np.ndarray],
    channel_scores: Sequence[np.ndarray],
    group_costs: Sequence[int],
    channel_cost: int,
    target: int,
    limits: Limits,
) -> Counts:
    """One weighted quantile over all units of all layers: the lowest scores go first.

    Takes units while their cost fits; one that would overshoot is skipped, and channels fill the
    rest. Then each layer's channels are rounded to the grid of ``limits``, by largest remainder, so
    that the total does not change. No layer loses its last KV group.

    Args:
      group_scores, channel_scores: for each layer, (n_kv,) and (I,); empty if not to be pruned.
      group_costs: parameters of a KV group, per layer.
      channel_cost: parameters of a channel.
      target: parameters to remove.
      limits: the grid.

    Raises:
      ConfigError: if the units cannot reach the target.
    """
    layers = len(group_scores)
    fewest = [limits.fewest(len(scores)) for scores in channel_scores]
    most_groups = np.array([max(len(scores) - 1, 0) for scores in group_scores])
    most_channels = np.array([len(s) - f for s, f in zip(channel_scores, fewest, strict=True)])
    _check_reachable(
        most_groups @ np.asarray(group_costs) + most_channels.sum() * channel_cost, target
    )

    scores = np.concatenate([*group_scores, *channel_scores])
    lengths = [len(s) for s in group_scores] + [len(s) for s in channel_scores]
    owner = np.repeat(np.tile(np.arange(layers), 2), lengths)
    is_group = np.repeat(np.repeat([True, False], layers), lengths)
    groups, channels = np.zeros(layers, int), np.zeros(layers, int)
    removed = 0
    for unit in np.argsort(scores, kind="stable"):
        layer = owner[unit]
        taken, most, cost = (
            (groups, most_groups, group_costs[layer])
            if is_group[unit]
            else (channels, most_channels, channel_cost)
        )
        if taken[layer] < most[layer] and removed + cost <= target:
            taken[layer] += 1
            removed += cost
    if most_channels.any():
        budget = (target - groups @ np.asarray(group_costs)) / channel_cost
        sizes = np.array([len(s) for s in channel_scores])
        channels = _round_to_grid(channels, sizes, budget, limits)
    return Counts(groups, channels)


class _Curve:
    """What a layer loses with its units of one kind.

    Args:
      losses: after removing 0, 1, … units.
      numbers: those of units that may go, ascending from 0.
      cost: parameters of a unit.

    Attributes:
      at: place of the number chosen so far.
    """

    def __init__(self, losses: np.ndarray, numbers: np.ndarray, cost: int) -> None:
        self.numbers, self.costs, self.losses = numbers, numbers * cost, losses[numbers]
        self.at = 0

    def cheapest(self, left: float) -> tuple[float, int]:
        """The further place of least loss per parameter, for at most ``left`` parameters.

        Returns:
          That slope, infinite if no place is as near, and the place; the farthest of equals.
        """
        stop = np.searchsorted(self.costs, self.costs[self.at] + left, side="right")
        slopes = self._slopes(int(stop))
        if not slopes.size:
            return np.inf, self.at
        best = slopes.size - 1 - int(np.argmin(slopes[::-1]))
        return float(slopes[best]), self.at + 1 + best

    def step(self, forth: int) -> tuple[float, int]:
        """Loss per parameter, and parameters, from here to the next place (1) or the one before.

        Returns:
          Both are negative on the way back; (∞, 0) if there is no such place.
        """
        place = self.at + forth
        if not 0 <= place < len(self.costs):
            return np.inf, 0
        cost = self.cost_to(place)
        return float(self.losses[place] - self.losses[self.at]) / abs(cost), cost

    def cost_to(self, place: int) -> int:
        """Parameters between the chosen place and another."""
        return int(self.costs[place] - self.costs[self.at])

    def _slopes(self, stop: int) -> np.ndarray:
        """Loss per parameter from the chosen place to all those behind it and before ``stop``."""
        ahead = slice(self.at + 1, stop)
        rise = self.losses[ahead] - self.losses[self.at]
        return np.asarray(rise / (self.costs[ahead] - self.costs[self.at]))


def allocate_loss(
    group_curves: Sequence[np.ndarray],
    channel_curves: Sequence[np.ndarray],
    group_costs: Sequence[int],
    channel_cost: int,
    target: int,
    limits: Limits,
) -> Counts:
    """The least total loss at the target, if the losses of layers add up.

    With a Lagrange multiplier ν a parameter, each curve minimises loss − ν · parameters removed by
    itself, at a vertex of its lower convex hull. As ν rises, the vertices come in the order of loss
    per parameter, and are taken while they fit: at the total of such a set nothing is better. Then
    the cheapest places that still fit follow, and a step beyond the target (of channels; of KV
    groups where no channel may go) if it ends nearer to it; and KV groups are exchanged for
    channels while that helps (heuristics).

    Args:
      group_curves: for each layer, the losses after removing 0 … n_kv − 1 KV groups, (n_kv,);
        (1,) if they are not to be pruned.
      channel_curves: likewise for 0 … I channels, (I + 1,).
      group_costs: parameters of a KV group, per layer.
      channel_cost: parameters of a channel.
      target: parameters to remove.
      limits: the grid.

    Raises:
      ConfigError: if the units cannot reach the target.
    """
    groups = [
        _Curve(losses, np.arange(len(losses)), cost)
        for losses, cost in zip(group_curves, group_costs, strict=True)
    ]
    channels = [
        _Curve(losses, limits.removable(len(losses) - 1), channel_cost) for losses in channel_curves
    ]
    curves = [*groups, *channels]
    _check_reachable(sum(int(curve.costs[-1]) for curve in curves), target)
    left = target
    moves = [(*curve.cheapest(left), number) for number, curve in enumerate(curves)]
    heapify(moves)
    while moves[0][0] < np.inf:
        _, place, number = moves[0]
        curve = curves[number]
        if curve.cost_to(place) <= left:
            left -= curve.cost_to(place)
            curve.at = place
        heapreplace(moves, (*curve.cheapest(left), number))
    stepped = any(len(curve.numbers) > 1 for curve in channels)
    step = limits.multiple_of * channel_cost if stepped else min(group_costs)
    _exchange(groups, channels, left, step / 2)
    return Counts(*(np.array([c.numbers[c.at] for c in each]) for each in (groups, channels)))


def _exchange(
    groups: Sequence[_Curve], channels: Sequence[_Curve], left: int, within: float
) -> None:
    """Move one KV group at a time, and channels the other way, while that lowers the total loss.

    Args:
      groups, channels: the curves at their places.
      left: parameters still to remove.
      within: how far from the target all totals are equally good; beyond, a nearer one is better.
    """
    curves = [*groups, *channels]

    def badness(left: int) -> tuple[float, float]:
        return max(abs(left), within), sum(float(curve.losses[curve.at]) for curve in curves)

    left = _fill(channels, left)
    least, again = badness(left), True
    while again:
        again = False
        for curve, forth in product(groups, (1, -1)):
            _, cost = curve.step(forth)
            if not cost:
                continue
            before = [each.at for each in curves]
            curve.at += forth
            after = _fill(channels, left - cost)
            if badness(after) < least:
                least, left, again = badness(after), after, True
            else:
                for each, place in zip(curves, before, strict=True):
                    each.at = place


def _fill(channels: Sequence[_Curve], left: int) -> int:
    """Step by step, remove or return the cheapest channels until the next ends no nearer to 0.

    Args:
      channels: the curves at their places.
      left: parameters still to remove; negative to return some.

    Returns:
      What is left then.
    """
    while left:
        forth = 1 if left > 0 else -1
        (_, cost), number = min((curve.step(forth), n) for n, curve in enumerate(channels))
        if abs(left - cost) >= abs(left):
            break
        channels[number].at += forth
        left -= cost
    return left


def allocate_uniform(
    groups: int, channels: int, layers: int, group_cost: int, channel_cost: int, target: int,
    limits: Limits,
) -> Counts:  # fmt: skip
    """The same counts in every layer, so that the result keeps a stock architecture.

    KV groups: the whole ones in their share of the target, ⌊ρ n_kv⌋; channels make up the rest, to
    the nearest ``limits.multiple_of``. If there are no channels to prune, groups are rounded to the
    nearest.

    Args:
      groups, channels: units that a layer may lose; 0 if not to be pruned.
      layers: how many layers.
      group_cost, channel_cost: parameters of one unit.
      target: parameters to remove in total.
      limits: the grid of channels.

    Raises:
      ConfigError: if the units cannot reach the target.
    """
    most_channels = channels - limits.fewest(channels)
    most_groups = max(groups - 1, 0)
    _check_reachable(layers * (most_groups * group_cost + most_channels * channel_cost), target)
    share = target / layers
    total = groups * group_cost + channels * channel_cost
    ideal = share / total * groups if channels else share / group_cost
    lost_groups = min(int(ideal + 1e-9) if channels else round(ideal), most_groups)
    while channels and share - lost_groups * group_cost > most_channels * channel_cost:
        lost_groups += 1
    lost_channels = 0
    if channels:
        ideal_kept = channels - (share - lost_groups * group_cost) / channel_cost
        kept = limits.nearest(ideal_kept, channels)
        lost_channels = channels - max(kept, limits.fewest(channels))
    return Counts(np.full(layers, lost_groups), np.full(layers, lost_channels))


def allocate_share(
    groups: int, channels: int, layers: int, group_cost: int, channel_cost: int, target: int,
    limits: Limits,
) -> Counts:  # fmt: skip
    """The same share of KV groups and of channels in every layer (LLM-Pruner, arXiv 2305.11627).

    Whole KV groups in the share, ⌊ρ n_kv⌋, and channels to the nearest step of the grid, or, if it
    has all numbers, so that ⌊(1 − ρ) I⌋ stay; the total is off the target by what that makes.

    Args:
      groups, channels, layers, group_cost, channel_cost, target, limits: as in `allocate_uniform`.

    Raises:
      ConfigError: if the units cannot reach the target.
    """
    share = target / (layers * (groups * group_cost + channels * channel_cost))
    lost_groups = int(share * groups + 1e-9)
    ideal, fewest = channels * (1 - share), limits.fewest(channels)
    kept = int(ideal + 1e-9) if limits.multiple_of == 1 else limits.nearest(ideal, channels)
    most_groups, most_channels = max(groups - 1, 0), channels - fewest
    if lost_groups > most_groups or kept < fewest:
        _check_reachable(layers * (most_groups * group_cost + most_channels * channel_cost), target)
        raise ConfigError(
            "--allocation share",
            f"asks for {share:.0%} of the KV groups and of the channels of each layer",
            "lower --sparsity, or give another --allocation",
        )
    return Counts(np.full(layers, lost_groups), np.full(layers, channels - kept))


def check_weights(sparsity: float) -> None:
    """Refuse a sparsity that `allocate_weights` cannot reach.

    Raises:
      ConfigError: if it is beyond `MOST`.
    """
    if sparsity > MOST:
        raise ConfigError(
            "--allocation loss",
            f"removes at most {MOST:.0%} of the weights of any matrix",
            "lower --sparsity, or give --allocation uniform",
        )


def allocate_weights(histograms: Sequence[np.ndarray], target: int) -> np.ndarray:
    """How many weights each matrix loses if those of least loss go, whatever their matrix.

    One threshold, and no matrix loses more than `MOST` of its weights, rounded up. Of the last bin
    that is needed, each matrix loses the same share, by largest remainder: the total is exact.

    Args:
      histograms: of each matrix's losses, over the same bins, ascending, (B,) int.
      target: weights to remove, at most `MOST` of them all.

    Returns:
      (M,), int.
    """
    most = np.ceil([MOST * h.sum(dtype=np.int64) for h in histograms]).astype(int)

    def below(bins: int) -> np.ndarray:
        each = [h[:bins].sum(dtype=np.int64) for h in histograms]
        return np.asarray(np.minimum(each, most))

    first, last = 0, len(histograms[0])  # bins that are too few or just enough, and enough
    while last - first > 1:
        middle = (first + last) // 2
        if below(middle).sum() <= target:
            first = middle
        else:
            last = middle
    lost = below(first)
    room = below(last) - lost
    share = (target - lost.sum()) * room / max(room.sum(), 1)
    lost += share.astype(int)
    left = target - int(lost.sum())
    lost[np.argsort(share.astype(int) - share, kind="stable")[:left]] += 1
    return np.asarray(lost)


def keep(scores: np.ndarray, removed: int) -> np.ndarray:
    """Which units stay if the ``removed`` lowest go, (D,) bool; the first of equals goes."""
    kept = np.ones(len(scores), bool)
    kept[np.argsort(scores, kind="stable")[:removed]] = False
    return kept


def _check_reachable(most: int, target: int) -> None:
    if target > most:
        raise ConfigError(
            "--sparsity",
            f"asks for {target:,} parameters, but at most {most:,} can be removed",
            "lower it, name more in --target, or lower --min-channels",
        )


def _round_to_grid(
    removed: np.ndarray, sizes: np.ndarray, budget: float, limits: Limits
) -> np.ndarray:
    """Round the numbers of kept channels to the grid {size} ∪ multiples, by largest remainder."""
    step = limits.multiple_of
    kept = sizes - removed
    down = kept // step * step
    up = np.where(kept == down, kept, np.minimum(down + step, sizes))
    left = budget - (sizes - up).sum()  # channels still to remove if every layer rounds up
    width = np.where(up > down, up - down, 1)
    for layer in np.argsort(-(up - kept) / width, kind="stable"):
        gain = up[layer] - down[layer]
        if gain and down[layer] >= limits.fewest(sizes[layer]) and left >= gain / 2:
            up[layer] = down[layer]
            left -= gain
    return np.asarray(sizes - up)
