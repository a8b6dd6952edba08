"""Files that appear whole or not at all, and checkpoints whose index is written last."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prunetool.checkpoint.index import INDEX_NAME, read_json
from prunetool.errors import WorkError

UNFINISHED = ".unfinished"  # in a checkpoint being written; holds its run


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; flush it to disk and rename it on success."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file atomically.

    Raises:
      WorkError: where it cannot be written, as on a full disk.
    """
    # safetensors writes the buffer as it lies in memory, so a transposed view would come out wrong.
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic(path) as partial:
        try:
            save_file(whole, partial, metadata={"format": "pt"})
        except SafetensorError as error:  # the library's own name for an OSError
            raise WorkError(path, str(error), "make room and run again") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def need_room(directory: Path, needed_bytes: int) -> None:
    """Refuse before the work begins where the disk cannot hold its result.

    Raises:
      WorkError: with the bytes missing.
    """
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise WorkError(
            directory,
            f"needs {needed_bytes / 1e9:.2f} GB of disk and {free / 1e9:.2f} GB are free",
            "make room or choose another place",
        )


class CheckpointWriter:
    """Writes a checkpoint shard by shard; the directory counts as a checkpoint after `close`.

    Args:
      directory: where; must not hold anything yet unless ``overwrite``.
      shards: how many there will be (their number is part of each name).
      overwrite: replace the files of a checkpoint that lies there.
      run: what decides the bytes written; what a killed writer of the same run left is gone on
        with, ``overwrite`` or not. Empty: never.

    Raises:
      WorkError: where the directory holds something else and ``overwrite`` is not given.
    """

    def __init__(
        self, directory: Path, shards: int, *, overwrite: bool = False, run: str = ""
    ) -> None:
        marker = directory / UNFINISHED
        if not begun(directory, run):
            refuse_non_empty(directory, overwrite=overwrite)
            directory.mkdir(parents=True, exist_ok=True)
            # A directory half cleared must not look whole, nor like something else.
            write_text(marker, "")
            (directory / INDEX_NAME).unlink(missing_ok=True)
            for entry in sorted(directory.iterdir()):
                if entry.is_file() and entry != marker:
                    entry.unlink()
            write_text(marker, run)
        self.directory = directory
        self._shards, self._run = shards, run
        self._weight_map: dict[str, str] = {}
        self._written = 0
        self.size_bytes = 0
        self.parameters = 0

    def write(self, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """Make and write the next shard, or read it where the run had written it already.

        Returns:
          Its tensors.
        """
        self._written += 1
        name = f"model-{self._written:05d}-of-{self._shards:05d}.safetensors"
        path = self.directory / name
        if path.exists():
            with safe_open(path, "numpy", backend="pread") as file:
                tensors: Mapping[str, np.ndarray] = file.get_tensors()
        else:
            tensors = make()
            write_tensors(path, tensors)
        self._weight_map.update(dict.fromkeys(tensors, name))
        self.size_bytes += sum(array.nbytes for array in tensors.values())
        self.parameters += sum(array.size for array in tensors.values())
        return tensors

    def close(self) -> None:
        """Write the index, which makes the directory a checkpoint."""
        if self._written != self._shards:
            raise AssertionError(f"{self._written} of {self._shards} shards were written")
        index = {
            "metadata": {
                "total_size": self.size_bytes,
                "total_parameters": self.parameters,
                **({"run": self._run} if self._run else {}),
            },
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        write_json(self.directory / INDEX_NAME, index)
        (self.directory / UNFINISHED).unlink()


def is_empty(directory: Path) -> bool:
    """Whether a directory holds nothing but what a killed write left beside its place."""
    return all(entry.name.endswith(".partial") for entry in directory.iterdir())


def begun(directory: Path, run: str) -> bool:
    """Whether a writer of this run was killed there."""
    marker = directory / UNFINISHED
    return bool(run) and marker.exists() and marker.read_text("utf-8") == run


def finished(directory: Path, run: str) -> bool:
    """Whether a writer of this run wrote the checkpoint that is there."""
    index = directory / INDEX_NAME
    if not index.exists() or read_json(index).get("metadata", {}).get("run") != run:
        return False
    (directory / UNFINISHED).unlink(missing_ok=True)  # of one killed at its very end
    return True


def refuse_non_empty(directory: Path, *, overwrite: bool) -> None:
    """Refuse an output directory that holds something.

    Raises:
      WorkError: where it does, unless it is a checkpoint (whole or begun) and ``overwrite``; or
        where it is a file.
    """
    if directory.is_file():
        raise WorkError(directory, "is a file", "name a directory")
    if not directory.exists() or is_empty(directory):
        return
    if not overwrite:
        raise WorkError(directory, "is not empty", "name another directory or give --overwrite")
    if not any(directory.glob("*.safetensors")) and not (directory / UNFINISHED).exists():
        raise WorkError(directory, "is not empty and holds no checkpoint", "name another directory")
