import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prunetool.errors import ConfigError
from prunetool.pruning import budget

D, HEAD, GROUP_SIZE = 64, 16, 2
GROUP_COST, CHANNEL_COST = 2 * D * HEAD * (GROUP_SIZE + 1), 3 * D


def removed(counts):
    return int(counts.groups.sum() * GROUP_COST + counts.channels.sum() * CHANNEL_COST)


@given(
    st.integers(0, 100),
    st.floats(0, 0.95),
    st.sampled_from([1, 8, 32]),
    st.lists(st.integers(20, 200), min_size=1, max_size=6),
)
def test_the_ratio_asked_is_the_ratio_removed(seed, sparsity, multiple, sizes):
    random = np.random.default_rng(seed)
    groups = [random.standard_normal(4) for _ in sizes]
    channels = [random.standard_normal(size) for size in sizes]
    limits = budget.Limits(multiple, 1)
    target = round(sparsity * (sum(sizes) * CHANNEL_COST + 4 * len(sizes) * GROUP_COST))
    most_channels = sum(size - limits.fewest(size) for size in sizes)
    assume(target <= most_channels * CHANNEL_COST + 3 * len(sizes) * GROUP_COST)
    counts = budget.allocate_global(
        groups, channels, [GROUP_COST] * len(sizes), CHANNEL_COST, target, limits
    )
    kept = np.array(sizes) - counts.channels
    assert all(k == size or k % multiple == 0 for k, size in zip(kept, sizes, strict=True))
    assert (kept >= [limits.fewest(size) for size in sizes]).all()
    assert (counts.groups < 4).all()
    room = any(limits.fewest(s) < k for s, k in zip(sizes, kept, strict=True))
    if room:
        assert abs(removed(counts) - target) <= max(multiple, 1) * CHANNEL_COST


def test_the_lowest_scores_go_first_across_layers():
    channels = [np.arange(64.0), np.arange(64.0) + 32]
    groups = [np.full(2, 1e9)] * 2
    counts = budget.allocate_global(
        groups, channels, [GROUP_COST] * 2, CHANNEL_COST, 32 * CHANNEL_COST, budget.Limits(1, 1)
    )
    assert counts.channels.tolist() == [32, 0]
    assert counts.groups.tolist() == [0, 0]


def test_a_head_is_weighed_by_its_parameters_not_scored_by_them():
    # The group's score is between the channels': it goes when the quantile reaches it.
    channels, groups = [np.arange(100.0)], [np.array([9.5, 1e9])]
    per_group = GROUP_COST // CHANNEL_COST
    for target, expected in ((10, (0, 10)), (10 + per_group, (1, 10)), (9 + per_group, (0, 41))):
        counts = budget.allocate_global(
            groups, channels, [GROUP_COST], CHANNEL_COST, target * CHANNEL_COST, budget.Limits(1, 1)
        )
        assert (counts.groups[0], counts.channels[0]) == expected


def test_no_layer_loses_its_last_group_or_channels():
    counts = budget.allocate_global(
        [np.zeros(1)] * 2,
        [np.zeros(64)] * 2,
        [GROUP_COST] * 2,
        CHANNEL_COST,
        64 * CHANNEL_COST,
        budget.Limits(32, 32),
    )
    assert counts.groups.tolist() == [0, 0]
    assert counts.channels.tolist() == [32, 32]
    with pytest.raises(ConfigError, match="but at most 12,288 can be removed"):
        budget.allocate_global(
            [np.zeros(1)] * 2,
            [np.zeros(64)] * 2,
            [GROUP_COST] * 2,
            CHANNEL_COST,
            65 * CHANNEL_COST,
            budget.Limits(32, 32),
        )


@given(st.floats(0, 0.8), st.sampled_from([1, 8, 32]))
def test_uniform_counts_meet_the_target_to_a_step_a_layer(sparsity, multiple):
    layers, groups, channels = 5, 4, 256
    total = layers * (groups * GROUP_COST + channels * CHANNEL_COST)
    target = round(sparsity * total)
    counts = budget.allocate_uniform(
        groups, channels, layers, GROUP_COST, CHANNEL_COST, target, budget.Limits(multiple, 1)
    )
    assert len(set(counts.groups)) == len(set(counts.channels)) == 1
    assert (channels - counts.channels[0]) % multiple == 0
    assert abs(removed(counts) - target) <= layers * multiple * CHANNEL_COST


