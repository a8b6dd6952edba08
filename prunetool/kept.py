"""The units and weights that a layer keeps, from the files of ``score``.

A unit is a KV group with its query heads, or an MLP channel; a mask says whether each weight of a
matrix stays, and may come with new values for those that do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np

from prunetool import records, workdir
from prunetool.errors import RecordError
from prunetool.llama.config import LayerShape, LlamaConfig
from prunetool.llama.parts import MATRICES, PARTS
from prunetool.llama.weights import Bases, Layer, part_shapes, select, unit_axes, with_biases
from prunetool.methods import CHANNELS, GROUPS
from prunetool.model import Model

BINS = 4  # of a power of ten, in the histograms of scores that records have
FINAL = "final_norm"  # in the last layer's file of recover


def _array(work: Path, name: str, key: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Read an array of a step's file.

    Raises:
      RecordError: if it is missing, or of another dtype or shape.
    """
    array = workdir.TensorFile(work, name)[key]
    if array.dtype != dtype or array.shape != shape:
        raise RecordError(
            work / name,
            f"{key} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}",
            workdir.AGAIN,
        )
    return array


def kept_units(work: Path, record: records.LayerRecord, shape: LayerShape) -> dict[str, np.ndarray]:
    """Which KV groups (``heads``) and channels a layer keeps; all if no step decided.

    Returns:
      ``{"heads": (n_kv,) bool, "channels": (I,) bool}``.

    Raises:
      RecordError: if a file is missing, damaged, or of another layer's shape.
    """
    kept = {GROUPS: np.ones(shape.kv_heads, bool), CHANNELS: np.ones(shape.channels, bool)}
    for target, every in kept.items():
        if name := record.files.get(f"kept.{target}"):
            kept[target] = _array(work, name, target, bool, every.shape)
    return kept


class Extent(NamedTuple):
    """Rows and columns of a stored matrix that belong to kept units."""

    rows: np.ndarray  # (out,) bool
    columns: np.ndarray  # (in,) bool

    def of(self, W: np.ndarray) -> np.ndarray:
        """Select these rows and columns of W."""
        return np.asarray(W[np.ix_(*self)])


def extents(
    kept: dict[str, np.ndarray], shape: LayerShape, config: LlamaConfig
) -> dict[str, Extent]:
    """The extent of each of the seven matrices, from the kept units (`kept_units`)."""
    axes = {
        **dict.fromkeys(("hidden", "output"), np.ones(config.hidden_size, bool)),
        **unit_axes(kept[GROUPS], kept[CHANNELS], shape, config.head_dim),
    }
    return {part: Extent(*(axes[axis] for axis in PARTS[part].axes)) for part in MATRICES}


class Mask(NamedTuple):
    """Which weights of a matrix stay, and their new values if the step made any."""

    kept: np.ndarray  # (out, in) bool
    values: np.ndarray | None  # (out, in) float32

    def on(self, W: np.ndarray) -> np.ndarray:
        """The masked matrix in W's dtype."""
        new = W if self.values is None else self.values.astype(W.dtype)
        return np.where(self.kept, new, np.zeros((), W.dtype))


def pack_mask(part: str, mask: Mask) -> dict[str, np.ndarray]:
    """A mask as stored in a file, eight weights per byte."""
    packed = {f"{part}.kept": np.packbits(mask.kept, axis=1)}
    return packed if mask.values is None else {**packed, f"{part}.values": mask.values}


def masks(model: Model, work: Path, record: records.LayerRecord) -> dict[str, Mask]:
    """The masks of a layer's matrices, by part; only of matrices that a step masked."""
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


def output_weight(model: Model, layer: int, matrix: str) -> np.ndarray:
    """The dense model's W of ``o`` or ``down``, as output = X W, (D, D'), float64."""
    return np.ascontiguousarray(model.part(layer, matrix).T, np.float64)


def kept_shape(shape: LayerShape, units: dict[str, np.ndarray]) -> LayerShape:
    """The shape of a layer with these units (`kept_units`)."""
    return shape.keeping(int(units[GROUPS].sum()), int(units[CHANNELS].sum()))


