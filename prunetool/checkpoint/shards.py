"""Where the tensors of a checkpoint lie: in which of its safetensors files, and where in the file.

Both are known from names, dtypes and shapes alone, before any tensor is made.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np

# NumPy's names and safetensors' codes, in the order in which its library stores tensors, by which
# each lies at a multiple of its item's size.
CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
HEADER_MULTIPLE = 8  # bytes, to which spaces fill the header


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is made; ``dtype`` is NumPy's name."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.size * np.dtype(self.dtype).itemsize


# Tensors by name that are made and written together, as those of a layer: never in two files.
Chunk = Mapping[str, TensorSpec]


def split(chunks: Sequence[Chunk], max_bytes: int) -> list[range]:
    """Which chunks each shard holds, in order: as many as fit; a larger one is alone in its shard.

    Args:
      chunks: of the checkpoint, in the order in which they are made.
      max_bytes: of the tensors in a shard.
    """
    shards: list[range] = []
    start = filled = 0
    for number, chunk in enumerate(chunks):
        size = sum(spec.size_bytes for spec in chunk.values())
        if number > start and filled + size > max_bytes:
            shards.append(range(start, number))
            start, filled = number, 0
        filled += size
    return [*shards, range(start, len(chunks))]


def layout(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """How a safetensors file begins, and where in it each tensor does.

    As the library writes it: the length of the header in eight bytes, and the header, which is JSON
    (https://github.com/huggingface/safetensors#format).
    """
    codes = list(CODES)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, spec in sorted(tensors.items(), key=lambda item: (codes.index(item[1].dtype), item)):
        starts[name], end = end, end + spec.size_bytes
        header[name] = {
            "dtype": CODES[spec.dtype], "shape": spec.shape, "data_offsets": [starts[name], end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_MULTIPLE)
    data = len(text).to_bytes(8, "little") + text
    return data, {name: len(data) + start for name, start in starts.items()}
