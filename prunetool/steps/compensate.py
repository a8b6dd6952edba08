"""Refit a layer's o_proj and down_proj to the kept units, and update masked weights."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prunetool import console, overlap, records, workdir
from prunetool.checkpoint import checksum
from prunetool.checkpoint import writer as files
from prunetool.errors import ConfigError, RecordError, naming
from prunetool.kept import Extent, extents, kept_units, masks, output_weight
from prunetool.llama import forms
from prunetool.llama.config import LlamaConfig
from prunetool.llama.parts import UNIT_MATRICES
from prunetool.methods import UPDATED
from prunetool.model import Model
from prunetool.pruning import compensation, gram, unstructured
from prunetool.pruning.gram import Partition
from prunetool.stats import EVERY, GIVEN, Stats
from prunetool.steps.run import Run, reopen

# Decades: the held-out error is flat around its minimum.
DAMPING_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Tokens(NamedTuple):
    """The calibration whose sums the refits take.

    Attributes:
      header: of its records.
      layers: its records, if they are not the stream's own.
    """

    header: records.Header
    layers: list[records.LayerRecord] | None

    @classmethod
    def of(cls, header: records.Header, other: Path | None) -> "Tokens":
        """The stream's own, or those of the records ``other``.

        Raises:
          RecordError: if these are of another checkpoint.
          WorkError: if their work directory is not their own.
        """
        if other is None:
            return cls(header, None)
        with other.open(encoding="utf-8") as stream:
            its, layers = records.read(stream)
            made = list(layers)
        if its.fingerprint != header.fingerprint:
            raise RecordError(other, "is of another checkpoint", "calibrate the same one")
        reopen(its)
        return cls(its, made)

    @property
    def said(self) -> dict[str, str]:
        """What the history says of them, if they are others."""
        if self.layers is None:
            return {}
        return {"refit_on": "FILE", "calibration": workdir.digest(self.header.history)}

    def of_layer(self, record: records.LayerRecord) -> records.LayerRecord:
        """The layer's record that names the sums."""
        return record if self.layers is None else self.layers[record.index]

    def stats(self, model: Model, record: records.LayerRecord, *splits: tuple[str, ...]) -> Stats:
        """A layer's sums."""
        return Stats(Path(self.header.work), self.of_layer(record), model.config, *splits)

    def sketch(self) -> str:
        """A sketch of the text."""
        tokens = workdir.TensorFile(Path(self.header.work), workdir.TOKENS_NAME)["tokens"]
        return overlap.sketch(tokens)


def refit_layers(
    run: Run,
    source: Iterator[records.LayerRecord],
    tokens: Tokens,
    grid: tuple[float, ...],
    rows: list[tuple[Any, ...]],
    *,
    biased: bool = False,
) -> Iterator[records.LayerRecord]:
    """Refit every layer of a stream, and add a row to ``rows`` for each refit.

    Args:
      run: the run.
      source: the records.
      tokens: whose sums to take.
      grid: dampings to choose from; none: only biases change.
      rows: receives layer, matrix, and the numbers of `_REPORT`.
      biased: whether every matrix gets a bias, or only those that have one.

    Raises:
      RecordError: before the first layer, if no tokens were held out to choose the damping on.
    """
    calibration = tokens.header.calibration
    if len(grid) > 1 and not calibration.get("held_out"):
        raise RecordError(
            "--damping",
            "no tokens were held out to choose it with",
            "give one number, such as 0.01, or calibrate with 2 samples or more",
        )
    masked = any(step["options"].get("method") in UPDATED for step in run.header.history)
    if tokens.layers is not None and masked and calibration.get("stats") not in EVERY:
        raise RecordError(
            "--refit-on",
            "that calibration kept no sums for the matrices that are masked",
            "run it with --stats all",
        )
    return _refitted(run, source, tokens, grid, rows, biased=biased)


def check_biases(config: LlamaConfig) -> None:
    """Refuse a model that cannot have biases in all its matrices.

    Raises:
      ConfigError: if no architecture that programs load is the model's with biases.
    """
    if not forms.families(config.with_biases()):
        raise ConfigError(
            "--bias", "no program loads a model of this architecture with biases", "leave it out"
        )


