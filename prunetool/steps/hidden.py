"""Choose the directions of the residual stream that are kept, for the whole model or each norm."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from prunetool import console, records, workdir
from prunetool.errors import ConfigError, RecordError, naming
from prunetool.kept import kept_shape, kept_units
from prunetool.llama.config import LlamaConfig
from prunetool.llama.parts import NORM_OF
from prunetool.llama.weights import layer_parameters
from prunetool.methods import LAYER, methods_of
from prunetool.pruning import basis, gram
from prunetool.stats import EVERY, SITES, Stats
from prunetool.steps.run import Run

SIGNALS = {  # sites, and the norm whose outputs each sums
    site: NORM_OF[of.matrices[0]]
    for site, of in SITES.items()
    if of.matrices and of.matrices[0] in NORM_OF
}


class Slicing:
    """One choice of a basis from the inputs of all norms, or of one for each.

    Args:
      run: the run.
      targets: ``hidden``.
      how: the command's other options, by name.
    """

    def __init__(self, run: Run, targets: tuple[str, ...], how: dict[str, Any]) -> None:
        self.run, self.how = run, how
        self.model, self.work = run.model, run.work
        self._choose = methods_of(targets)[how["method"]].load()
        self.said: list[str] = []

    def layers(self, source: Iterator[records.LayerRecord]) -> Iterator[records.LayerRecord]:
        """Find the basis from every layer's sums, or each layer's two, and yield its record.

        All records are read first.

        Raises:
          ConfigError: if so much cannot be cut.
          RecordError: if calibrate did not keep the sums, or weights were masked.
        """
        if self.model.config.classes:
            raise ConfigError(
                "--target hidden", "is for models of text: LlamaGen loads no other hidden size",
                "give --target heads,channels",
            )  # fmt: skip
        kept = self.run.header.calibration.get("stats")
        if self.how["basis"] == LAYER and kept != "residual":
            raise RecordError(
                "--basis layer", "needs the sums of the residual stream, and calibrate kept none",
                "run calibrate with --stats residual",
            )  # fmt: skip
        if kept not in EVERY:
            raise RecordError(
                "--target hidden",
                "needs the sums of the inputs of q, k, v, gate and up, and calibrate kept none",
                "run calibrate with --stats all",
            )
        made = list(self._unmasked(source))
        D = self.model.config.hidden_size
        if self.how["basis"] == LAYER:
            k = self._size(made)
            files = self._own(made, k)
        else:
            k = basis.kept_size(D, self.how["sparsity"], self.how["multiple_of"])
            files = self._shared(made, k)
        return self._with_basis(made, files, k)

    def _unmasked(self, source: Iterator[records.LayerRecord]) -> Iterator[records.LayerRecord]:
        for record in source:
            if any(name.startswith("mask.") for name in record.files):
                raise RecordError(
                    f"layer {record.index}",
                    "has masks, whose zeros another basis would fill",
                    "give --target hidden without masks of weights",
                )
            yield record

    def _with_basis(
        self, made: list[records.LayerRecord], files: Iterator[tuple[str, np.ndarray]], k: int
    ) -> Iterator[records.LayerRecord]:
        """Yield each layer's record with its file, and the shares of energy (2,) that it keeps."""
        D, rows, worst = self.model.config.hidden_size, [], []
        for record, (name, shares) in zip(made, files, strict=True):
            if self.run.discard:
                workdir.discard_stats(self.work, record)
            kept = dict(zip(SIGNALS, map(float, shares), strict=True))
            rows.append([record.index, *(f"{1 - share:.4f}" for share in kept.values())])
            worst.append(1 - min(kept.values()))
            values: dict[str, Any] = {"hidden": {"kept": k, "of": D, "share": kept}}
            values |= self.run.profile.take("score", record.values)
            yield record.adding({"basis": name}, values)
        columns = ["layer", *(f"before {site}" for site in SIGNALS)]
        console.table("Part of the stream's energy that is cut", columns, rows, by=worst)
        target = f"target {self.how['sparsity']:.2%}"
        self.said.append(f"hidden size {D} → {k}")
        if self.how["basis"] == LAYER:
            removed = self._removed(self._units_kept(made), k)
            self.said.append(f"{removed:.4%} of the layers' parameters ({target})")
        else:
            self.said.append(f"{1 - k / D:.4%} of every matrix ({target})")
        if self.model.config.tied:
            self.said.append("the embedding and the head will be stored apart")

    def _units_kept(self, made: list[records.LayerRecord]) -> LlamaConfig:
        """The model with the units that earlier scores left."""
        shapes = [
            kept_shape(shape, kept_units(self.work, record, shape))
            for record, shape in zip(made, self.model.config.layer_shapes, strict=True)
        ]
        return self.model.config.with_shapes(tuple(shapes))

    def _removed(self, before: LlamaConfig, k: int) -> float:
        """The part of the layers' parameters that k directions remove, net of the shortcuts."""
        now, was = (
            sum(layer_parameters(config, shape) for shape in config.layer_shapes)
            for config in (before.with_bases(k), before)
        )
        return 1 - now / was

    def _size(self, made: list[records.LayerRecord]) -> int:
        """The k, of the multiples asked, whose bases remove what is nearest to the sparsity.

        Raises:
          ConfigError: if all remove clearly less.
        """
        step, asked = self.how["multiple_of"], self.how["sparsity"]
        D = self.model.config.hidden_size
        if step > D:
            raise ConfigError("--multiple-of", f"{step} is above the hidden size, {D}", "lower it")
        before = self._units_kept(made)
        removed = {k: self._removed(before, k) for k in range(step, D + 1, step)}
        k = min(removed, key=lambda k: abs(removed[k] - asked))
        if k == step and asked and asked - removed[k] > 0.01:
            raise ConfigError(
                "--sparsity",
                f"{asked:g} is out of reach: --multiple-of {step} removes at most {removed[k]:.2%}",
                "lower it, or --multiple-of",
            )
        return k

    def _own(self, made: list[records.LayerRecord], k: int) -> Iterator[tuple[str, np.ndarray]]:
        """Each layer's file of two bases, (D, k), and the energy that each keeps, of 1, (2,)."""

        def bases(record: records.LayerRecord) -> dict[str, np.ndarray]:
            found, kept = {}, []
            for site in SIGNALS:
                stats = Stats(self.work, record, self.model.config)
                S = gram.unpack(stats[f"before_{site}.gram"]) / stats.tokens
                with naming(f"layer {record.index}, before {'/'.join(SITES[site].matrices)}"):
                    Q = self._choose(S, k)
                found[site] = Q.astype(np.float32)
                kept.append(np.vdot(Q, S @ Q) / (np.trace(S) or 1.0))
            return {**found, "kept": np.minimum(kept, 1)}  # sums are rounded

        for record in console.progress(made, len(made)):
            name = f"{self.run.directory}/layer-{record.index:05d}.basis.safetensors"
            with self.run.profile.phase("eigenvectors"):
                arrays = workdir.make_once(self.work, name, partial(bases, record))
            yield name, arrays["kept"]

    def _shared(self, made: list[records.LayerRecord], k: int) -> Iterator[tuple[str, np.ndarray]]:
        """The file of the basis, (D, k), and each layer's energy that it keeps, of 1, (2,)."""
        name = f"{self.run.directory}/basis.safetensors"
        arrays = workdir.make_once(self.work, name, lambda: self._basis(made, k))
        for kept in arrays["kept"]:
            yield name, kept

    def _basis(self, made: list[records.LayerRecord], k: int) -> dict[str, np.ndarray]:
        """Q, and the part of each signal's energy that it keeps, (L, 2), in the form of a file."""
        H = self._last(self.model.config.hidden_size)
        for record in console.progress(made, len(made)):
            for site in SIGNALS:
                H += self._signal(record, site)
        with self.run.profile.phase("eigenvectors"):
            Q = self._choose(H, k)
        # Read again: all signals at once would be more than one layer.
        kept = [[np.vdot(Q, self._signal(record, site) @ Q) for site in SIGNALS] for record in made]
        return {"basis": Q.astype(np.float32), "kept": np.array(kept)}

    def _last(self, size: int) -> np.ndarray:
        """E[u uᵀ] of the stream before the final norm, of trace 1.

        Raises:
          RecordError: if it is not there, or of another size.
        """
        file = workdir.TensorFile(self.work, workdir.STREAM_NAME)
        packed, tokens = file["gram"], int(file["tokens"][0])
        if packed.shape != (size * (size + 1) // 2,) or packed.dtype != np.float64:
            where = self.work / workdir.STREAM_NAME
            raise RecordError(where, f"gram is {packed.dtype} {packed.shape}", workdir.AGAIN)
        return gram.unpack(packed) / tokens

    def _signal(self, record: records.LayerRecord, site: str) -> np.ndarray:
        """E[u uᵀ] of the stream before a norm (`basis`), of trace 1."""
        stats = Stats(self.work, record, self.model.config)
        norm = self.model.part(record.index, SIGNALS[site])
        with naming(f"layer {record.index}, before {'/'.join(SITES[site].matrices)}"):
            S = basis.of_unit_norm(stats[f"{site}.gram"], norm, stats.tokens)
        return S / (np.trace(S) or 1.0)
