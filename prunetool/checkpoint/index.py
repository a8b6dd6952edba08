"""Which shard stores which tensor, with shapes and dtypes, from the headers alone."""

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  safetensors reads bfloat16 into NumPy only with its dtypes registered
import numpy as np
from safetensors import SafetensorError, safe_open

from prunetool.errors import CheckpointError, shown

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Supported dtypes: safetensors' codes, in the order in which its library stores tensors, by which
# each starts at a multiple of its item's size; and NumPy's names.
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class TensorInfo(NamedTuple):
    """A tensor as its shard's header describes it; ``dtype`` is safetensors' code (``BF16``)."""

    shard: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        count = np.dtype(DTYPES[self.dtype]).itemsize if self.dtype in DTYPES else 1
        for extent in self.shape:
            count *= extent
        return count


class Index(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint directory by name, in name order."""

    def __init__(self, directory: Path, tensors: dict[str, TensorInfo]) -> None:
        self.directory = directory
        self._tensors = dict(sorted(tensors.items()))

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def of(self, names: Iterable[str]) -> "Index":
        """The index of some of the tensors."""
        return Index(self.directory, {name: self[name] for name in names})

    def stamps(self) -> dict[str, list[int]]:
        """Size and times of every shard; if unchanged, nobody has written to it since."""
        shards = {tensor.shard for tensor in self.values()}
        found = {shard.name: shard.stat() for shard in shards}
        return {
            name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            for name, stat in sorted(found.items())
        }

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes, shard sizes and first rows, in hexadecimal."""

        def shard_of(item: tuple[str, TensorInfo]) -> Path:
            return item[1].shard

        total = hashlib.sha256()
        for shard, tensors in groupby(sorted(self.items(), key=shard_of), shard_of):
            total.update(json.dumps([shard.name, shard.stat().st_size]).encode())
            with safe_open(shard, "numpy", backend="pread") as file:
                for name, tensor in tensors:
                    total.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
                    total.update(file.get_slice(name)[:1].tobytes())
        return total.hexdigest()


def tokenizer_path(directory: Path) -> Path:
    """tokenizer.json, or tokenizer.model if only that exists."""
    path, model = directory / "tokenizer.json", directory / "tokenizer.model"
    return model if model.exists() and not path.exists() else path


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a checkpoint.

    Raises:
      CheckpointError: if the file cannot be read or is not a JSON object.
    """
    if path.exists() and not path.is_file():  # reading a named pipe would block
        raise CheckpointError(path, "is not a regular file", "download it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, "no such file", "give a checkpoint directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            path, f"cannot be read as JSON ({error})", "download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(path, "is not a JSON object", "download it again")
    return value


def read_index(directory: Path, unstored: Container[str] = ()) -> Index:
    """Read the headers of every shard of a checkpoint.

    As in transformers, a single file takes precedence over an index, all tensors of an index's
    shards count, listed or not, and of a tensor in two shards the last one counts.

    Args:
      directory: the checkpoint's directory.
      unstored: names that the index may list without any shard storing them, such as a tied head.

    Raises:
      CheckpointError: if there are no safetensors, a shard is missing or truncated, a tensor is not
        where the index says, or the index names a file outside the directory.
    """
    single, index_path = directory / SINGLE_NAME, directory / INDEX_NAME
    if single.exists():
        return Index(directory, _read_header(single))
    if not index_path.exists():
        raise CheckpointError(
            directory,
            f"holds neither {INDEX_NAME} nor {SINGLE_NAME}",
            "give a directory of safetensors (pickled .bin files are never read)",
        )

    listed = read_weight_map(index_path)
    headers = {shard: _read_header(directory / shard) for shard in sorted(set(listed.values()))}
    tensors = {name: info for header in headers.values() for name, info in header.items()}
    for name, shard in listed.items():
        if name not in headers[shard] and name not in unstored:
            raise CheckpointError(
                shard,
                f"no tensor {shown(name)}, which the index lists here",
                "download the shard again",
            )
    return Index(directory, tensors)


def read_weight_map(path: Path) -> dict[str, str]:
    """The shard of every tensor, from an index.

    Raises:
      CheckpointError: if it is not an index, or names a file outside its directory.
    """
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(s, str) for s in listed.values()):
        raise CheckpointError(path, "has no weight_map of names to files", "download it again")
    for shard in listed.values():
        if Path(shard).name != shard or shard in ("", "..", "."):
            raise CheckpointError(
                path, f"names {shard!r}, outside the directory", "do not trust this checkpoint"
            )
    return listed


def _read_header(shard: Path) -> dict[str, TensorInfo]:
    if shard.exists() and not shard.is_file():
        raise CheckpointError(shard, "is not a regular file", "download the shard again")
    try:
        with safe_open(shard, "numpy", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: TensorInfo(shard, name, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except FileNotFoundError:
        raise CheckpointError(shard, "no such shard", "download it again") from None
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: a name that is not text
        raise CheckpointError(
            shard, f"truncated or not safetensors ({error})", "download the shard again"
        ) from error