def _refitted(
    run: Run,
    source: Iterator[records.LayerRecord],
    tokens: Tokens,
    grid: tuple[float, ...],
    rows: list[tuple[Any, ...]],
    *,
    biased: bool,
) -> Iterator[records.LayerRecord]:
    if tokens.layers is not None:  # so that evaluate knows their text
        path = run.work / run.directory / workdir.PROGRESS_NAME
        path.parent.mkdir(exist_ok=True)
        files.write_json(path, checksum.sealed({"sketch": tokens.sketch()}))
    for record, name, arrays in run.layers(source, partial(_refit, run, tokens, grid, biased)):
        # Sorted as safetensors returns names, so that a resumed run writes the same bytes.
        report = {
            name.removesuffix(".report"): {
                key: None if np.isnan(value) else float(value)
                for key, value in zip(_REPORT, array, strict=True)
            }
            for name, array in sorted(arrays.items())
            if name.endswith(".report")
        }
        if not report.keys() >= {"o_proj", "down_proj"}:
            raise RecordError(run.work / name, "lacks the report of a refit", workdir.AGAIN)
        rows += [(record.index, name, *of.values()) for name, of in report.items()]
        seconds = run.profile.take("compensate", record.values)
        yield record.adding({"refit": name}, {"refit": report} | seconds)


_REPORT = ("removed", "refitted", "held_out_removed", "held_out_refitted", "damping")


def _refit(
    run: Run, tokens: Tokens, grid: tuple[float, ...], biased: bool, record: records.LayerRecord
) -> dict[str, np.ndarray]:
    """The refitted weights of a layer, and their errors.

    Returns:
      For matrices that lost columns, ``o_proj.weight`` (D, k) and ``down_proj.weight`` (D, k'),
      float32, as a checkpoint stores them without the pruned columns, and any ``bias``;
      ``….weight`` of any other matrix that SparseGPT masked; and ``report``: relative output errors
      and the damping (`_REPORT`), NaN if there is none, for each refit and each mask's update
      (``….masked``).
    """
    if not any(name.startswith(("kept.", "mask.", "basis")) for name in record.files):
        raise RecordError(
            f"layer {record.index}", "nothing to keep", "run prunetool score before this step"
        )
    model, work = run.model, run.work
    shape = model.config.layer_shapes[record.index]
    kept = extents(kept_units(work, record, shape), shape, model.config)
    stats = tokens.stats(model, record)
    out: dict[str, np.ndarray] = {}
    for matrix in UNIT_MATRICES:
        rows = kept[matrix].columns
        if rows.all():
            out[f"{matrix}_proj.report"] = np.array([0.0, 0.0, 0.0, 0.0, np.nan])
            continue
        with naming(f"{matrix}_proj"):
            with run.profile.phase("read"):
                W = output_weight(model, record.index, matrix)
                energy = record.values["energy"][f"{matrix}_proj"]
                if tokens.layers is not None:
                    energy = compensation.output_energy(gram.unpack(stats[f"{matrix}.gram"]), W)
                if "first" in tokens.of_layer(record).files:
                    first = tokens.stats(model, record, ("first",))
                    energy += _sampled_energy(gram.unpack(first[f"{matrix}.gram"]), W)
                sums = [
                    _Sums.of(tokens.stats(model, record, splits), matrix, rows)
                    for splits in (("stats", "first"), ("held_out",))
                    if splits[0] in stats.splits
                ]
                bias = model.part_if_any(record.index, f"{matrix}_bias")
                if biased and bias is None:
                    bias = np.zeros(W.shape[1])
                bias = None if bias is None else bias.astype(np.float64)
            with run.profile.phase("solve"):
                made = _refit_matrix(W, bias, rows, sums, energy or 1.0, grid)
            out |= {f"{matrix}_proj.{name}": value for name, value in made.items()}
            console.within(1 if matrix == "o" else 2, 3, "matrix")
        if grid and np.isnan(made["report"][-1]):
            console.log.warning(
                "layer %d, %s_proj: no damping lowered the held-out error; rows are removed but "
                "not refitted",
                record.index,
                matrix,
            )
    with run.profile.phase("update masked"):
        return out | _update_masked(model, work, record, kept, stats, out)


def _sampled_energy(A: np.ndarray, W: np.ndarray) -> float:
    """`compensation.output_energy` from as many outputs as choose the damping."""
    chosen = W[:, compensation.outputs_to_choose_by(W.shape[1])]
    return float(compensation.output_energy(A, chosen) * W.shape[1] / chosen.shape[1])


