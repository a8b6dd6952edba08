"""What the steps behind ``score`` share: the units a layer keeps, and its weights as used."""

from pathlib import Path
from typing import Any

import numpy as np

from prunetool import records, workdir
from prunetool.llama.config import LayerShape
from prunetool.model import Model

HEADS, CHANNELS = TARGETS = ("heads", "channels")


def kept_units(work: Path, record: records.LayerRecord, shape: LayerShape) -> dict[str, np.ndarray]:
    """Which KV groups (``heads``) and channels a layer keeps; all where no step decided.

    Returns:
      ``{"heads": (n_kv,) bool, "channels": (I,) bool}``.
    """
    kept = {HEADS: np.ones(shape.kv_heads, bool), CHANNELS: np.ones(shape.channels, bool)}
    for target in TARGETS:
        if f"kept.{target}" in record.files:
            kept[target] = workdir.load(work, record.files[f"kept.{target}"])[target]
    return kept


def all_stats(work: Path, record: records.LayerRecord) -> dict[str, np.ndarray]:
    """A layer's sums over all calibration tokens, those held out included.

    Raises:
      RecordError: where the stream does not come from calibrate.
    """
    stats = workdir.load_kind(work, record, "stats", "calibrate")
    if "held_out" in record.files:
        for name, array in workdir.load(work, record.files["held_out"]).items():
            stats[name] = stats[name] + array
    return stats


def rows_kept(kept: dict[str, np.ndarray], shape: LayerShape, head_dim: int) -> dict[str, Any]:
    """The same as rows of the weights as used: ``{"o": (H d,), "down": (I,)}`` bool."""
    return {
        "o": np.repeat(kept[HEADS], shape.group_size * head_dim),
        "down": kept[CHANNELS],
    }


def used_weight(model: Model, layer: int, matrix: str) -> np.ndarray:
    """W of ``o`` or ``down`` as output = X W, (D, D'), float64."""
    return np.ascontiguousarray(model.part(layer, matrix).T, np.float64)
