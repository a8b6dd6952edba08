"""Choose the directions of the residual stream that are kept, the same for the whole model."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from prunetool import console, records, workdir
from prunetool.errors import ConfigError, RecordError, naming
from prunetool.llama.parts import NORM_OF
from prunetool.methods import methods_of
from prunetool.pruning import basis, gram
from prunetool.stats import SITES, Stats
from prunetool.steps.run import Run

SIGNALS = {  # sites, and the norm whose outputs each sums
    site: NORM_OF[of.matrices[0]] for site, of in SITES.items() if of.matrices[0] in NORM_OF
}


class Slicing:
    """One choice of a basis, from the inputs of all norms.

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
        """Read every layer's sums, find the basis, then yield each layer's record.

        Raises:
          RecordError: if calibrate did not keep the sums, or weights were masked.
        """
        if self.model.config.classes:
            raise ConfigError(
                "--target hidden", "is for models of text: LlamaGen loads no other hidden size",
                "give --target heads,channels",
            )  # fmt: skip
        if self.run.header.calibration.get("stats") != "all":
            raise RecordError(
                "--target hidden",
                "needs the sums of the inputs of q, k, v, gate and up, and calibrate kept none",
                "run calibrate with --stats all",
            )
        D = self.model.config.hidden_size
        k = basis.kept_size(D, self.how["sparsity"], self.how["multiple_of"])
        return self._sliced(source, D, k)

    def _sliced(
        self, source: Iterator[records.LayerRecord], D: int, k: int
    ) -> Iterator[records.LayerRecord]:
        made = []
        for record in source:
            if any(name.startswith("mask.") for name in record.files):
                raise RecordError(
                    f"layer {record.index}",
                    "has masks, whose zeros another basis would fill",
                    "give --target hidden without masks of weights",
                )
            made.append(record)
        name = f"{self.run.directory}/basis.safetensors"
        arrays = workdir.make_once(self.work, name, lambda: self._basis(made, k))
        rows = []
        for record in made:
            if self.run.discard:
                workdir.discard_stats(self.work, record)
            kept = {site: float(arrays["kept"][record.index, i]) for i, site in enumerate(SIGNALS)}
            rows.append([record.index, *(f"{1 - share:.4f}" for share in kept.values())])
            values: dict[str, Any] = {"hidden": {"kept": k, "of": D, "share": kept}}
            values |= self.run.profile.take("score", record.values)
            yield record.adding({"basis": name}, values)
        columns = ["layer", *(f"before {site}" for site in SIGNALS)]
        worst = [1 - float(arrays["kept"][record.index].min()) for record in made]
        console.table("Part of the stream's energy that is cut", columns, rows, by=worst)
        target = f"target {self.how['sparsity']:.2%}"
        self.said += [f"hidden size {D} → {k}", f"{1 - k / D:.4%} of every matrix ({target})"]
        if self.model.config.tied:
            self.said.append("the embedding and the head will be stored apart")

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
