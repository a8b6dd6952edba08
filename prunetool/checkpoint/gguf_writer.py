"""Tensors and a header -> a GGUF file, or several, one chunk of tensors in memory at a time.

The gguf library lays the file out and quantises. Files appear only when all are complete, the first
one last: llama.cpp opens that one.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from prunetool.checkpoint.gguf import gguf_name, parts_of
from prunetool.checkpoint.writer import atomic, need_room, sweep
from prunetool.errors import ConfigError, WorkError

Type = gguf.GGMLQuantizationType
FileType = gguf.LlamaFileType


class Kind(NamedTuple):
    """How matrices are stored.

    Attributes:
      matrices: type of the layers' matrices.
      ends: type of the embedding and head.
      file_type: llama.cpp's name for the whole.
    """

    matrices: Type
    ends: Type
    file_type: FileType


KINDS = {
    "f32": Kind(Type.F32, Type.F32, FileType.ALL_F32),
    "bf16": Kind(Type.BF16, Type.BF16, FileType.MOSTLY_BF16),
    "f16": Kind(Type.F16, Type.F16, FileType.MOSTLY_F16),
    "q8_0": Kind(Type.Q8_0, Type.Q8_0, FileType.MOSTLY_Q8_0),
    "q5_1": Kind(Type.Q5_1, Type.Q8_0, FileType.MOSTLY_Q5_1),
    "q5_0": Kind(Type.Q5_0, Type.Q8_0, FileType.MOSTLY_Q5_0),
    "q4_1": Kind(Type.Q4_1, Type.Q8_0, FileType.MOSTLY_Q4_1),
    "q4_0": Kind(Type.Q4_0, Type.Q8_0, FileType.MOSTLY_Q4_0),
}
SUFFIX = ".gguf"


class Tensor(NamedTuple):
    """A tensor of the file: its name there, its shape, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        values, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape)) // values * size


def plan_tensors(shapes: Mapping[str, tuple[int, ...]], kind: Kind) -> dict[str, Tensor]:
    """How each tensor of a checkpoint, by its name there, is stored.

    Vectors are float32. A matrix whose rows are no whole number of a type's blocks is float16, as
    llama.cpp stores it.
    """
    plan = {}
    for name, shape in shapes.items():
        stored = kind.matrices if name.startswith("model.layers.") else kind.ends
        if len(shape) == 1:
            stored = Type.F32
        elif shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
            stored = Type.F16
        plan[name] = Tensor(gguf_name(name), shape, stored)
    return plan


class _Writer(gguf.GGUFWriter):
    """The library's writer, with files of other names until they are complete."""

    partials: Sequence[Path] = ()

    def format_shard_names(self, path: Path) -> list[Path]:
        """The files to open."""
        return list(self.partials)


def write_gguf(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Sequence[Tensor],
    arrays: Iterable[Mapping[str, np.ndarray]],
    *,
    max_bytes: int,
    overwrite: bool,
    needed: Sequence[Path] = (),
) -> list[Path]:
    """Write a model.

    Args:
      path: the file; several are named after it.
      architecture: llama.cpp's name.
      fields: the header: ints, floats, bools, strings and lists of one of these.
      tensors: all tensors, in the order in which ``arrays`` yields them.
      arrays: arrays by the name in the file, chunk by chunk.
      max_bytes: limit on the tensors of a file.
      overwrite: replace files that exist.
      needed: files that are read and must stay.

    Returns:
      The files.

    Raises:
      WorkError: if a file exists or is needed, or the disk is too small.
      ConfigError: if a value is too large for its type.
    """
    size = sum(tensor.size_bytes for tensor in tensors)
    writer = _Writer(path, architecture, split_max_size=max_bytes if size > max_bytes else 0)
    for key, value in fields.items():
        _add(writer, key, value)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, tensor.type
        )
    paths = _paths(path, len(writer.tensors))
    old = [each for each in parts_of(path) if each not in paths]  # of another number of parts
    for there in (*paths, *old):
        if there.resolve() in {other.resolve() for other in needed}:
            raise WorkError(there, "is read by this command", "name another file")
        if there.exists() and not overwrite:
            raise WorkError(there, "exists", "give --overwrite, or name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    need_room(path.parent, size)
    for each in paths:
        sweep(each)
    with ExitStack() as stack:
        writer.partials = [stack.enter_context(atomic(each)) for each in paths]
        stack.callback(writer.close)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        expected = iter(tensors)
        for chunk in arrays:
            for name, array in chunk.items():
                tensor = next(expected)
                if (name, array.shape) != tensor[:2]:
                    raise AssertionError(f"{name} {array.shape} was made, not {tensor}")
                writer.write_tensor_data(_stored(array, tensor))
        if next(expected, None):
            raise AssertionError("tensors are missing")
        # No old first part may stand before new ones, and no other old file beside them.
        for each in (*old, *(paths[:1] if len(paths) > 1 else [])):
            each.unlink(missing_ok=True)
    return paths


def _paths(path: Path, count: int) -> list[Path]:
    """The files of a model in so many parts, as llama.cpp names them."""
    name = path.name.removesuffix(SUFFIX)
    parts = [f"{name}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]
    return [path] if count == 1 else [path.with_name(part) for part in parts]


def _stored(array: np.ndarray, tensor: Tensor) -> np.ndarray:
    values = np.ascontiguousarray(array, np.float32)
    with np.errstate(over="ignore"):
        made = gguf.quants.quantize(values, tensor.type)
    # Values of f16 and scales of the quantised types are float16: half of the largest number, as a
    # scale may be of the difference of two values.
    most = np.finfo(np.float16).max / (1 if tensor.type is Type.F16 else 2)
    if tensor.type not in (Type.F32, Type.BF16) and np.abs(values).max(initial=0) > most:
        raise ConfigError(
            tensor.name, f"has a value too large for {tensor.type.name}", "give --type bf16 or f32"
        )
    return made


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise AssertionError(f"{key} is a {type(value).__name__}")