def test_uniform_heads_alone_are_rounded():
    counts = budget.allocate_uniform(
        4, 0, 2, GROUP_COST, CHANNEL_COST, 3 * GROUP_COST, budget.Limits(32, 32)
    )
    assert counts.groups.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("asked", "kept"), [(0, 20), (1, 20), (3, 16), (7, 16), (9, 8), (11, 8), (12, 8)]
)
@pytest.mark.parametrize("layers", [1, 3])
def test_channels_are_rounded_to_the_nearest_of_all_and_the_multiples(asked, kept, layers):
    # Of 20 channels 20, 16 or 8 may stay: the first step is of 4, the second of 8.
    limits, target = budget.Limits(8, 8), asked * layers * CHANNEL_COST
    uniform = budget.allocate_uniform(0, 20, layers, GROUP_COST, CHANNEL_COST, target, limits)
    assert (20 - uniform.channels).tolist() == [kept] * layers
    if layers == 1:
        one = budget.allocate_global(
            [np.empty(0)], [np.arange(20.0)], [GROUP_COST], CHANNEL_COST, target, limits
        )
        assert 20 - one.channels[0] == kept


@pytest.mark.parametrize(("asked", "steps"), [(3, 0), (5, 1), (11, 1), (13, 2), (19, 2), (21, 3)])
def test_over_all_layers_the_channels_removed_are_the_nearest_number_of_steps(asked, steps):
    # The two layers give up equally many, so that each alone would round in the same direction.
    scores = [2 * np.arange(64.0), 2 * np.arange(64.0) + 1]
    counts = budget.allocate_global(
        [np.empty(0)] * 2,
        scores,
        [GROUP_COST] * 2,
        CHANNEL_COST,
        asked * CHANNEL_COST,
        budget.Limits(8, 8),
    )
    assert counts.channels.sum() == 8 * steps
    assert (counts.channels % 8 == 0).all()
    assert np.ptp(counts.channels) <= 8


def test_the_channels_round_what_the_groups_leave():
    # The group goes first; of the 13 channels still to go, two steps of 8 are the nearest.
    target = GROUP_COST + 13 * CHANNEL_COST
    counts = budget.allocate_global(
        [np.array([-1.0, 1e9])],
        [np.arange(64.0)],
        [GROUP_COST],
        CHANNEL_COST,
        target,
        budget.Limits(8, 8),
    )
    assert (counts.groups[0], counts.channels[0]) == (1, 16)


@pytest.mark.parametrize(("share", "groups"), [(0.4, 0), (0.6, 1), (1.25, 1), (1.75, 2)])
def test_uniform_heads_alone_are_rounded_to_nearest(share, groups):
    counts = budget.allocate_uniform(
        4, 0, 4, GROUP_COST, CHANNEL_COST, round(share * 4 * GROUP_COST), budget.Limits(32, 32)
    )
    assert counts.groups.tolist() == [groups] * 4


@pytest.mark.parametrize(
    ("sparsity", "groups"), [(0.19, 0), (0.2, 1), (0.39, 1), (0.4, 2), (0.79, 3), (0.8, 4)]
)
def test_uniform_takes_the_whole_groups_of_their_share_and_channels_for_the_rest(sparsity, groups):
    # A fifth of 5 groups is computed a rounding error below 1, and is one group.
    channels, layers = 256, 5
    each = 5 * GROUP_COST + channels * CHANNEL_COST
    counts = budget.allocate_uniform(
        5, channels, layers, GROUP_COST, CHANNEL_COST, round(sparsity * layers * each),
        budget.Limits(1, 1),
    )  # fmt: skip
    assert counts.groups.tolist() == [groups] * layers
    rest = round((sparsity * each - groups * GROUP_COST) / CHANNEL_COST)
    assert counts.channels.tolist() == [rest] * layers


