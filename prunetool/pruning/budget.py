"""How many KV groups and channels each layer loses to meet the requested sparsity.

[NP]'s α = 4d/3, a head's parameters counted in MLP channels, is taken as a weight in a quantile,
not a factor on its score: then any sparsity is met exactly (as a factor it would never remove a
head). With grouped-query attention a unit is a KV group with its query heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prunetool.errors import ConfigError


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
        step = limits.multiple_of
        kept = min(round(ideal_kept / step) * step, channels)
        kept = channels if channels - ideal_kept < abs(ideal_kept - kept) else kept
        lost_channels = channels - max(kept, limits.fewest(channels))
    return Counts(np.full(layers, lost_groups), np.full(layers, lost_channels))


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
