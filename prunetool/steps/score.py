"""Scores of a layer's units, and the budget shared out between layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunetool import console, records, workdir
from prunetool.errors import ConfigError, naming
from prunetool.model import Model
from prunetool.profiling import Profile
from prunetool.pruned import CHANNELS, HEADS, Stats, extents, kept_units, used_weight
from prunetool.pruning import budget, compensation, gram, newton, structural

# These scores are a loss in output units: between units of different size, loss a parameter
# counts. The others' are already relative to their layer.
LOSS_METHODS = ("obs", "wanda-sp", "magnitude")
MATRICES = ("o_proj", "down_proj")  # whose inputs the units make


@dataclass
class _Units:
    """A layer's units of one target: the order they go in, and what layers are compared by."""

    order: np.ndarray
    compared: np.ndarray


class Scoring:
    """One scoring: all that its layers share.

    Args:
      model: the dense checkpoint.
      work: the work directory.
      targets: ``heads``, ``channels`` or both.
      how: the command's other options, by their names.
      profile: takes the seconds.
      discard: delete a layer's stats once its losses are known.
    """

    def __init__(
        self,
        model: Model,
        work: Path,
        targets: tuple[str, ...],
        how: dict[str, Any],
        profile: Profile,
        discard: bool,
    ) -> None:
        self.model, self.work, self.targets, self.how = model, work, targets, how
        self.profile, self.discard = profile, discard
        self.said: list[str] = []  # what was reached, once all layers are given

    def layers(
        self, header: records.Header, source: Iterator[records.LayerRecord]
    ) -> Iterator[records.LayerRecord]:
        """Score every layer, share the budget out, then give each layer's record."""
        self._check_budget()
        # The scores do not depend on how the budget is shared: a sweep makes them once.
        shared = {
            key: self.how[key]
            for key in ("method", "lam", "newton_iterations", "damping", "seed", "weighting")
        }
        # The paper's mask depends on the sparsity too.
        shared["sparsity"] = self.how["sparsity"] if "newton" in self.how["method"] else None
        scores_name = f"scores-{workdir.digest([header.history[:-1], shared])}"
        kept_name = workdir.step_directory(header)
        taken, units, energies, seconds = [], [], [], []
        for record in console.progress(source, header.layers):
            name = workdir.layer_file(scores_name, record.index)
            # Several sparsities at once: the first to come makes the scores that all read.
            with workdir.lock(self.work / name, wait=True):
                arrays = workdir.make_once(
                    self.work,
                    name,
                    lambda record=record: self._scores(record),  # type: ignore[misc]
                )
            taken.append(record)
            seconds.append(self.profile.take("score", record.values))
            energies.append({m: float(arrays[f"{m}.energy"][0]) for m in MATRICES})
            units.append(
                {t: _Units(arrays[f"{t}.order"], arrays[f"{t}.compared"]) for t in self.targets}
            )
        counts = self._share_out(units)

        rows, worst = [], []
        each = zip(taken, units, energies, seconds, strict=True)
        for record, unit, energy, spent in console.progress(
            each, header.layers, what="loss of layer"
        ):
            lost = {HEADS: counts.groups, CHANNELS: counts.channels}
            kept = {t: budget.keep(unit[t].order, int(lost[t][record.index])) for t in self.targets}
            shape = self.model.config.layer_shapes[record.index]
            masks = kept_units(self.work, record, shape) | kept
            name = workdir.layer_file(kept_name, record.index)
            arrays = workdir.make_once(
                self.work,
                name,
                lambda record=record, kept=kept, masks=masks: (  # type: ignore[misc]
                    kept | self._lost(record, masks)
                ),
            )
            if self.discard:
                workdir.discard_stats(self.work, record)
            losses = {m: float(arrays[f"{m}.lost"][0]) / (energy[m] or 1.0) for m in MATRICES}
            groups = int(masks[HEADS].sum())
            now = {
                "heads": groups * shape.group_size,
                "kv_heads": groups,
                "channels": int(masks[CHANNELS].sum()),
            }
            worst.append(max(losses.values()))
            rows.append(
                [
                    record.index,
                    f"{now['heads']}/{shape.heads}",
                    f"{now['channels']}/{shape.channels}",
                    *(f"{losses[matrix]:.4f}" for matrix in MATRICES),
                ]
            )
            yield record.adding(
                {f"kept.{t}": name for t in self.targets},
                {"kept": now, "loss": losses, "energy": energy, **spent},
            )
        console.table(
            "Relative output error by plain removal",
            ["layer", "heads", "channels", *MATRICES],
            rows,
            by=worst,
        )
        self._say_ratio(counts)

    def _check_budget(self) -> None:
        """Refuse an impossible sparsity before any layer is scored."""
        empty = [
            {
                t: _Units(*[np.zeros(shape.kv_heads if t == HEADS else shape.channels)] * 2)
                for t in self.targets
            }
            for shape in self.model.config.layer_shapes
        ]
        self._share_out(empty)

    def _costs(self) -> tuple[list[int], int, int]:
        """Parameters of a KV group in each layer, of a channel, and of all seven matrices."""
        shapes, size = self.model.config.layer_shapes, self.model.layer_parameters
        groups = [
            size(shape) - size(shape.keeping(shape.kv_heads - 1, shape.channels))
            for shape in shapes
        ]
        first = shapes[0]
        channel = size(first) - size(first.keeping(first.kv_heads, first.channels - 1))
        return groups, channel, sum(map(size, shapes))

    def _share_out(self, units: Sequence[dict[str, _Units]]) -> budget.Counts:
        group_costs, channel_cost, total = self._costs()
        target = round(self.how["sparsity"] * total)
        limits = budget.Limits(self.how["multiple_of"], self.how["min_channels"])
        if self.how["allocation"] == "global":
            empty = np.zeros(0)
            groups = [u[HEADS].compared if HEADS in u else empty for u in units]
            channels = [u[CHANNELS].compared if CHANNELS in u else empty for u in units]
            return budget.allocate_global(
                groups, channels, group_costs, channel_cost, target, limits
            )
        shapes = set(self.model.config.layer_shapes)
        if len(shapes) > 1:
            raise ConfigError("--allocation uniform", "the layers differ", "give global")
        shape = shapes.pop()
        return budget.allocate_uniform(
            shape.kv_heads if HEADS in self.targets else 0,
            shape.channels if CHANNELS in self.targets else 0,
            self.model.layers, group_costs[0], channel_cost, target, limits,
        )  # fmt: skip

    def _scores(self, record: records.LayerRecord) -> dict[str, np.ndarray]:
        """Scores of a layer's units of both targets, as a file keeps them."""
        stats = Stats(self.work, record, self.model.config)
        shape = self.model.config.layer_shapes[record.index]
        group_costs, channel_cost, _ = self._costs()
        out = {}
        for kind, matrix, blocks, cost in (
            (HEADS, "o", shape.kv_heads, group_costs[record.index]),
            (CHANNELS, "down", 0, channel_cost),
        ):
            W = used_weight(self.model, record.index, matrix)
            where = f"layer {record.index}, {matrix}_proj"
            with naming(where), self.profile.phase(f"rank {matrix}_proj"):
                units, energy = self._rank(
                    W, stats, matrix, blocks, cost, (record.index, blocks > 0)
                )
            console.within(1 if blocks else 2, 2, "matrix")
            out[f"{kind}.order"], out[f"{kind}.compared"] = units.order, units.compared
            out[f"{matrix}_proj.energy"] = np.array([energy])
        return out

    def _rank(
        self,
        W: np.ndarray,
        stats: Stats,
        matrix: str,
        blocks: int,
        cost: int,
        seed: tuple[int, bool],
    ) -> tuple[_Units, float]:
        """Score the rows of W, or its ``blocks`` blocks of rows, by the method asked.

        Token weighting: a diagonal method takes the weighted moments; another keeps its own order
        and the weighted output energy splits the budget between layers.

        Returns:
          The units, and the output energy of all together, ‖XW‖².
        """
        method, token = self.how["method"], self.how["weighting"] == "token"
        A = gram.unpack_lower(stats[f"{matrix}.gram"])
        second = np.diagonal(A) / stats.tokens
        mean = stats[f"{matrix}.total"] / stats.tokens
        if token:
            if blocks:
                weighted = structural.block_energy(W, stats[f"{matrix}.token_blocks"])
            else:
                weighted = structural.wanda(W, stats[f"{matrix}.token_diagonal"])

        def by_block(rows: np.ndarray, merge: Any = np.sum) -> np.ndarray:
            return merge(rows.reshape(blocks, -1), axis=1) if blocks else rows

        # Newton's K takes the place of A, and its sum is the energy where A is of plain tokens.
        weighted_gram = f"{matrix}.token_gram" if token else ""
        by_sum = method.startswith("newton") and weighted_gram not in stats
        energy = 0.0 if by_sum else compensation.output_energy(gram.mirror(A), W)
        if weighted_gram in stats:
            A = gram.unpack(stats[weighted_gram])

        if method == "wanda-sp":
            order = weighted if token else by_block(structural.wanda(W, second))
        elif method == "magnitude":
            order = by_block(structural.energy(W))
        elif method == "flap":
            order = by_block(structural.flap(W, second, mean), np.mean)
        elif method == "random":
            order = np.random.default_rng([self.how["seed"], *map(int, seed)]).random(
                blocks or len(W)
            )
        elif method == "obs":
            order = structural.obs(W, A, damping=self.how["damping"], blocks=blocks)
        else:
            norm = newton.spectral_norm(A)
            K = newton.contribution_gram(W, A, norm)
            energy = norm * newton.total(K) if by_sum else energy
            order = self._newton(K, blocks)
        if token:
            return _Units(order, weighted / cost), energy
        return _Units(order, order / cost if method in LOSS_METHODS else order), energy

    def _newton(self, K: np.ndarray, blocks: int) -> np.ndarray:
        """Newton scores from the lower triangle of K, whose place the solves take."""
        lam, damping = self.how["lam"], self.how["damping"]
        s = self.how["sparsity"] * len(K)
        if self.how["method"] != "newton" or self.how["newton_iterations"]:
            gram.mirror(K)
        if self.how["method"] == "newton-tied" and blocks:
            K, s = newton.tie(K, blocks), self.how["sparsity"] * blocks
        if self.how["method"] == "newton":
            steps = self.how["newton_iterations"]
            z = (
                newton.newton_iterated(K, s, lam=lam, damping=damping, steps=steps)
                if steps
                else newton.newton(K, s, lam=lam, damping=damping, overwrite=True)
            )
        else:
            _, z, info = newton.newton_box(K, s, lam=lam, damping=damping)
            if not info.converged:
                console.log.warning(
                    "the box solve stopped after %d steps at residual %.1e; the order is that of "
                    "its last step, raise --damping",
                    info.steps,
                    info.residual,
                )
        if not blocks or len(z) == blocks:
            return z
        by_group = z.reshape(blocks, -1)
        live = np.isfinite(by_group)
        means = np.where(live, by_group, 0).sum(axis=1) / np.maximum(live.sum(axis=1), 1)
        return np.where(live.any(axis=1), means, -np.inf)

    def _lost(
        self, record: records.LayerRecord, kept: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Squared output error of both matrices when the units not kept are removed."""
        stats = Stats(self.work, record, self.model.config)
        shape = self.model.config.layer_shapes[record.index]
        extent = extents(kept, shape, self.model.config)
        lost = {}
        for matrix in ("o", "down"):
            W = used_weight(self.model, record.index, matrix)
            stays = extent[matrix].columns
            A_pp = gram.block(stats[f"{matrix}.gram"], ~stays)
            lost[f"{matrix}_proj.lost"] = np.array([compensation.output_energy(A_pp, W[~stays])])
        return lost

    def _say_ratio(self, counts: budget.Counts) -> None:
        group_costs, channel_cost, total = self._costs()
        removed = int(
            counts.groups @ np.asarray(group_costs) + counts.channels.sum() * channel_cost
        )
        self.said += [
            f"removes {removed:,} of {total:,} layer parameters ({removed / total:.4%}; asked "
            f"{self.how['sparsity']:.2%})",
            f"{removed / self.model.parameters():.2%} of all parameters",
        ]
