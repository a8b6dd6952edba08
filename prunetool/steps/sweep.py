"""The loss that score predicted for every sparsity of a sweep."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunetool import records, workdir
from prunetool.errors import PrunetoolError
from prunetool.model import Model

Point = tuple[float, float]  # fraction of the layers' parameters removed; loss added, nats a token


def predicted(header: records.Header, model: Model) -> list[Point]:
    """The points of all sparsities that were scored from the same calibration in the same way.

    Args:
      header: of the stream.
      model: before pruning.

    Returns:
      In order of the fraction removed; empty if the stream's last score predicted no loss.
    """
    steps = [number for number, step in enumerate(header.history) if step["command"] == "score"]
    if not steps or "min_channels" not in header.history[steps[-1]]["options"]:
        return []  # of other targets than heads and channels
    wanted = _but_sparsity(header.history[: steps[-1] + 1])
    points = set()
    dense, size = model.config.layer_shapes, model.layer_parameters
    for path in Path(header.work).glob(f"score-*/{workdir.RECORDS_NAME}"):
        try:
            with path.open(encoding="utf-8") as stream:
                other, layers = records.read(stream)
                values = [record.values for record in layers]
            nats = sum(sum(of.get("nats", {}).values()) for of in values)
            left = [
                size(shape.keeping(of["kept"]["kv_heads"], of["kept"]["channels"]))
                for shape, of in zip(dense, values, strict=True)
            ]
            point = 1 - sum(left) / sum(map(size, dense)), nats
        except (PrunetoolError, OSError, UnicodeError, KeyError, TypeError, ValueError):
            continue  # an older version's, or damaged: not what this page is about
        if _but_sparsity(other.history) == wanted and nats and all(map(math.isfinite, point)):
            points.add(point)
    return sorted(points)


def _but_sparsity(history: Sequence[dict[str, Any]]) -> list[Any]:
    """What was asked up to a score, but for its sparsity."""
    *before, last = [(step["command"], step["options"]) for step in history]
    return [*before, (last[0], {k: v for k, v in last[1].items() if k != "sparsity"})]
