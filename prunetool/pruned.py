"""What the steps behind ``score`` share: the units and weights a layer keeps.

A unit is a KV group with its query heads, or an MLP channel; a mask says of each weight of a matrix
whether it stays, and may come with new values of those that do.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from prunetool import records, workdir
from prunetool.errors import RecordError
from prunetool.llama.config import LayerShape, LlamaConfig
from prunetool.llama.weights import MATRICES, part_shapes
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


class Stats:
    """A layer's sums over the calibration tokens, read as they are asked for.

    Args:
      work: the work directory.
      record: the layer's record.

    Attributes:
      parts: the kinds of the files: the tokens to fit (``stats``), and those held out
        (``held_out``) where there are any. All that is asked for is summed over ``parts``.

    Raises:
      RecordError: where the stream does not come from calibrate.
    """

    def __init__(
        self,
        work: Path,
        record: records.LayerRecord,
        parts: tuple[str, ...] = ("stats", "held_out"),
    ) -> None:
        if "stats" not in record.files:
            raise RecordError(
                f"layer {record.index}", "has no stats", "put prunetool calibrate before this step"
            )
        self.parts = tuple(part for part in parts if part in record.files)
        self._files = [workdir.TensorFile(work, record.files[part]) for part in self.parts]

    def __contains__(self, name: str) -> bool:
        return name in self._files[0]

    def __getitem__(self, name: str) -> np.ndarray:
        """The sum of this name (``o.total``, ``down.gram``: packed), float64."""
        first, *others = self._files
        out = first[name].astype(np.float64)
        for other in others:
            out += other[name]
        return out

    @property
    def tokens(self) -> int:
        """How many tokens."""
        return int(self["tokens"][0])


class Extent(NamedTuple):
    """Which rows and columns of a matrix, as a checkpoint stores it, are of units kept."""

    rows: np.ndarray  # (out,) bool
    columns: np.ndarray  # (in,) bool

    def of(self, W: np.ndarray) -> np.ndarray:
        """W with only those."""
        return np.asarray(W[np.ix_(*self)])


def extents(
    kept: dict[str, np.ndarray], shape: LayerShape, config: LlamaConfig
) -> dict[str, Extent]:
    """The same for each of the seven matrices, from the units kept (`kept_units`)."""
    every = np.ones(config.hidden_size, bool)
    kv = np.repeat(kept[HEADS], config.head_dim)
    heads = np.repeat(kept[HEADS], shape.group_size * config.head_dim)
    channels = kept[CHANNELS]
    return {
        "q": Extent(heads, every), "k": Extent(kv, every), "v": Extent(kv, every),
        "o": Extent(every, heads),
        "gate": Extent(channels, every), "up": Extent(channels, every),
        "down": Extent(every, channels),
    }  # fmt: skip


class Mask(NamedTuple):
    """Which weights of a matrix stay, and their new values where the step gave some."""

    kept: np.ndarray  # (out, in) bool
    values: np.ndarray | None  # (out, in) float32

    def on(self, W: np.ndarray) -> np.ndarray:
        """The masked matrix in W's dtype."""
        new = W if self.values is None else self.values.astype(W.dtype)
        return np.where(self.kept, new, np.zeros((), W.dtype))


def pack_mask(part: str, mask: Mask) -> dict[str, np.ndarray]:
    """A mask as a file keeps it, eight weights a byte."""
    packed = {f"{part}.kept": np.packbits(mask.kept, axis=1)}
    return packed if mask.values is None else {**packed, f"{part}.values": mask.values}


def masks(model: Model, work: Path, record: records.LayerRecord) -> dict[str, Mask]:
    """The masks of a layer's matrices, by part; none for a matrix that no step masked."""
    shapes = part_shapes(model.config, model.config.layer_shapes[record.index])
    names = {part: record.files.get(f"mask.{part}") for part in MATRICES}
    files = {name: workdir.load(work, name) for name in set(names.values()) if name}
    found = {}
    for part, name in names.items():
        if name:
            packed = files[name][f"{part}.kept"]
            kept = np.unpackbits(packed, axis=1, count=shapes[part][1]).astype(bool)
            found[part] = Mask(kept, files[name].get(f"{part}.values"))
    return found


def used_weight(model: Model, layer: int, matrix: str) -> np.ndarray:
    """W of ``o`` or ``down`` as output = X W, (D, D'), float64."""
    return np.ascontiguousarray(model.part(layer, matrix).T, np.float64)
