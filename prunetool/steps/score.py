"""Score the layers' units, and share the budget out between layers."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from prunetool import console, records, workdir
from prunetool.errors import ConfigError, naming
from prunetool.kept import BINS, extents, kept_units, output_weight
from prunetool.llama import forms
from prunetool.llama.config import LayerShape
from prunetool.llama.parts import UNIT_MATRICES
from prunetool.methods import CHANNELS, GROUPS, methods_of
from prunetool.pruning import budget, compensation, curve, gram, structural, units
from prunetool.stats import MODEL, TEXT, Gradients, Stats, need_gradients
from prunetool.steps.run import Run, chosen_layers

OUTPUT_MATRICES = tuple(f"{matrix}_proj" for matrix in UNIT_MATRICES)  # units make their inputs
ENOUGH = 10  # calibration tokens for each channel
MOST_NATS = 100.0  # beyond, a loss is no statement about perplexity, only large
MATRIX_OF = dict(zip((GROUPS, CHANNELS), OUTPUT_MATRICES, strict=True))


@dataclass
class _Units:
    """A layer's units of one target.

    Attributes:
      score: the order of removal.
      between_layers: scores to compare layers by.
      curve: losses after removing 0, 1, … units, nats a token; empty without ``--allocation loss``.
      subsets: row k says which k units go, (n, n) bool; None if the order of scores does.
    """

    score: np.ndarray
    between_layers: np.ndarray
    curve: np.ndarray = field(default_factory=lambda: np.zeros(0))
    subsets: np.ndarray | None = None

    def keep(self, removed: int) -> np.ndarray:
        """Which units stay, bool."""
        return budget.keep(self.score, removed) if self.subsets is None else ~self.subsets[removed]


@dataclass
class _Scored:
    """A layer's record, its units by target, and the output energy by matrix."""

    record: records.LayerRecord
    units: dict[str, _Units]
    energy: dict[str, float]
    seconds: dict[str, Any]


