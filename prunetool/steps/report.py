"""What a report of a run says: what each layer keeps, at what cost, and every head's error."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from prunetool import console, records, workdir
from prunetool.checkpoint.hub import hub_id
from prunetool.errors import RecordError, shown
from prunetool.kept import BINS, cut_config, extents, kept_shape, kept_units, masks
from prunetool.llama import forms
from prunetool.llama.config import LlamaConfig
from prunetool.llama.parts import SHORTCUTS
from prunetool.llama.weights import part_shapes
from prunetool.methods import CHANNELS, GROUPS
from prunetool.model import Model
from prunetool.pruning import curve
from prunetool.steps import picture, sweep
from prunetool.steps.page import NOTHING, Cell, Figure, Page, Row, Table
from prunetool.steps.run import reopen

COSTS = "Time and memory of each step (of its longest run that reached the end)"
SCORED = {CHANNELS: "MLP channels", GROUPS: "KV heads"}
TINY = 1e-12  # nats; less is nothing to draw
WIDEST = 200  # bars of a histogram
COLUMNS = ("query heads", "KV heads", "MLP channels")
MAPS = {"own": "each model's own input", "same_input": "the dense model's input"}
SUMMARY = "mean {mean:.4g}, worst {worst:.4g} (layer {worst_layer} head {worst_head})"
Columns = dict[Any, Cell]  # a layer's row


class Evaluation(NamedTuple):
    """A result of ``prunetool evaluate``.

    Attributes:
      file: its name.
      lines: names and values to show.
      maps: heat maps: caption, and the errors of heads by layer, NaN if there is none.
      point: the model's parameters, and its loss minus the dense model's, nats a token; None if
        it was not compared.
    """

    file: str
    lines: list[tuple[str, str]]
    maps: list[tuple[str, list[list[float]]]]
    point: tuple[int, float] | None


def read_evaluation(path: Path) -> Evaluation:
    """Read a result of ``prunetool evaluate``.

    Raises:
      RecordError: if it is something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
        lines = [("perplexity", _perplexity(value))]
        lines += _accuracy(value, "accuracy")
        maps, point = [], None
        if "against" in value:
            dense = value["against"]
            lines += [("before", _perplexity(dense)), *_accuracy(dense, "accuracy before")]
            lines.append(("KL", f"{dense['kl']:.4f} nats"))
            if "loss" in value and "loss" in dense:
                added = float(value["loss"]) - float(dense["loss"])
                size = int(value["parameters"])
                # A point that can be drawn: no absurd size, and no difference in the last bits.
                if 0 <= size < 1 << 62:
                    point = size, added if abs(added) > TINY else 0.0
            for name, label in MAPS.items():
                found = dense["attention_error"][name]
                said = "no head to compare" if found["mean"] is None else SUMMARY.format_map(found)
                rows = [list(map(_known, row)) for row in found["by_head"]]
                maps.append((f"Attention error by layer and head on {label}: {said}", rows))
        lines += [("model", _named(value["model"])), ("tokens", f"{value['tokens']:,}")]
        if used := value.get("calibrated"):
            lines.append(("of them calibrated on", f"about {used:.0%}"))
    except OSError as error:
        raise RecordError(path, error.strerror or "cannot be read", "check the name") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        what = f"is not an evaluation ({type(error).__name__}: {error})"
        raise RecordError(path, what, "name a file that prunetool evaluate printed") from error
    return Evaluation(_named(path), lines, maps, point)


def _named(path: object) -> str:
    """A path as typed, without the directories of this machine."""
    where = Path(str(path))
    return shown(where.name if where.is_absolute() else path)