def _update_masked(
    model: Model,
    work: Path,
    record: records.LayerRecord,
    kept: dict[str, Extent],
    stats: Stats,
    refitted: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """SparseGPT's update of the matrices it masked; o and down start from their refit.

    Returns:
      As in `_refit`, for the matrices that change.
    """
    out: dict[str, np.ndarray] = {}
    for part, mask in masks(model, work, record).items():
        how = record.values["masks"][part]
        name = f"{part}_proj"
        if how["method"] not in UPDATED and f"{name}.weight" not in refitted:
            continue  # export masks it
        dense = kept[part].of(model.part(record.index, part)).astype(np.float64)
        W = refitted.get(f"{name}.weight", dense).astype(np.float64)
        on = kept[part].of(mask.kept)
        new = np.where(on, W, 0.0)
        if how["method"] in UPDATED:
            columns = kept[part].columns
            A = gram.unpack(stats[f"{GIVEN[part]}.gram"])[np.ix_(columns, columns)]
            with naming(name):
                _, new = unstructured.sparsegpt(W, A, damping=how["damping"], mask=on)
            energy = compensation.output_energy(A, W.T) or 1.0
            errors = [compensation.output_energy(A, (V - W).T) / energy for V in (W * on, new)]
            out[f"{name}.masked.report"] = np.array([*errors, np.nan, np.nan, how["damping"]])
        out[f"{name}.weight"] = new.astype(np.float32)
    return out


class _Sums(NamedTuple):
    """Sums of a matrix's inputs over some tokens."""

    gram: Partition
    total: np.ndarray  # Σ x, (D,)
    tokens: int

    @classmethod
    def of(cls, stats: Stats, matrix: str, kept: np.ndarray) -> "_Sums":
        """Read the sums for ``o`` or ``down``."""
        A = gram.partition(stats[f"{matrix}.gram"], kept)
        return cls(A, stats[f"{matrix}.total"], stats.tokens)

    def about(self, mean: np.ndarray, kept: np.ndarray) -> "_Sums":
        """The same sums, of x - mean."""
        A = compensation.centred(self.gram, self.total, self.tokens, mean, kept)
        return _Sums(A, self.total - self.tokens * mean, self.tokens)

    def add(self, other: "_Sums") -> "_Sums":
        """Sum of both; overwrites this one's blocks."""
        for mine, theirs in zip(self.gram, other.gram, strict=True):
            mine += theirs
        return _Sums(self.gram, self.total + other.total, self.tokens + other.tokens)


def _refit_matrix(
    W: np.ndarray,
    bias: np.ndarray | None,
    kept: np.ndarray,
    sums: list[_Sums],
    energy: float,
    grid: tuple[float, ...],
) -> dict[str, np.ndarray]:
    """Refit one matrix.

    Args:
      W: (D, D'), float64.
      bias: (D',), None if there is none.
      kept: which rows of W stay, (D,) bool.
      sums: of the tokens to fit, and of any held out; overwritten.
      energy: output energy of all tokens.
      grid: dampings to choose from; none: only the bias changes.
    """
    gone = ~kept
    removed = sum(compensation.output_energy(part.gram.pp, W[gone]) for part in sums)
    chosen = W[:, compensation.outputs_to_choose_by(W.shape[1])]
    held_energy = (
        compensation.energy_of_both(sums[1].gram, chosen[kept], chosen[gone])
        if len(sums) == 2
        else 0.0
    )
    about = sums[0].total / sums[0].tokens
    if bias is not None:
        # A bias absorbs the mean, and the weights are refitted to the variation around it.
        sums = [part.about(about, kept) for part in sums]
    unseen: list[float] = [np.nan, np.nan]
    damping = grid[0] if grid else None
    if len(sums) == 2 and grid:
        choice = compensation.choose_damping(sums[0].gram, sums[1].gram, chosen[gone], grid)
        unseen = [error / (held_energy or 1.0) for error in (choice.before, choice.after)]
        damping = choice.damping

    every = sums.pop(0)
    while sums:
        every = every.add(sums.pop())
    mean = np.zeros(len(W))
    if bias is not None:
        further = every.total / every.tokens  # from `about` to the mean of all tokens
        mean, every = about + further, every.about(further, kept)
    refit = compensation.Refit(every.gram, W[gone])
    dW_k = np.zeros((int(kept.sum()), W.shape[1])) if damping is None else refit.solve(damping)
    report = [
        removed / energy,
        refit.error(dW_k) / energy,
        *unseen,
        np.nan if damping is None else damping,
    ]
    # b = b + m_pᵀ W_p − m_kᵀ δW_k
    new_bias = None if bias is None else bias + mean[gone] @ W[gone] - mean[kept] @ dW_k
    return _parts(W[kept] + dW_k, new_bias, report)


def _parts(W: np.ndarray, bias: np.ndarray | None, report: list[float]) -> dict[str, np.ndarray]:
    parts = {"weight": W.T.astype(np.float32), "report": np.array(report)}
    return parts if bias is None else {**parts, "bias": bias.astype(np.float32)}
