"""Run sequences through a model, one layer at a time, with the residual stream in files.

The stream between two layers is on disk, sequence by sequence, so memory depends on one layer and
one batch, not on the number of sequences (the page cache makes it as fast as memory if memory is
free), and a killed run can resume from it.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from io import RawIOBase
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import xxhash

from prunetool.checkpoint.checksum import CHUNK_BYTES
from prunetool.checkpoint.writer import atomic
from prunetool.errors import NumericalError, WorkError
from prunetool.llama import forward
from prunetool.llama.weights import Layer, map_layer
from prunetool.model import Model

KINDS = ("hidden", "residual", "gradient")  # of streams, by the first word of their files' names
SUM_BYTES = 16  # of the checksum after a stream's bytes: XXH3-128
BATCH_TOKENS = 2048  # a batch is as many whole sequences as fit, and at least one


class HiddenStates:
    """The residual stream of all sequences before one layer, (D, N) per sequence, or its gradient.

    Readers need not use the writer's batch size. A checksum of all bytes ends the file.

    Args:
      path: the file.
      hidden_size: D.
      samples, length: number of sequences, and tokens in each.
      dtype: as stored; in memory it is float32.
      durable: as in `writer.atomic`.
    """

    def __init__(
        self,
        path: Path,
        hidden_size: int,
        samples: int,
        length: int,
        dtype: str = "float32",
        *,
        durable: bool = True,
    ) -> None:
        self.path = path
        self.hidden_size = hidden_size
        self.samples = samples
        self.length = length
        self.dtype = np.dtype(dtype)
        self._durable = durable
        self._first = 0

    def at(self, path: Path, hidden_size: int | None = None) -> "HiddenStates":
        """Another file with the same sizes, but for D if given."""
        sizes = hidden_size or self.hidden_size, self.samples, self.length
        return HiddenStates(path, *sizes, self.dtype.name, durable=self._durable)

    def behind(self, first: int) -> "HiddenStates":
        """The same file to read, counted from another sequence on."""
        other = copy(self)
        other._first = first
        return other

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self.samples * self._sample_bytes + SUM_BYTES

    def is_whole(self) -> bool:
        """Whether the file exists, with this size and as written."""
        if self.path.is_symlink() or not self.path.is_file():
            return False
        left = self.path.stat().st_size - SUM_BYTES
        if left + SUM_BYTES != self.size_bytes:
            return False
        total = xxhash.xxh3_128()
        with self.path.open("rb") as file:
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                total.update(chunk)
                left -= len(chunk)
            return file.read() == total.digest()

    @property
    def _sample_bytes(self) -> int:
        return self.hidden_size * self.length * self.dtype.itemsize

    def read(self, batch: range) -> np.ndarray:
        """One batch, (D, B, N), float32."""
        out = np.empty((len(batch), self.hidden_size, self.length), self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek((self._first + batch.start) * self._sample_bytes)
            read_into(out, file, self.path)
        return out.swapaxes(0, 1).astype(np.float32, copy=False)

    @contextmanager
    def writing(self) -> Iterator[Callable[[range, np.ndarray], None]]:
        """Yield a function that writes the next batch; the file appears once complete."""
        total = xxhash.xxh3_128()

        def write(batch: range, h: np.ndarray) -> None:
            if file.tell() != batch.start * self._sample_bytes:
                raise AssertionError("batches are written in order")
            stored = np.ascontiguousarray(h.swapaxes(0, 1), self.dtype)
            data = stored.view(np.uint8).data.cast("B")
            total.update(data)
            file.write(data)

        with atomic(self.path, durable=self._durable) as partial, partial.open("wb") as file:
            yield write
            file.write(total.digest())


def read_into(array: np.ndarray, file: RawIOBase, path: Path) -> None:
    """Fill an array from an unbuffered file, named ``path`` if it is cut short."""
    view = array.view(np.uint8).reshape(-1).data
    while view:
        count = file.readinto(view)
        if not count:
            raise WorkError(path, "is cut short", "run the same command again")
        view = view[count:]


def path_before(work: Path, layer: int, suffix: str = "", kind: str = "hidden") -> Path:
    """Path of the residual stream before a layer, or of another ``kind`` of stream."""
    return work / f"{kind}-{layer:05d}{suffix}"


def paths(work: Path, suffix: str = "") -> list[Path]:
    """The streams that a killed run left, in the order of their layers."""
    name = re.compile(r"hidden-\d{5}" + re.escape(suffix))
    found = (path for path in work.glob("hidden-*") if name.fullmatch(path.name))
    return sorted(path for path in found if path.is_symlink() or path.is_file())


def layers_done(before: Callable[[int], HiddenStates], layers: int) -> int:
    """How many of the layers a killed run completed, by the last whole stream ``before`` one."""
    return next((n for n in range(layers, 0, -1) if before(n).is_whole()), 0)


def keep_only(path: Path, suffix: str = "") -> None:
    """Delete every stream file of this process but ``path``, the one to resume from."""
    for other in paths(path.parent, suffix):
        if other != path:
            other.unlink()


def batch_size(length: int) -> int:
    """Number of sequences that make about `BATCH_TOKENS` tokens."""
    return max(1, BATCH_TOKENS // length)


def batches(start: int, stop: int, size: int) -> list[range]:
    """Ranges of at most ``size`` sequences."""
    return [range(i, min(i + size, stop)) for i in range(start, stop, size)]


def embed(model: Model, tokens: np.ndarray, out: HiddenStates) -> None:
    """Write the embedded tokens, (samples, N) int32, as the stream before layer 0."""
    table = model.embedding()
    with out.writing() as write:
        for batch in batches(0, len(tokens), batch_size(tokens.shape[1])):
            rows = table[tokens[batch.start : batch.stop]].astype(np.float32)  # (B, N, D)
            write(batch, rows.transpose(2, 0, 1))


def rotation(model: Model, length: int) -> forward.Rotation:
    """The rotary angles of this model for sequences of ``length``."""
    config = model.config
    return forward.rotation(config.rope, config.head_dim, length, config.max_position_embeddings)


def to_device(layer: Layer, dtype: str) -> Layer:
    """A layer's arrays on the device, in the dtype of the products."""
    return map_layer(lambda part: jnp.asarray(part, dtype=jnp.dtype(dtype)), layer)


def return_free_memory() -> None:
    """Have glibc return free memory; it kept 0.9 GB after four layers' sums of a 7B model."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def check_finite(h: np.ndarray, layer: int, what: str = "outputs NaN or infinity") -> None:
    """Refuse a residual stream that overflowed, or its gradient.

    Raises:
      NumericalError: if it has NaN or infinity; names the layer.
    """
    if not np.isfinite(h.sum()):
        raise NumericalError(f"layer {layer}", what, "try --dtype float32, or check the model")
