"""What the steps behind ``score`` share: the units and weights a layer keeps.

A unit is a KV group with its query heads, or an MLP channel; a mask says of each weight of a matrix
whether it stays, and may come with new values of those that do.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prunetool import console, records, workdir
from prunetool.checkpoint import checksum
from prunetool.errors import CheckpointError, RecordError
from prunetool.llama.config import LayerShape, LlamaConfig
from prunetool.llama.weights import MATRICES, PARTS, input_sizes, part_shapes, unit_axes
from prunetool.model import Model, open_model, read_weights

HEADS, CHANNELS = TARGETS = ("heads", "channels")


def reopen(header: records.Header) -> Model:
    """Open the checkpoint of a stream, in whose work directory its steps read and write.

    Raises:
      WorkError: if the work directory is not the stream's (`workdir.run_of`).
      CheckpointError: if the checkpoint is no longer as it was calibrated. Of tensors beyond their
        first rows, reading one raises it (`Model.read`).
    """
    run = workdir.run_of(header)
    if not Path(header.model).is_dir():  # a stream must not make anybody ask the Hub
        raise CheckpointError(header.model, "no such directory", "calibrate again")
    model = open_model(header.model)
    now = model.identity()
    if changed := workdir.differing({key: run.get(key) for key in now}, now):
        raise CheckpointError(
            header.model, f"its {changed[0].key} has changed since it was calibrated",
            "restore it, or calibrate again",
        )  # fmt: skip
    if header.fingerprint != checksum.of_json(now) or header.layers != model.layers:
        raise RecordError("header", "is of another checkpoint than its run", records.AGAIN)
    return replace(model, recorded=Path(header.work) / workdir.WEIGHTS_NAME)


def recall_weights(model: Model, work: Path, *, overwrite: bool) -> bool:
    """Take the checksums of the tensors that a killed run has read as known.

    Returns:
      Whether the run can go on; if not, it starts again.

    Raises:
      CheckpointError: if a tensor has changed since; with ``overwrite``, all that was made of it is
        removed instead.
    """
    path = work / workdir.WEIGHTS_NAME
    try:
        known = read_weights(path)
    except CheckpointError as error:
        console.log.warning("%s: %s; starting again", path, error.what)
    else:
        try:
            model.recall(known)
            return True
        except CheckpointError:
            if not overwrite:
                raise
    workdir.drop(work)  # what later steps made of other weights too
    model.checksums.clear()
    return False


def _array(work: Path, name: str, key: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a step's file.

    Raises:
      RecordError: if it is not there, or is of another dtype or shape.
    """
    array = workdir.TensorFile(work, name)[key]
    if array.dtype != dtype or array.shape != shape:
        raise RecordError(
            work / name, f"{key} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}",
            workdir.AGAIN,
        )  # fmt: skip
    return array


def kept_units(work: Path, record: records.LayerRecord, shape: LayerShape) -> dict[str, np.ndarray]:
    """Which KV groups (``heads``) and channels a layer keeps; all if no step decided.

    Returns:
      ``{"heads": (n_kv,) bool, "channels": (I,) bool}``.

    Raises:
      RecordError: if a file is missing, damaged, or of another layer's shape.
    """
    kept = {HEADS: np.ones(shape.kv_heads, bool), CHANNELS: np.ones(shape.channels, bool)}
    for target, every in kept.items():
        if name := record.files.get(f"kept.{target}"):
            kept[target] = _array(work, name, target, bool, every.shape)
    return kept


class Stats:
    """A layer's sums over the calibration tokens, read as they are asked for.

    Args:
      work: the work directory.
      record: the layer's record.
      config: of the model.

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
        config: LlamaConfig,
        parts: tuple[str, ...] = ("stats", "held_out"),
    ) -> None:
        if "stats" not in record.files:
            raise RecordError(
                f"layer {record.index}", "has no stats", "put prunetool calibrate before this step"
            )
        self.parts = tuple(part for part in parts if part in record.files)
        self._files = [workdir.TensorFile(work, record.files[part]) for part in self.parts]
        self._where = work / record.files["stats"]
        shape = config.layer_shapes[record.index]
        self._sizes = input_sizes(config, shape)
        self._hidden, self._blocks = config.hidden_size, shape.kv_heads

    def __contains__(self, name: str) -> bool:
        return name in self._files[0]

    def __getitem__(self, name: str) -> np.ndarray:
        """The sum of this name (``o.total``, ``down.gram``: packed), float64."""
        first, *others = (file[name] for file in self._files)
        due = self._shape(name)
        for array in (first, *others):
            if array.dtype.kind not in "fi" or array.shape != due:
                raise RecordError(
                    self._where, f"{name} is {array.dtype} {array.shape}, not of shape {due}",
                    workdir.AGAIN,
                )  # fmt: skip
        out = first.astype(np.float64)
        for other in others:
            out += other
        return out

    def _shape(self, name: str) -> tuple[int, ...]:
        """What calibrate writes under this name."""
        site, _, kind = name.partition(".")
        size = self._sizes.get(site, self._hidden)
        if kind == "token_blocks":
            return self._blocks, size // self._blocks, size // self._blocks
        triangle = size * (size + 1) // 2
        return {"": (1,), "gram": (triangle,), "token_gram": (triangle,)}.get(kind, (size,))

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
    axes = {
        "hidden": np.ones(config.hidden_size, bool),
        **unit_axes(kept[HEADS], kept[CHANNELS], shape, config.head_dim),
    }
    return {part: Extent(*(axes[axis] for axis in PARTS[part].axes)) for part in MATRICES}


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
    found = {}
    for part in MATRICES:
        if name := record.files.get(f"mask.{part}"):
            rows, columns = shapes[part]
            packed = _array(work, name, f"{part}.kept", np.uint8, (rows, -(-columns // 8)))
            kept = np.unpackbits(packed, axis=1, count=columns).astype(bool)
            key, values = f"{part}.values", None
            if key in workdir.TensorFile(work, name):
                values = _array(work, name, key, np.float32, shapes[part])
            found[part] = Mask(kept, values)
    return found


def used_weight(model: Model, layer: int, matrix: str) -> np.ndarray:
    """W of ``o`` or ``down`` as output = X W, (D, D'), float64."""
    return np.ascontiguousarray(model.part(layer, matrix).T, np.float64)
