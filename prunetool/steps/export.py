"""The pruned checkpoint, from the records of all layers."""

import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np

from prunetool import console, records, workdir
from prunetool.card import model_card
from prunetool.checkpoint.reader import dtype_of
from prunetool.checkpoint.writer import CheckpointWriter, begun, need_room, write_json, write_text
from prunetool.errors import WorkError
from prunetool.llama import forms
from prunetool.llama.config import LayerShape
from prunetool.llama.weights import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MATRICES,
    Layer,
    part_shapes,
    scatter,
    select,
    tensor_name,
    tensor_shapes,
)
from prunetool.model import Model, reopen
from prunetool.pruned import CHANNELS, HEADS, kept_units, masks

# Copied as they are; re-saving a tokenizer writes classes that older readers refuse.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*", "generation_config.json", "LICENSE*", "USE_POLICY*", "NOTICE*",
)  # fmt: skip


def write_checkpoint(
    header: records.Header,
    made: Sequence[records.LayerRecord],
    out: Path,
    *,
    run: str,
    dense: bool,
    overwrite: bool,
) -> list[str]:
    """Write the checkpoint, its index last.

    Args:
      header, made: the whole stream.
      out: the directory.
      run: what decides the bytes written (`CheckpointWriter`).
      dense: keep the original shapes, with zeros.
      overwrite: replace a checkpoint that lies there.

    Returns:
      What to say of it.

    Raises:
      WorkError: where the disk is short or ``out`` is taken.
    """
    model, work = reopen(header.model, header.fingerprint), Path(header.work)
    if out.exists() and out.resolve() == model.directory:
        raise WorkError(out, "is the model itself", "name another directory")
    kept = [
        kept_units(work, record, shape)
        for record, shape in zip(made, model.config.layer_shapes, strict=True)
    ]
    shapes = tuple(
        _kept_shape(shape, units)
        for shape, units in zip(model.config.layer_shapes, kept, strict=True)
    )
    target = model.config.with_shapes(model.config.layer_shapes if dense else shapes)
    kind = forms.choose_form(target)
    if kind == "pruned_llama":
        target = target.with_shapes(tuple(map(forms.normalised, target.layer_shapes)))
    itemsize = np.dtype(model.dtype).itemsize
    count = sum(int(np.prod(shape)) for shape in tensor_shapes(target).values())
    there = out.glob("*.safetensors") if begun(out, run) else ()
    need_room(out, count * itemsize - sum(path.stat().st_size for path in there))

    writer = CheckpointWriter(out, model.layers + 1, overwrite=overwrite, run=run)
    masked = any(name.startswith("mask.") for record in made for name in record.files)
    densities = []
    for record, units in zip(console.progress(made, "export", model.layers), kept, strict=True):
        number = record.index
        if dense:
            places = [np.flatnonzero(units[unit]) for unit in (HEADS, CHANNELS)]
        else:
            places = [np.arange(shapes[number].kv_heads), np.arange(shapes[number].channels)]

        def shard(
            record: records.LayerRecord = record,
            units: dict[str, np.ndarray] = units,
            places: list[np.ndarray] = places,
        ) -> dict[str, np.ndarray]:
            layer = _pruned_layer(model, work, record, units)
            shape, target_shape = shapes[record.index], target.layer_shapes[record.index]
            layer = scatter(layer, shape, target_shape, *places)
            return {
                tensor_name(record.index, part): array
                for part, array in layer._asdict().items()
                if array is not None
            }

        tensors = writer.write(shard)
        if masked:
            sizes = part_shapes(model.config, shapes[number])
            densities.append(_densities(tensors, number, sizes))
    ends = {EMBEDDING: model.embedding, FINAL_NORM: model.final_norm}
    if not model.config.tied:
        ends[HEAD] = model.head
    writer.write(lambda: {name: read() for name, read in ends.items()})

    write_json(out / "config.json", forms.config_json(target, kind))
    if kind == "pruned_llama":
        for name in forms.LOADER_FILES:
            text = resources.files("prunetool.loaders").joinpath(name).read_text("utf-8")
            write_text(out / name, text)
    for pattern in COMPANIONS:
        for file in sorted(model.directory.glob(pattern)):
            shutil.copyfile(file, out / file.name)
    label = "dense" if dense else kind
    card = model_card(header, model, label, shapes, writer.parameters, densities if masked else ())
    write_text(out / "README.md", card)
    writer.close()
    now, before = writer.parameters, model.parameters()
    said = [f"{kind}, {now:,} of {before:,} parameters ({1 - now / before:.2%} fewer)"]
    if masked:
        filled, size = np.sum([list(layer.values()) for layer in densities], axis=(0, 1))
        said.append(f"{filled:,} of {size:,} layer weights not zero ({filled / size:.2%})")
    return [*said, f"{writer.size_bytes / 1e6:,.1f} MB in {out}"]


def _densities(
    tensors: Mapping[str, np.ndarray], layer: int, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, int]]:
    """Weights that are not zero, and all of the units kept, of each of the seven matrices."""
    return {
        part: (
            int(np.count_nonzero(tensors[tensor_name(layer, part)])), int(np.prod(shapes[part]))
        )
        for part in MATRICES
    }  # fmt: skip


def _kept_shape(shape: LayerShape, units: dict[str, np.ndarray]) -> LayerShape:
    groups = int(units[HEADS].sum())
    return LayerShape(groups * shape.group_size, groups, int(units[CHANNELS].sum()))


def _pruned_layer(
    model: Model, work: Path, record: records.LayerRecord, units: dict[str, np.ndarray]
) -> Layer:
    """The layer with only what it keeps, refitted where compensate came before; stored dtypes."""
    shape = model.config.layer_shapes[record.index]
    layer = model.layer(record.index)
    masked = masks(model, work, record)
    layer = layer._replace(**{part: mask.on(getattr(layer, part)) for part, mask in masked.items()})
    layer = select(layer, shape, np.flatnonzero(units[HEADS]), np.flatnonzero(units[CHANNELS]))
    if "refit" not in record.files:
        return layer
    refit = workdir.load(work, record.files["refit"])
    for matrix in MATRICES:
        for part, name in (
            (matrix, f"{matrix}_proj.weight"),
            (f"{matrix}_bias", f"{matrix}_proj.bias"),
        ):
            if name in refit:
                dtype = dtype_of(model.index[tensor_name(record.index, part)])
                layer = layer._replace(**{part: refit[name].astype(np.dtype(dtype))})
    return layer