def pruned_layer(
    model: Model, work: Path, record: records.LayerRecord, *, biased: bool = False
) -> Layer:
    """A layer with only what it keeps, refitted and recovered if these steps ran.

    Args:
      model: the dense checkpoint.
      work: the work directory.
      record: the layer's.
      biased: the result has biases in all matrices (`records.Header.adds_biases`).

    Returns:
      Its parts in the stored dtypes.

    Raises:
      RecordError: if a step's array does not fit what is kept.
    """
    shape = model.config.layer_shapes[record.index]
    units = kept_units(work, record, shape)
    layer = model.layer(record.index)
    if biased:
        layer = with_biases(layer)
    masked = masks(model, work, record)
    layer = layer._replace(**{part: mask.on(getattr(layer, part)) for part, mask in masked.items()})
    layer = select(layer, shape, np.flatnonzero(units[GROUPS]), np.flatnonzero(units[CHANNELS]))
    if "refit" in record.files:
        names = {part: f"{part}_proj.weight" for part in MATRICES}
        names |= {f"{part}_bias": f"{part}_proj.bias" for part in MATRICES}
        layer = _replaced(layer, model, work, record, "refit", names)
    if "recover" in record.files:
        names = {part: part for part in PARTS}
        layer = _replaced(layer, model, work, record, "recover", names)
    return layer


def cut_config(config: LlamaConfig, made: Sequence[records.LayerRecord]) -> LlamaConfig:
    """The config of a model, with the hidden size that its bases leave if there are any.

    Raises:
      RecordError: if the layers have different ones.
    """
    D = config.hidden_size
    said = [_hidden(record) for record in made]
    for record, own in zip(made, said, strict=True):
        if own != said[0] or (own and own[1] != D):
            where, what = f"layer {record.index}", "has another basis of the stream than layer 0"
            raise RecordError(where, what, "run the last score again")
    if not said[0]:
        return config
    cut = config.with_hidden_size if made[0].has_shared_basis else config.with_bases
    return cut(said[0][0])


def _hidden(record: records.LayerRecord) -> tuple[int, int, bool] | None:
    """k, D and whether the basis is that of all layers; None without one."""
    if "basis" not in record.files:
        return None
    said = record.values["hidden"]
    return int(said["kept"]), int(said["of"]), record.has_shared_basis


def bases_of(work: Path, made: Sequence[records.LayerRecord], layer: int) -> Bases:
    """The bases of the residual stream around a layer, (D, k) float32; of records as `cut_config`.

    Raises:
      RecordError: if a file is missing, damaged, or of another size.
    """

    def read(layer: int, name: str) -> np.ndarray:
        said = made[layer].values["hidden"]
        shape = int(said["of"]), int(said["kept"])
        return _array(work, made[layer].files["basis"], name, np.float32, shape)

    if made[layer].has_shared_basis:
        return Bases(*[read(layer, "basis")] * 3)
    behind = read(layer + 1, "attention") if layer + 1 < len(made) else None
    return Bases(read(layer, "attention"), read(layer, "mlp"), behind)


def pruned_norm(model: Model, work: Path, made: Sequence[records.LayerRecord]) -> np.ndarray:
    """The final norm's weight, in its stored dtype: the last layer's file has a recovered one."""
    norm = model.final_norm()
    if "recover" not in made[-1].files:
        return norm
    return _array(work, made[-1].files["recover"], FINAL, np.float32, norm.shape).astype(norm.dtype)


def _replaced(
    layer: Layer,
    model: Model,
    work: Path,
    record: records.LayerRecord,
    kind: str,
    names: dict[str, str],
) -> Layer:
    """The layer with the parts that a step's file has, by their names there."""
    new = {}
    file = workdir.TensorFile(work, record.files[kind])
    for part, name in names.items():
        if name not in file:
            continue
        old = getattr(layer, part)
        if old is None:
            raise RecordError(work / record.files[kind], f"{name} has no place", workdir.AGAIN)
        array = _array(work, record.files[kind], name, np.float32, old.shape)
        new[part] = array.astype(old.dtype)
    return layer._replace(**new)
