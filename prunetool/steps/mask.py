"""Mask single weights, matrix by matrix and layer by layer."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from prunetool import console, records, workdir
from prunetool.errors import NumericalError, RecordError, naming
from prunetool.kept import Extent, Mask, extents, kept_units, pack_mask
from prunetool.llama.parts import MATRICES, UNIT_MATRICES
from prunetool.methods import QK, methods_of
from prunetool.pruning import budget, compensation, curve, gram, unstructured
from prunetool.stats import EVERY, GIVEN, MODEL, SITES, Gradients, Stats, need_gradients
from prunetool.steps.attention import AttentionLayer, turn_of
from prunetool.steps.run import Run, chosen_layers


class Masking:
    """One scoring of single weights: everything its layers share.

    Args:
      run: the run.
      parts: the matrices, from `MATRICES`.
      how: the command's other options, by name.
    """

    def __init__(self, run: Run, parts: tuple[str, ...], how: dict[str, Any]) -> None:
        self.run, self.parts, self.how = run, parts, how
        self.model, self.work = run.model, run.work
        self._method = methods_of(parts)[how["method"]]
        self._scorer = self._method.load()
        self._turns = cache(partial(turn_of, run.model))
        self._by_loss = how["allocation"] == "loss"
        self._chosen = chosen_layers(how, run.model.layers)
        self._shares: dict[tuple[int, str], float] = {}  # what each matrix loses, if by loss
        self.said: list[str] = []  # what was reached, after the last layer

    @property
    def _of_attention(self) -> bool:
        return self.parts == ("q", "k")

    @property
    def _learns(self) -> bool:
        return self.how["method"] in QK

    def layers(self, source: Iterator[records.LayerRecord]) -> Iterator[records.LayerRecord]:
        """Mask every layer, and yield its record at once.

        Raises:
          RecordError: before the first layer, if calibrate did not keep what the method needs.
          ConfigError: if ``--allocation loss`` cannot remove that much.
        """
        self._check_kept(self.run.header.calibration)
        if self._by_loss:
            budget.check_weights(self.how["sparsity"])
        return self._masked(source)

    def _masked(self, source: Iterator[records.LayerRecord]) -> Iterator[records.LayerRecord]:
        make = self.run.profile.phase("mask")(self._make)
        rows, worst = [], []
        counts = {part: np.zeros(2, int) for part in self.parts}  # removed, and all
        if self._by_loss:
            source = iter(self._allocated(source))
        for record, name, arrays in self.run.layers(source, make):
            values = self._values(arrays)
            for part in self.parts if self._chosen[record.index] else ():
                counts[part] += arrays[f"{part}.count"]
            rows.append(self._row(record.index, values))
            worst.append(max(mask["loss"] or 0.0 for mask in values["masks"].values()))
            before, now = record.values.get("masks", {}), values["masks"]
            if not self._chosen[record.index]:  # what an earlier step masked there stays
                now = {part: mask for part, mask in now.items() if part not in before}
                values["attention"] = record.values.get("attention", values["attention"])
            values["masks"] = {**before, **now}
            if not {"q", "k"} & set(self.parts):
                del values["attention"]  # what an earlier step learned remains valid
            values |= self.run.profile.take("score", record.values)
            yield record.adding({f"mask.{part}": name for part in now}, values)
        title, columns = "Relative output error by plain removal", ["layer", *self.parts]
        if self._of_attention:
            title += ", and error of the attention matrices"
            columns += ["attention: calibration", "held out"]
        console.table(title, columns, rows, by=worst)
        lost, total = map(int, np.sum([*counts.values()], axis=0))
        if total:
            self.said += [
                f"removes {lost:,} of {total:,} weights of {', '.join(self.parts)}",
                f"{lost / total:.4%} (target {self.how['sparsity']:.2%})",
            ]
        if total and self._by_loss:
            shares = (f"{part} {gone / (size or 1):.0%}" for part, (gone, size) in counts.items())
            self.said.append(", ".join(shares))

    def _check_kept(self, calibration: dict[str, Any]) -> None:
        why = "--allocation loss" if self._by_loss else f"--method {self.how['method']}"
        if self._by_loss or self._method.needs_gradients:
            need_gradients(calibration, MODEL, why, "--allocation uniform" * self._by_loss)
        missing = [f"{part}_proj" for part in self.parts if not SITES[GIVEN[part]].of_units]
        needed = self._by_loss or self._method.needs_gram
        if missing and needed and calibration.get("stats") not in EVERY:
            raise RecordError(
                why,
                f"calibrate kept no sums of the inputs of {', '.join(missing)}",
                "run calibrate with --stats all",
            )
        if (self._learns or self.how["refine"]) and calibration.get("attention") in (None, [0, 0]):
            raise RecordError(
                f"--method {self.how['method']}",
                "calibrate kept no attention inputs",
                "run calibrate with --attention-samples 8, or more",
            )

    def _allocated(self, source: Iterator[records.LayerRecord]) -> list[records.LayerRecord]:
        """Decide what each matrix of each layer loses, in `_shares`; gives the layers' records.

        The losses are counted once for a sweep of sparsities.
        """
        header, found = self.run.header, []
        histograms: dict[tuple[int, str], np.ndarray] = {}
        digest = workdir.digest([header.history[:-1], self.parts, curve.MIX, curve.DAMPING])
        for record in console.progress(source, header.layers, what="loss of layer"):
            found.append(record)
            if not self._chosen[record.index]:
                continue
            name = workdir.layer_file(f"scores-{digest}", record.index)
            with naming(f"layer {record.index}"), workdir.lock(self.work / name, wait=True):
                arrays = workdir.make_once(self.work, name, partial(self._histograms, record))
            histograms |= {(record.index, part): arrays[part] for part in self.parts}
        sizes = [int(each.sum(dtype=np.int64)) for each in histograms.values()]
        target = round(self.how["sparsity"] * sum(sizes))
        lost = budget.allocate_weights(list(histograms.values()), target)
        for place, gone, size in zip(histograms, lost, sizes, strict=True):
            self._shares[place] = int(gone) / (size or 1)
        return found

    def _histograms(self, record: records.LayerRecord) -> dict[str, np.ndarray]:
        """How many weights of each matrix cost what (`unstructured.histogram`)."""
        kept, stats = self._extents(record), Stats(self.work, record, self.model.config)
        own: dict[str, np.ndarray] = {}  # by site: matrices share their inputs
        out = {}
        for part in self.parts:
            W = kept[part].of(self.model.part(record.index, part))
            if not W.size:
                out[part] = np.zeros(unstructured.BINS, np.uint32)
                continue
            with naming(f"{part}_proj"), self.run.profile.phase("count losses"):
                if GIVEN[part] not in own:
                    A = self._gram(stats, part, kept[part], record.index)
                    own[GIVEN[part]] = unstructured.inverse_diagonal(A, curve.DAMPING)
                g2 = self._gradients(record, part, kept[part])
                out[part] = unstructured.histogram(W, own[GIVEN[part]], g2, stats.tokens)
            console.within(len(out), len(self.parts), "matrix")
        return out

    def _extents(self, record: records.LayerRecord) -> dict[str, Extent]:
        shape = self.model.config.layer_shapes[record.index]
        return extents(kept_units(self.work, record, shape), shape, self.model.config)

    def _gradients(self, record: records.LayerRecord, part: str, kept: Extent) -> np.ndarray:
        """Mean squared gradient at each kept output of a matrix, (D',).

        At the outputs of o and down mixed with their mean, as in `curve`: so measured.
        """
        gradients = Gradients(self.work, record, self.model.config)
        if part in UNIT_MATRICES:
            g2 = gram.diagonal(gradients[f"{part}.gram"]) / gradients.tokens
            g2 = curve.MIX * g2 + (1 - curve.MIX) * g2.mean()
        else:
            g2 = gradients[f"{part}.square"] / gradients.tokens
        return np.asarray(g2[kept.rows])

    def _values(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """The numbers of a layer's file, for its record."""
        masks = {}
        for part in self.parts:
            lost, size = map(int, arrays[f"{part}.count"])
            loss = float(arrays[f"{part}.loss"][0])
            masks[part] = {
                **{key: self.how[key] for key in ("method", "pattern", "damping")},
                "removed": lost / size if size else 0.0,
                "loss": None if np.isnan(loss) else loss,
            }
        # Sorted as safetensors returns names, so that a resumed run writes the same bytes.
        attention = {
            name.removeprefix("attention."): float(array[0])
            for name, array in sorted(arrays.items())
            if name.startswith("attention.")
        }
        return {"masks": masks, "attention": attention}

    def _make(self, record: records.LayerRecord) -> dict[str, np.ndarray]:
        """The masks of a layer and its numbers, in the form of a file.

        Returns:
          For each part, ``kept`` and ``values`` (`pack_mask`), ``count`` (removed and all weights,
          of the kept units) and ``loss`` (relative output error, NaN if unknown); and
          ``attention.…``, the numbers of the descent.
        """
        kept, stats = self._extents(record), Stats(self.work, record, self.model.config)
        attention = self._attention(record, kept)
        chosen = self._chosen[record.index]
        learned, said = self._learn(attention) if chosen else ({}, {})
        out: dict[str, np.ndarray] = {}
        masks = {}
        for part in self.parts:
            W = kept[part].of(self.model.part(record.index, part)).astype(np.float64)
            A = None
            if self._method.needs_gram or f"{GIVEN[part]}.gram" in stats:
                A = self._gram(stats, part, kept[part], record.index)
            with naming(f"{part}_proj"):
                masks[part] = self._choose(part, W, A, learned.get(part), record, kept[part])
            loss = np.nan
            if A is not None:
                gone = compensation.output_energy(A, np.where(masks[part], 0, W).T)
                loss = gone / (compensation.output_energy(A, W.T) or 1.0)
            console.within(len(masks), len(self.parts), "matrix")
            out[f"{part}.count"] = np.array([np.sum(~masks[part]), W.size])
            out[f"{part}.loss"] = np.array([loss])
        values: dict[str, np.ndarray] = {}
        if attention is not None:
            if self.how["refine"] and self.how["sparsity"] and chosen:
                pair, steps = attention.refine(list(masks.values()), self.how["refine"])
                values = dict(zip(self.parts, map(np.asarray, pair), strict=True))
                said["refine_steps"] = steps
            now = values.values() or [
                np.where(mask, W, 0) for W, mask in zip(attention.w, masks.values(), strict=True)
            ]
            said["calibration"], said["held_out"] = attention.errors(now)
        for part, mask in masks.items():
            place = np.ix_(*kept[part])
            whole = np.zeros([len(side) for side in kept[part]], bool)
            whole[place] = mask
            new = None
            if part in values:
                new = np.zeros(whole.shape, np.float32)
                new[place] = values[part]
            out |= pack_mask(part, Mask(whole, new))
        return out | {f"attention.{name}": np.array([value]) for name, value in said.items()}

    def _attention(
        self, record: records.LayerRecord, kept: dict[str, Extent]
    ) -> AttentionLayer | None:
        """The layer's attention, if q and k are masked and it is needed, or stored to measure."""
        needed = self._learns or self.how["refine"]
        if not self._of_attention or not (needed or "attention" in record.files):
            return None
        if not kept["q"].rows.any():  # all KV groups of the layer were removed
            return None
        part = partial(self.model.part, record.index)
        biases = [self.model.part_if_any(record.index, f"{name}_bias") for name in self.parts]
        return AttentionLayer(
            self._turns,
            self.work,
            record,
            [kept[name].of(part(name)) for name in self.parts],
            [
                None if bias is None else bias[kept[name].rows]
                for name, bias in zip(self.parts, biases, strict=True)
            ],
            [self.model.part_if_any(record.index, f"{name}_norm") for name in self.parts],
            self.model.config.window,
        )

    def _learn(
        self, attention: AttentionLayer | None
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Scores of q and k by an attention method, and the numbers of the descent."""
        if attention is None or not self._learns or not self.how["sparsity"]:
            return {}, {}
        scores, said = self._scorer(attention, **self._method.given(self.how))
        return dict(zip(self.parts, map(np.asarray, scores), strict=True)), said

    def _gram(self, stats: Stats, part: str, kept: Extent, layer: int) -> np.ndarray:
        """Gram matrix of a matrix's inputs from kept units."""
        name = f"{GIVEN[part]}.gram"
        if name not in stats:
            raise RecordError(
                f"layer {layer}",
                f"has no sums of the inputs of {part}_proj",
                "run calibrate with --stats all",
            )
        A = gram.unpack(stats[name])
        return A if kept.columns.all() else A[np.ix_(kept.columns, kept.columns)]

    def _choose(
        self,
        part: str,
        W: np.ndarray,
        A: np.ndarray | None,
        learned: np.ndarray | None,
        record: records.LayerRecord,
        kept: Extent,
    ) -> np.ndarray:
        """The mask of one matrix."""
        if not self._chosen[record.index]:
            return np.ones(W.shape, bool)
        sparsity = self._shares.get((record.index, part), self.how["sparsity"])
        pattern = self.how["pattern"]
        if pattern == "2:4" and W.shape[1] % 4:
            raise NumericalError(
                f"{W.shape[1]} inputs", "are not a multiple of 4", "choose another --pattern"
            )
        if self._learns:
            # Nothing was learned if there is nothing to remove, or no KV group is left.
            score = np.ones(W.shape) if learned is None else learned
        else:
            place = [record.index, MATRICES.index(part)]
            how = self.how | {"sparsity": sparsity, "seed": [self.how["seed"], *place]}
            evidence = [W, A]
            if self._method.needs_gradients:
                evidence.append(self._gradients(record, part, kept))
            score = self._scorer(*evidence, **self._method.given(how))
        return score if self._method.cuts else unstructured.keep(score, sparsity, pattern)

    def _row(self, layer: int, values: dict[str, Any]) -> list[object]:
        """A layer's row of the table."""
        found = [mask["loss"] for mask in values["masks"].values()]
        if self._of_attention:
            found += [values["attention"].get(key) for key in ("calibration", "held_out")]
        return [layer, *("–" if value is None else f"{value:.4f}" for value in found)]
