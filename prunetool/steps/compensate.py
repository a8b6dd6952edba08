"""The refit of a layer's o_proj and down_proj, from its stats and the units it keeps."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prunetool import console, records, workdir
from prunetool.errors import RecordError, naming
from prunetool.model import Model
from prunetool.pruned import all_stats, kept_units, rows_kept, used_weight
from prunetool.pruning import compensation, gram

# Decades: the held-out error is flat around its minimum.
DAMPING_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def refit_layers(
    model: Model,
    header: records.Header,
    source: Iterator[records.LayerRecord],
    grid: tuple[float, ...],
    rows: list[list[object]],
) -> Iterator[records.LayerRecord]:
    """Refit every layer of a stream, and add a row for the table to ``rows``."""
    work, directory = Path(header.work), workdir.step_directory(header)
    for record in source:
        if not any(name.startswith("kept.") for name in record.files):
            raise RecordError(
                f"layer {record.index}", "no units to keep", "put prunetool score before this step"
            )
        name = workdir.layer_file(directory, record.index)
        with naming(f"layer {record.index}"):
            arrays = workdir.make_once(
                work,
                name,
                lambda record=record: _refit(model, work, record, grid),  # type: ignore[misc]
            )
        report = {
            matrix: {
                key: None if np.isnan(value) else float(value)
                for key, value in zip(_REPORT, arrays[f"{matrix}.report"], strict=True)
            }
            for matrix in ("o_proj", "down_proj")
        }
        rows.append([record.index, *(_both(report, key) for key in _REPORT)])
        yield record.adding({"refit": name}, {"refit": report})


_REPORT = ("removed", "refitted", "held_out_removed", "held_out_refitted", "damping")


def _refit(
    model: Model, work: Path, record: records.LayerRecord, grid: tuple[float, ...]
) -> dict[str, np.ndarray]:
    """The refitted weights of a layer, and what they gain.

    Returns:
      ``o_proj.weight`` (D, k) and ``down_proj.weight`` (D, k'), float32, as a checkpoint stores
      them with the pruned columns gone; their ``bias`` where the model has one; and ``report``:
      relative output errors and the damping (`_REPORT`), NaN where there is none.
    """
    shape = model.config.layer_shapes[record.index]
    kept = rows_kept(kept_units(work, record, shape), shape, model.config.head_dim)
    stats = all_stats(work, record)
    held = workdir.load(work, record.files["held_out"]) if "held_out" in record.files else None
    biased = {"o": model.config.attention_bias, "down": model.config.mlp_bias}
    out: dict[str, np.ndarray] = {}
    for matrix in ("o", "down"):
        with naming(f"{matrix}_proj"):
            W = used_weight(model, record.index, matrix)
            bias = (
                model.part(record.index, f"{matrix}_bias").astype(np.float64)
                if biased[matrix]
                else None
            )
            parts = _refit_matrix(W, bias, kept[matrix], *_moments(matrix, stats, held), grid)
            out |= {f"{matrix}_proj.{name}": value for name, value in parts.items()}
        if not kept[matrix].all() and np.isnan(parts["report"][-1]):
            console.log.warning(
                "layer %d, %s_proj: no damping served the held-out tokens; rows are removed and "
                "not refitted",
                record.index,
                matrix,
            )
    return out


def _moments(
    matrix: str, stats: dict[str, np.ndarray], held: dict[str, np.ndarray] | None
) -> tuple[Any, Any]:
    """(A, Σx, tokens) of all tokens, and of those held out (None where there are none)."""

    def of(source: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
        total = source[f"{matrix}.total"].astype(np.float64)
        return gram.unpack(source[f"{matrix}.gram"]), total, int(source["tokens"][0])

    return of(stats), None if held is None else of(held)


def _refit_matrix(
    W: np.ndarray,
    bias: np.ndarray | None,
    kept: np.ndarray,
    every: tuple[np.ndarray, np.ndarray, int],
    held: tuple[np.ndarray, np.ndarray, int] | None,
    grid: tuple[float, ...],
) -> dict[str, np.ndarray]:
    A, total, tokens = every
    mean = total / tokens
    if kept.all():
        report = [0.0, 0.0, 0.0, 0.0, np.nan]
        return _parts(W, bias, report)

    # With a bias the mean is refitted by it, and the weights by what varies around the mean.
    def centred(sums: tuple[np.ndarray, np.ndarray, int], about: np.ndarray) -> np.ndarray:
        return sums[0] if bias is None else compensation.centred(*sums, about)

    energy = compensation.output_energy(A, W) or 1.0
    if held is not None:
        A_h, total_h, tokens_h = held
        fit = (A - A_h, total - total_h, tokens - tokens_h)
        fit_mean = fit[1] / fit[2]
        choice = compensation.choose_damping(
            W, centred(fit, fit_mean), centred(held, fit_mean), kept, grid
        )
        energy_held = compensation.output_energy(A_h, W) or 1.0
        unseen = [choice.before / energy_held, choice.after / energy_held]
        damping = choice.damping
    elif len(grid) == 1:
        unseen, damping = [np.nan, np.nan], grid[0]
    else:
        raise RecordError(
            "--damping",
            "no tokens were held out to choose it on",
            "give one number, or calibrate with --held-out",
        )

    A_c = centred(every, mean)
    error = compensation.OutputError(W, A_c, kept)
    if damping is None:
        dW_k = np.zeros((int(kept.sum()), W.shape[1]))
    else:
        dW_k = compensation.refit(W, A_c, kept, damping=damping)
    report = [
        compensation.output_energy(A[np.ix_(~kept, ~kept)], W[~kept]) / energy,
        error(dW_k) / energy,
        *unseen,
        np.nan if damping is None else damping,
    ]
    # b = b + m_pᵀ W_p − m_kᵀ δW_k
    new_bias = None if bias is None else bias + mean[~kept] @ W[~kept] - mean[kept] @ dW_k
    return _parts(W[kept] + dW_k, new_bias, report)


def _parts(W: np.ndarray, bias: np.ndarray | None, report: list[float]) -> dict[str, np.ndarray]:
    parts = {"weight": W.T.astype(np.float32), "report": np.array(report)}
    return parts if bias is None else {**parts, "bias": bias.astype(np.float32)}


def _both(report: dict[str, dict[str, float | None]], key: str) -> str:
    values = (report[matrix][key] for matrix in ("o_proj", "down_proj"))
    return " | ".join("–" if v is None else f"{v:.4g}" for v in values)