def _accuracy(of: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """A line of what a model reached on items with choices, if it was measured."""
    if "accuracy" not in of:
        return []
    spread = f"{of['accuracy']:.1%} ± {of['standard_error']:.1%}"
    return [(name, f"{spread} of {of['items']:,} items")]


def _known(error: object) -> float:
    """An error value of an evaluation; NaN for null.

    Raises:
      TypeError: if it is not a number.
    """
    if error is None:
        return math.nan
    if not isinstance(error, int | float):
        raise TypeError(f"an error of type {type(error).__name__}")
    return float(error)


def _perplexity(of: dict[str, Any]) -> str:
    found = of["perplexity"]
    return "too large for a number" if found is None else f"{found:.4f}"


def make_page(
    header: records.Header,
    made: Sequence[records.LayerRecord],
    evaluations: Sequence[Evaluation],
    speeds: Table | None,
) -> tuple[Page, str]:
    """The page for a complete stream, evaluations and speeds; and what to report about it."""
    model, work = reopen(header), Path(header.work)
    shapes = [
        kept_shape(shape, kept_units(work, record, shape))
        for shape, record in zip(model.config.layer_shapes, made, strict=True)
    ]
    config = cut_config(model.config.with_shapes(tuple(shapes)), made)
    configs = (config, forms.normalised(config))
    sizes = [_sizes(model, configs, work, r) for r in console.progress(made, header.layers)]
    kept, stored, dense = (sum(of[2][i] for of in sizes) for i in range(3))
    counts: list[Row] = [["before", f"{dense:,}", _share(dense, dense)]]
    counts.append(["stored", f"{stored:,}", _share(stored, dense)])
    if kept < stored:
        counts.append(["of these, not zero", f"{kept:,}", _share(kept, dense)])
    asked = [
        [
            shown(step["command"]),
            ", ".join(
                f"{shown(name)} {shown(value)}"
                for name, value in step["options"].items()
                if name not in records.CHECKSUMS and not any(value is no for no in (None, False))
            ),
        ]
        for step in header.history
    ]
    errors = [_errors(record.values) for record in made]
    nats = [
        {name: Cell(f"{loss:.3g}") for name, loss in record.values.get("nats", {}).items()}
        for record in made
    ]
    units = [of[0] for of in sizes]
    parts: list[Table | Figure] = [
        Table("Weights of the decoder layers' matrices", counts, ("", "weights", "share")),
        *(Table(f"Evaluation {of.file}", of.lines, kind="words") for of in evaluations),
        *([speeds] if speeds else []),
        Table(COSTS, list(_costs(header, work)), ("step", "seconds", "peak memory, MB")),
        _units(units),
        *_scores(made),
        _by_layer("Units kept", units),
        _by_layer("Weights kept, of those before", [of[1] for of in sizes]),
        _by_layer("Predicted loss after the refit, nats a token", nats),
        *_sweep(header, model, evaluations),
        *_recovered(made[0]),
        *_cut(made),
        _by_layer("Relative output error by plain removal", [of[0] for of in errors]),
        _by_layer("Relative output error, plain removal → refitted", [of[1] for of in errors]),
        _by_layer("Relative error of the attention matrices", [of[2] for of in errors]),
        *_maps(evaluations),
        Table("What was requested", asked, kind="words"),
    ]
    name = hub_id(Path(header.model)) or _named(header.source)
    page = Page(
        f"{name}, pruned", [part for part in parts if not isinstance(part, Table) or part.rows]
    )
    return page, f"{kept:,} of {dense:,} layer weights kept"


def _sizes(
    model: Model, configs: tuple[LlamaConfig, LlamaConfig], work: Path, record: records.LayerRecord
) -> tuple[Columns, Columns, list[int]]:
    """What a layer keeps: units; weights; numbers of kept weights, of kept units, and before.

    Args:
      model: before pruning.
      configs: of the result, and as export pads it.
      work: the work directory.
      record: the layer's.
    """
    shape, weights = model.config.layer_shapes[record.index], {}
    units, masked = kept_units(work, record, shape), masks(model, work, record)
    left, padded = (part_shapes(config, config.layer_shapes[record.index]) for config in configs)
    for part, extent in extents(units, shape, model.config).items():
        kept, stored = math.prod(left[part]), math.prod(padded[part])
        if part in masked:
            kept = int(extent.of(masked[part].kept).sum())
        weights[part] = [kept, stored, extent.rows.size * extent.columns.size]
    between = sum(math.prod(left[part]) for part in SHORTCUTS if part in left)
    if between:
        weights["between bases"] = [between, between, 0]
    weights["all"] = [sum(counts) for counts in zip(*weights.values(), strict=True)]
    groups, channels = int(units[GROUPS].sum()), int(units[CHANNELS].sum())
    now = (groups * shape.group_size, groups, channels)
    of = zip(COLUMNS, now, (shape.heads, shape.kv_heads, shape.channels), strict=True)
    cells = {unit: _share(kept, before, f"{kept} / {before}") for unit, kept, before in of}
    shares = {
        part: _share(kept, dense) if dense else Cell(f"{kept:,}")
        for part, (kept, _, dense) in weights.items()
    }
    return cells, shares, weights["all"]


def _errors(values: dict[str, Any]) -> tuple[Columns, Columns, Columns]:
    """A layer's errors by column: for plain removal, refits and attention."""
    plain = {f"{name}, removed": _error(loss) for name, loss in values.get("loss", {}).items()}
    for part, mask in values.get("masks", {}).items():
        plain[f"{part}_proj, masked"] = _error(mask["loss"])
    refits: Columns = {}
    for name, of in values.get("refit", {}).items():
        columns = (name, f"{name}, held out", f"{name}, damping")
        tried = _error(of["held_out_removed"], of["held_out_refitted"])
        damping = Cell("none" if of["damping"] is None else of["damping"])
        cells = [_error(of["removed"], of["refitted"]), tried, damping]
        refits |= zip(columns, cells if of["removed"] else [NOTHING] * 3, strict=True)
    found = values.get("attention", {})
    seen, unseen = (_error(found.get(kind)) for kind in ("calibration", "held_out"))
    return plain, refits, {"calibration": seen, "held out": unseen}


def _cut(made: Sequence[records.LayerRecord]) -> Iterator[Table]:
    """The hidden size, and what each norm's input keeps of its energy, if hidden was a target."""
    if said := made[0].values.get("hidden"):
        yield Table("Hidden size", [["before", said["of"]], ["now", said["kept"]]])
        shares = [record.values["hidden"]["share"] for record in made]
        columns = [{f"before {k}": Cell(f"{v:.2%}", v) for k, v in of.items()} for of in shares]
        yield _by_layer("Energy of the residual stream that is kept", columns)


def _recovered(record: records.LayerRecord) -> Iterator[Table]:
    """The table of what recover reached, if it ran: every record has it."""
    if said := record.values.get("recover"):
        losses = f"{said['kl_before']:.4f} → {said['kl_after']:.4f}"
        rows: list[Row] = [["held-out KL, nats a token", losses], ["steps", said["steps"]]]
        yield Table("Recovered", rows)


def _sweep(
    header: records.Header, model: Model, evaluations: Sequence[Evaluation]
) -> Iterator[Figure]:
    """The loss by the fraction removed, of all sparsities and of the evaluations."""
    total = sum(map(model.layer_parameters, model.config.layer_shapes))
    measured = [
        ((model.parameters() - parameters) / total, added)
        for parameters, added in (found.point for found in evaluations if found.point)
        if math.isfinite(added)
    ]
    predicted = sweep.predicted(header, model)
    expected = [(removed, curve.INTERACTION * nats) for removed, nats in predicted]
    if len(expected) + len(measured) < 2:
        return
    lines = [
        (f"expected: {curve.INTERACTION} x score's prediction", "#3070b0", expected),
        ("measured by evaluate --against", "#c05020", sorted(measured)),
    ]
    caption = "Loss added, nats a token, by the fraction of the layers' parameters removed"
    yield Figure(caption, picture.lines(lines, caption, ("removed", "nats a token")), "loss")


def _costs(header: records.Header, work: Path) -> Iterator[Row]:
    """What each step took, where that is known."""
    for number, step in enumerate(header.history, 1):
        so_far = replace(header, history=header.history[:number])
        directory = workdir.step_directory(so_far) if number > 1 else workdir.STATS
        if cost := workdir.cost_of(work, directory):
            yield [shown(step["command"]), f"{cost[0]:,.1f}", f"{cost[1]:,}"]


def _scores(made: Sequence[records.LayerRecord]) -> Iterator[Figure]:
    """How many units of all layers have which score, of those that stay and those that go."""
    rows = []
    for target in (CHANNELS, GROUPS):
        total: dict[str, tuple[int, int]] = {}
        for record in made:
            for name, counts in record.values.get("scores", {}).get(target, {}).items():
                stay, go = counts
                before = total.get(name, (0, 0))
                total[name] = before[0] + stay, before[1] + go
        known = sorted(int(name) for name in total if name != "least")
        stay, go = total.get("least", (0, 0))
        bars = [("≤ 0", stay, go)] if "least" in total else []
        if known and known[-1] - known[0] < WIDEST:
            every = range(known[0], known[-1] + 1)
            for n in every:
                stay, go = total.get(str(n), (0, 0))
                bars.append((f"1e{n // BINS}" if n % BINS == 0 else "", stay, go))
        if bars:
            rows.append((f"{SCORED[target]}, by score: kept, and removed above", bars))
    if rows:
        caption = "How many units have which score: blue stay, red go"
        yield Figure(caption, picture.stacks(rows, ("#3070b0", "#c05020"), caption), "scores")


def _units(kept: Sequence[Columns]) -> Figure:
    """A picture of the heads and channels that every layer keeps."""
    rows = [
        (f"{name} kept, by layer", colour, [cells[name].value or 0.0 for cells in kept])
        for name, colour in (("KV heads", "#c05020"), ("MLP channels", "#3070b0"))
    ]
    return Figure("Units kept", picture.bars(rows, "Units kept, by layer"), "units")


def _maps(evaluations: Sequence[Evaluation]) -> Iterator[Table]:
    """The heat maps of all evaluations; all share one scale, for comparison."""
    every = (e for of in evaluations for _, rows in of.maps for row in rows for e in row)
    largest = max(filter(math.isfinite, every), default=0.0) or 1.0

    def cell(layer: int, head: int, error: float) -> Cell:
        if math.isnan(error):
            return Cell("–", error, f"layer {layer} head {head}: none")
        return Cell(f"{error:.2g}", error / largest, f"layer {layer} head {head}: {error}")

    for of in evaluations:
        for caption, rows in of.maps:
            if not any(error for row in rows for error in row):  # NaN is there, and not 0
                continue
            cells = [{j: cell(i, j, e) for j, e in enumerate(row)} for i, row in enumerate(rows)]
            yield _by_layer(f"{caption}; darkest: {largest:.4g}", cells, "map")


def _by_layer(caption: str, layers: Sequence[Columns], kind: str = "numbers") -> Table:
    """A folded table of the columns in which any layer has an entry; no rows if there are none."""
    every = dict.fromkeys(name for cells in layers for name in cells)
    names = [n for n in every if any(cells.get(n, NOTHING) != NOTHING for cells in layers)]
    rows = [[i, *(cells.get(n, NOTHING) for n in names)] for i, cells in enumerate(layers)]
    return Table(caption, rows if names else [], ["layer", *names], kind, folded=True)


def _share(kept: int, of: int, text: str = "") -> Cell:
    share = kept / (of or 1)
    return Cell(text or f"{share:.2%}", share, f"{kept:,} of {of:,}")


def _error(*errors: float | None) -> Cell:
    """Errors joined by arrows; the last one sets the colour."""
    known = [error for error in errors if error is not None]
    return Cell(" → ".join(f"{error:.4g}" for error in known), known[-1]) if known else NOTHING
