"""Where a checkpoint's tensors are stored: in which safetensors file, and where in it.

Both are known from names, dtypes and shapes alone, before any tensor is made.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from prunetool.checkpoint.index import DTYPES

CODES = {name: code for code, name in DTYPES.items()}
HEADER_MULTIPLE = 8  # bytes; spaces pad the header to it


class TensorSpec(NamedTuple):
    """A tensor's shape and dtype before it is made; ``dtype`` is NumPy's name."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.size * np.dtype(self.dtype).itemsize


# Tensors by name that are made and written together, such as a layer's: never in two files.
Chunk = Mapping[str, TensorSpec]


def split(chunks: Sequence[Chunk], max_bytes: int) -> list[range]:
    """Assign chunks to shards, in order: as many as fit; a larger one gets its own shard.

    Args:
      chunks: the checkpoint's chunks, in the order in which they are made.
      max_bytes: limit on the tensors of a shard.
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
    """The beginning of a safetensors file, and where each tensor starts.

    As the library writes it: the header's length in eight bytes, then the header, which is JSON
    (https://github.com/huggingface/safetensors#format).
    """
    codes = list(CODES)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name, spec in sorted(tensors.items(), key=lambda item: (codes.index(item[1].dtype), item)):
        starts[name], end = end, end + spec.size_bytes
        header[name] = {
            "dtype": CODES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_MULTIPLE)
    data = len(text).to_bytes(8, "little") + text
    return data, {name: len(data) + start for name, start in starts.items()}