class Scoring:
    """One scoring: everything its layers share.

    Args:
      run: the run.
      targets: ``heads``, ``channels`` or both.
      how: the command's other options, by name.
    """

    def __init__(self, run: Run, targets: tuple[str, ...], how: dict[str, Any]) -> None:
        self.run, self.targets, self.how = run, targets, how
        self.model, self.work = run.model, run.work
        self._method = methods_of(targets)[how["method"]]
        self._rank_units = self._method.load()
        self._by_loss = how["allocation"] == "loss"
        self._chosen = chosen_layers(how, run.model.layers)
        self.said: list[str] = []  # what was reached, after the last layer

    def layers(self, source: Iterator[records.LayerRecord]) -> Iterator[records.LayerRecord]:
        """Score every layer, share the budget out, then yield each layer's record."""
        calibration = self.run.header.calibration
        if self._by_loss:
            need_gradients(calibration, MODEL, "--allocation loss", "--allocation uniform")
        if self._method.needs_slopes:
            need_gradients(calibration, TEXT, f"--method {self.how['method']}")
        self._check_weighting(calibration["stats"])
        self._check_budget()
        return self._kept(source)

    def _kept(self, source: Iterator[records.LayerRecord]) -> Iterator[records.LayerRecord]:
        scored = list(self._scored(source))
        counts = self._share_out([layer.units for layer in scored])
        lost = {GROUPS: counts.groups, CHANNELS: counts.channels}

        def make(record: records.LayerRecord) -> dict[str, np.ndarray]:
            units, before = scored[record.index].units, self._masks(record)
            kept = {t: before[t] for t in self.targets}
            if self._chosen[record.index]:
                kept = {t: units[t].keep(int(lost[t][record.index])) for t in self.targets}
            return kept | self._lost(record, before | kept)

        rows, worst, left, predicted, unknown = [], [], [], 0.0, False
        records_in = [layer.record for layer in scored]
        for record, name, arrays in self.run.layers(records_in, make, "loss of layer"):
            layer, shape = scored[record.index], self.model.config.layer_shapes[record.index]
            masks = self._masks(record) | {target: arrays[target] for target in self.targets}
            losses = {
                m: float(arrays[f"{m}.lost"][0]) / (layer.energy[m] or 1.0) for m in OUTPUT_MATRICES
            }
            groups, channels = int(masks[GROUPS].sum()), int(masks[CHANNELS].sum())
            heads = groups * shape.group_size
            now = {"heads": heads, "kv_heads": groups, "channels": channels}
            worst.append(max(losses.values()))
            ratios = [f"{heads}/{shape.heads}", f"{channels}/{shape.channels}"]
            nats = {
                MATRIX_OF[t]: float(layer.units[t].curve[lost[t][record.index]])
                for t in self.targets
                if self._by_loss and self._chosen[record.index]
            }
            left.append(shape.keeping(groups, channels))
            in_nats = self._with_earlier(record, nats)
            found = in_nats.get("nats", {})
            predicted += sum(found.values())
            unknown |= any(not masks[t].all() and m not in found for t, m in MATRIX_OF.items())
            errors = [f"{losses[m]:.4f}" for m in OUTPUT_MATRICES]
            rows.append([record.index, *ratios, *errors, *(f"{x:.5f}" for x in nats.values())])
            yield record.adding(
                {f"kept.{t}": name for t in self.targets},
                {"kept": now, "loss": losses, "energy": layer.energy, **layer.seconds}
                | {"scores": self._histograms(layer.units, masks)}
                | in_nats,
            )
        columns = ["layer", "heads", "channels", *OUTPUT_MATRICES]
        title = "Relative output error by plain removal"
        if self._by_loss:
            columns += [f"{MATRIX_OF[t]} nats" for t in self.targets]
            title = "Error if removed; nats after the refit"
        console.table(title, columns, rows, by=worst)
        self._say_ratio(counts, left)
        if self._by_loss:
            self.said.append(f"predicted loss {predicted:.3g} nats a token")
            if unknown:  # an earlier step had no prediction
                self.said[-1] += " for this step"
                return
            times = math.exp(min(curve.INTERACTION * predicted, MOST_NATS))
            factor = f"{times:.3g}" if times > 1.01 else f"{times:.5f}"
            self.said.append(f"expect {self._about} {factor} x the perplexity")

    @property
    def _about(self) -> str:
        """How sure the prediction is: few tokens know too little of what other text needs."""
        said, config = self.run.header.calibration, self.model.config
        samples, held_out, length = (
            int(said.get(key, 0)) for key in ("samples", "held_out", "sequence_length")
        )
        tokens = (samples - held_out) * length
        widest = max(shape.channels for shape in config.layer_shapes)
        if tokens >= ENOUGH * widest:
            return "about"
        console.log.warning(
            "%s tokens are few: expect more loss than predicted; %s are enough",
            f"{tokens:,}", f"{ENOUGH * widest:,}",
        )  # fmt: skip
        return "more than"

    def _histograms(
        self, units: dict[str, _Units], masks: dict[str, np.ndarray]
    ) -> dict[str, dict[str, list[int]]]:
        """How many units of a layer have which score: `BINS` a power of ten, [kept, removed]."""
        found: dict[str, dict[str, list[int]]] = {}
        for target in self.targets:
            bins: dict[str, list[int]] = {}
            for score, stays in zip(units[target].between_layers, masks[target], strict=True):
                known = score > 0 and math.isfinite(score)
                name = str(math.floor(BINS * math.log10(score))) if known else "least"
                bins.setdefault(name, [0, 0])[not stays] += 1
            found[target] = bins
        return found

    def _with_earlier(
        self, record: records.LayerRecord, nats: dict[str, float]
    ) -> dict[str, dict[str, float]]:
        """The record's ``nats``: those of earlier steps too, if this one did not decide again."""
        decided = {MATRIX_OF[t] for t in self.targets if self._chosen[record.index]}
        earlier = record.values.get("nats", {})
        nats = {m: x for m, x in earlier.items() if m not in decided} | nats
        return {"nats": nats} if nats or earlier else {}

    def _scored(self, source: Iterator[records.LayerRecord]) -> Iterator[_Scored]:
        """The scores of each layer, made once for a sweep of sparsities if the method allows."""
        header = self.run.header
        # Named even if the method has no such option, as in the names of older directories.
        always = ("method", "lam", "newton_iterations", "damping", "seed", "weighting")
        shared = {key: self.how[key] for key in (*always, *self._method.options)}
        shared.setdefault("sparsity", None)
        if self._by_loss:
            shared["curve"] = [curve.MIX, curve.DAMPING]
        directory = f"scores-{workdir.digest([header.history[:-1], shared])}"
        for record in console.progress(source, header.layers):
            name = workdir.layer_file(directory, record.index)
            # Several sparsities at once: the first one makes the scores that all read.
            with workdir.lock(self.work / name, wait=True):
                arrays = workdir.make_once(self.work, name, partial(self._scores, record))
            yield _Scored(
                record,
                {
                    t: _Units(
                        arrays[f"{t}.order"],
                        arrays[f"{t}.compared"],
                        arrays.get(f"{t}.curve", np.zeros(0)),
                        arrays.get(f"{t}.subsets"),
                    )
                    for t in self.targets
                },
                {m: float(arrays[f"{m}.energy"][0]) for m in OUTPUT_MATRICES},
                self.run.profile.take("score", record.values),
            )

    def _masks(self, record: records.LayerRecord) -> dict[str, np.ndarray]:
        """The units that the layer kept before this step."""
        return kept_units(self.work, record, self.model.config.layer_shapes[record.index])

    def _check_weighting(self, stats: str) -> None:
        """Refuse weighted tokens that would change nothing."""
        method, allocation = self.how["method"], self.how["allocation"]
        decides = allocation == "global" or self._method.weighs_tokens or stats == "token"
        if self.how["weighting"] == "token" and not decides:
            raise ConfigError(
                "--weighting token",
                f"changes nothing for --method {method} with --allocation {allocation}",
                "give --allocation global, or calibrate with --stats token",
            )

    def _check_budget(self) -> None:
        """Refuse an impossible sparsity before any layer is scored."""

        def units(count: int, removable: int) -> _Units:
            return _Units(np.zeros(count), np.zeros(count), np.zeros(removable + 1))

        empty = [
            {
                GROUPS: units(shape.kv_heads, shape.kv_heads - 1),
                CHANNELS: units(shape.channels, shape.channels),
            }
            for shape in self.model.config.layer_shapes
        ]
        self._share_out([{t: layer[t] for t in self.targets} for layer in empty])

    @cached_property
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

    def _share_out(self, ranked: Sequence[dict[str, _Units]]) -> budget.Counts:
        group_costs, channel_cost, total = self._costs
        target = round(self.how["sparsity"] * total)
        ranked = [units if own else {} for units, own in zip(ranked, self._chosen, strict=True)]
        limits = budget.Limits(self.how["multiple_of"], self.how["min_channels"])
        if self._by_loss:
            whole = np.zeros(1)
            groups = [u[GROUPS].curve if GROUPS in u else whole for u in ranked]
            channels = [u[CHANNELS].curve if CHANNELS in u else whole for u in ranked]
            return budget.allocate_loss(groups, channels, group_costs, channel_cost, target, limits)
        if self.how["allocation"] == "global":
            empty = np.zeros(0)
            groups = [u[GROUPS].between_layers if GROUPS in u else empty for u in ranked]
            channels = [u[CHANNELS].between_layers if CHANNELS in u else empty for u in ranked]
            return budget.allocate_global(
                groups, channels, group_costs, channel_cost, target, limits
            )
        same, chosen = self.how["allocation"], np.flatnonzero(self._chosen)
        shape = common_shape(same, [self.model.config.layer_shapes[layer] for layer in chosen])
        share_out = budget.allocate_share if same == "share" else budget.allocate_uniform
        counts = share_out(
            shape.kv_heads if GROUPS in self.targets else 0,
            shape.channels if CHANNELS in self.targets else 0,
            len(chosen),
            group_costs[chosen[0]],
            channel_cost,
            target,
            limits,
        )
        every = np.zeros((2, self.model.layers), int)
        every[:, chosen] = counts
        return budget.Counts(*every)

    def _scores(self, record: records.LayerRecord) -> dict[str, np.ndarray]:
        """Scores of a layer's units of both targets, in the form of a file."""
        stats = Stats(self.work, record, self.model.config)
        shape = self.model.config.layer_shapes[record.index]
        group_costs, channel_cost, _ = self._costs
        slopes = None
        if self._method.needs_slopes:
            slopes = Gradients(self.work, record, self.model.config, TEXT).__getitem__
        out: dict[str, np.ndarray] = {}
        for kind, matrix, blocks, cost in (
            (GROUPS, "o", shape.kv_heads, group_costs[record.index]),
            (CHANNELS, "down", 0, channel_cost),
        ):
            W = output_weight(self.model, record.index, matrix)
            where, root = f"layer {record.index}, {matrix}_proj", None
            with naming(where), self.run.profile.phase(f"rank {matrix}_proj"):
                if self._by_loss:
                    gradients = Gradients(self.work, record, self.model.config)
                    root = curve.metric_root(gradients[f"{matrix}.gram"], gradients.tokens)
                place = (record.index, blocks > 0)
                found, energy = self._rank(W, stats, matrix, blocks, cost, place, root, slopes)
            if root is not None:
                with naming(where), self.run.profile.phase(f"curve {matrix}_proj"):
                    out |= _curve(kind, W @ root, stats, matrix, blocks, found.score)
            console.within(1 if blocks else 2, 2, "matrix")
            out[f"{kind}.order"], out[f"{kind}.compared"] = found.score, found.between_layers
            out[f"{matrix}_proj.energy"] = np.array([energy])
        return out

    def _rank(
        self,
        W: np.ndarray,
        stats: Stats,
        matrix: str,
        blocks: int,
        cost: int,
        place: tuple[int, bool],
        root: np.ndarray | None,
        slopes: Callable[[str], np.ndarray] | None,
    ) -> tuple[_Units, float]:
        """Score the rows of W, or its ``blocks`` blocks of rows, by the requested method.

        Token weighting: a diagonal method uses the weighted moments; any other keeps its own order,
        and the weighted output energy splits the budget between layers.

        Returns:
          The units, and the output energy of all of them, ‖XW‖².
        """
        token = self.how["weighting"] == "token"
        A = gram.unpack_lower(stats[f"{matrix}.gram"])
        second = np.diagonal(A) / stats.tokens
        mean = stats[f"{matrix}.total"] / stats.tokens
        weighted = None
        if token and blocks:
            weighted = structural.block_energy(W, stats[f"{matrix}.token_blocks"])
        elif token:
            weighted = structural.wanda(W, stats[f"{matrix}.token_diagonal"])

        weighted_gram = f"{matrix}.token_gram" if token else ""
        # Some methods return it as well, if A is of unweighted tokens.
        by_method = self._method.sums_energy and weighted_gram not in stats
        energy = None if by_method else compensation.output_energy(gram.mirror(A), W)
        if weighted_gram in stats:
            A = gram.unpack(stats[weighted_gram])
        evidence = units.Evidence(W, A, second, mean, blocks, weighted, place, root, slopes)
        ranking = self._rank_units(evidence, **self._method.given(self.how))
        if ranking.warning:
            console.log.warning("%s", ranking.warning)
        energy = ranking.energy if energy is None else energy
        order = ranking.scores
        if weighted is not None:
            return _Units(order, weighted / cost), energy
        return _Units(order, order / cost if self._method.raw_loss else order), energy

    def _lost(
        self, record: records.LayerRecord, kept: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Squared output error of both matrices after plain removal of the pruned units."""
        stats = Stats(self.work, record, self.model.config)
        shape = self.model.config.layer_shapes[record.index]
        extent = extents(kept, shape, self.model.config)
        lost = {}
        for matrix in UNIT_MATRICES:
            W = output_weight(self.model, record.index, matrix)
            stays = extent[matrix].columns
            A_pp = gram.block(stats[f"{matrix}.gram"], ~stays)
            lost[f"{matrix}_proj.lost"] = np.array([compensation.output_energy(A_pp, W[~stays])])
        return lost

    def _say_ratio(self, counts: budget.Counts, left: list[LayerShape]) -> None:
        group_costs, channel_cost, total = self._costs
        removed = int(
            counts.groups @ np.asarray(group_costs) + counts.channels.sum() * channel_cost
        )
        if not self._chosen.all():
            sizes = map(self.model.layer_parameters, self.model.config.layer_shapes)
            own = sum(itertools.compress(sizes, self._chosen))
            layers = f"{self._chosen.sum()} of {self.model.layers} layers"
            self.said.append(f"prunes {layers}, {removed / own:.2%} of them")
        self.said += [
            f"removes {removed:,} of {total:,} layer parameters",
            f"{removed / total:.4%} (target {self.how['sparsity']:.2%})",
        ]
        size = self.model.layer_parameters
        gone = total - sum(map(size, left))
        if gone != removed:
            self.said.append(f"{gone / total:.4%} with those of earlier steps")
        self.said.append(f"{gone / self.model.parameters():.2%} of all parameters")
        stored = forms.normalised(self.model.config.with_shapes(tuple(left))).layer_shapes
        if padding := sum(map(size, stored)) - sum(map(size, left)):
            console.log.warning(
                "export pads layers of unequal size to a multiple of %d channels, by %.2f%% of "
                "the layers' parameters; --multiple-of %d avoids that",
                forms.WIDTH_MULTIPLE,
                100 * padding / total,
                forms.WIDTH_MULTIPLE,
            )


def common_shape(allocation: str, shapes: Sequence[LayerShape]) -> LayerShape:
    """The shape of all layers, for an allocation that needs one.

    Raises:
      ConfigError: if they differ.
    """
    if len({*shapes}) > 1:
        raise ConfigError(
            f"--allocation {allocation}",
            "the layers of MODEL differ in size",
            "give --allocation loss or, to score, global",
        )
    return shapes[0]


def _curve(
    target: str, WC: np.ndarray, stats: Stats, matrix: str, blocks: int, scores: np.ndarray
) -> dict[str, np.ndarray]:
    """The loss curve of a matrix's units, in the form of a file (`curve`)."""
    packed, tokens = stats[f"{matrix}.gram"], stats.tokens
    if blocks:
        found = curve.group_curve(gram.unpack_lower(packed), WC, blocks, tokens=tokens)
        return {f"{target}.curve": found.losses, f"{target}.subsets": found.removed}
    order = np.argsort(scores, kind="stable")
    return {f"{target}.curve": curve.row_curve(packed, WC, order, tokens=tokens)}