def test_uniform_takes_another_group_where_the_channels_cannot_make_up_the_rest():
    # Of 64 channels 32 may go; with one of the four groups, which ⌊ρ n_kv⌋ gives, 33 would.
    each = 4 * GROUP_COST + 64 * CHANNEL_COST
    target = GROUP_COST + 33 * CHANNEL_COST
    assert int(target / each * 4) == 1
    counts = budget.allocate_uniform(
        4, 64, 1, GROUP_COST, CHANNEL_COST, target, budget.Limits(1, 32)
    )
    assert (counts.groups[0], counts.channels[0]) == (2, 33 - GROUP_COST // CHANNEL_COST)


def test_keep_drops_the_lowest_and_the_first_of_equals():
    assert budget.keep(np.array([3.0, 1, 1, 2]), 1).tolist() == [True, False, True, True]
    assert budget.keep(np.array([-np.inf, 1.0]), 0).all()


def curves(seed, layers=3, groups=4, channels=64, convex=True):
    """Loss curves of KV groups and of channels, convex or not."""
    random = np.random.default_rng(seed)

    def curve(units, scale):
        steps = random.exponential(size=units) * random.exponential() * scale
        return np.concatenate([[0.0], np.cumsum(np.sort(steps) if convex else steps)])

    per_group = GROUP_COST / CHANNEL_COST
    return (
        [curve(groups - 1, per_group) for _ in range(layers)],
        [curve(channels, 1.0) for _ in range(layers)],
    )


def allocated(found, target, limits):
    costs = [GROUP_COST] * len(found[0])
    counts = budget.allocate_loss(*found, costs, CHANNEL_COST, target, limits)
    losses = [
        curve[count]
        for kind, number in zip(found, counts, strict=True)
        for curve, count in zip(kind, number, strict=True)
    ]
    return counts, sum(losses)


def every_allocation(found, limits):
    """Parameters removed and total loss of all allocations of these layers."""
    costs, losses = np.zeros(1), np.zeros(1)
    for kind, cost in zip(found, (GROUP_COST, CHANNEL_COST), strict=True):
        for curve in kind:
            numbers = np.arange(len(curve))
            if cost == CHANNEL_COST:
                kept = numbers[-1] - numbers
                numbers = numbers[(numbers == 0) | (kept % limits.multiple_of == 0)]
                numbers = numbers[len(curve) - 1 - numbers >= limits.min_channels]
            costs = np.add.outer(costs, numbers * cost).ravel()
            losses = np.add.outer(losses, curve[numbers]).ravel()
    return costs, losses


@pytest.mark.parametrize("seed", range(20))
def test_at_the_totals_of_the_hulls_vertices_no_allocation_loses_less(seed):
    """A vertex of the whole is where loss − ν · parameters removed is least, for some ν."""
    found, limits = curves(seed, groups=3, convex=False), budget.Limits(16, 16)
    costs, losses = every_allocation(found, limits)
    for multiplier in np.quantile(losses / np.maximum(costs, 1), [0.1, 0.5, 0.9]):
        target = int(costs[np.argmin(losses - multiplier * costs)])
        counts, loss = allocated(found, target, limits)
        assert loss <= losses[costs >= target].min() * (1 + 1e-9)
        assert abs(removed(counts) - target) <= 8 * CHANNEL_COST


def test_between_the_vertices_the_loss_is_close_to_the_least():
    limits, ratios = budget.Limits(8, 8), []
    for seed in range(60):
        found = curves(seed)
        costs, losses = every_allocation(found, limits)
        counts, loss = allocated(found, int(0.05 * (1 + seed % 15) * costs.max()), limits)
        ratios.append(loss / losses[costs >= removed(counts)].min())
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(np.array(ratios) <= 1 + 1e-9) >= 0.75
    assert np.quantile(ratios, 0.9) <= 1.1


@given(
    st.integers(0, 1000),
    st.floats(0, 0.95),
    st.sampled_from([1, 8, 32]),
    st.lists(st.integers(40, 200), min_size=1, max_size=6),
    st.booleans(),
)
def test_the_ratio_removed_at_least_loss_is_the_ratio_asked(
    seed, sparsity, multiple, sizes, convex
):
    found = [], []
    for number, size in enumerate(sizes):
        for kinds, kind in zip(found, curves(seed + number, 1, 4, size, convex), strict=True):
            kinds += kind
    limits = budget.Limits(multiple, 1)
    most = sum(size - limits.fewest(size) for size in sizes) * CHANNEL_COST
    target = round(sparsity * (most + 3 * len(sizes) * GROUP_COST))
    assume(most >= GROUP_COST)
    counts, _ = allocated(found, target, limits)
    kept = np.array(sizes) - counts.channels
    assert all(k == size or k % multiple == 0 for k, size in zip(kept, sizes, strict=True))
    assert (kept >= [limits.fewest(size) for size in sizes]).all()
    assert (counts.groups < 4).all()
    assert abs(removed(counts) - target) <= multiple * CHANNEL_COST / 2


def test_heads_alone_and_channels_alone_are_allocated_at_least_loss():
    groups, channels = curves(5)
    limits, nothing = budget.Limits(8, 8), [np.zeros(1)] * 3
    counts, loss = allocated((groups, nothing), 4 * GROUP_COST, limits)
    steps = np.sort(np.concatenate([np.diff(curve) for curve in groups]))
    assert counts.groups.sum() == 4
    assert loss == pytest.approx(steps[:4].sum())
    counts, loss = allocated((nothing, channels), 10 * 8 * CHANNEL_COST, limits)
    steps = np.sort(np.concatenate([np.diff(curve[:57:8]) for curve in channels]))
    assert counts.channels.sum() == 80
    assert loss == pytest.approx(steps[:10].sum())


def test_least_loss_too_keeps_the_last_group_and_the_fewest_channels():
    found = [np.zeros(1)] * 2, [np.zeros(65)] * 2
    counts, _ = allocated(found, 64 * CHANNEL_COST, budget.Limits(32, 32))
    assert (counts.groups.tolist(), counts.channels.tolist()) == ([0, 0], [32, 32])
    with pytest.raises(ConfigError, match="but at most 12,288 can be removed"):
        allocated(found, 65 * CHANNEL_COST, budget.Limits(32, 32))


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    fraction=st.floats(0, 0.8),
    spread=st.integers(1, 30),
    seed=st.integers(0, 999),
)
def test_weights_of_least_loss_go_up_to_the_most_of_each_matrix(sizes, fraction, spread, seed):
    random = np.random.default_rng(seed)
    bins = [random.integers(0, spread, size) for size in sizes]
    histograms = [np.bincount(b, minlength=spread).astype(np.uint32) for b in bins]
    most = np.ceil(budget.MOST * np.array(sizes)).astype(int)
    target = round(fraction * sum(sizes))
    lost = budget.allocate_weights(histograms, target)
    assert lost.sum() == target
    assert (lost <= most).all()
    dearest = [np.sort(b)[n - 1] if n else -1 for b, n in zip(bins, lost, strict=True)]
    cheapest = [
        np.sort(b)[n] if n < m else spread for b, n, m in zip(bins, lost, most, strict=True)
    ]
    assert max(dearest) <= min(cheapest)  # one threshold, but for the bin that holds it
    shared = [
        (n - (b < max(dearest)).sum(), min((b == max(dearest)).sum(), m - (b < max(dearest)).sum()))
        for b, n, m in zip(bins, lost, most, strict=True)
        if n < m or (b < max(dearest)).sum() < m
    ]
    ratio = sum(n for n, _ in shared) / max(sum(room for _, room in shared), 1)
    assert all(abs(n - ratio * room) < 1 for n, room in shared)


def test_the_most_of_each_matrix_can_go_and_no_more():
    histograms = [np.array([0, 10]), np.array([5, 0])]
    np.testing.assert_array_equal(budget.allocate_weights(histograms, 12), [8, 4])
    budget.check_weights(0.8)
    with pytest.raises(ConfigError, match="removes at most 80% of the weights of any matrix"):
        budget.check_weights(0.81)
