"""Files that appear whole or not at all, and checkpoints whose index is written last."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prunetool.checkpoint import checksum
from prunetool.checkpoint.index import INDEX_NAME, SINGLE_NAME, read_json
from prunetool.errors import CheckpointError, WorkError

UNFINISHED = ".unfinished"  # in a checkpoint being written: its run, and checksums by file
# What a killed write leaves: directories of `atomic`, and the library's own temporary files.
LEFTOVER = re.compile(r"\..+\.partial|\.tmp\w{6}")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Files of data that belong to a checkpoint, by exact name; a program reads no other. None is code.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
DATA_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
LICENSE_FILES = (
    "LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md", "NOTICE", "NOTICE.txt", "Notice",
    "Notice.txt",
)  # fmt: skip
WRITTEN = re.compile(r"model-\d{5}-of-\d{5}\.safetensors|(modeling|mlx)_pruned_llama\.py")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a path to write to; flush the file to disk and rename it to ``path`` on success.

    It lies in a new directory beside ``path``, of a random name and open to nobody else, so that
    nothing can be planted there. The file gets the mode that the umask gives.

    Raises:
      WorkError: if there is no such directory, or the disk is full.
    """
    try:
        made = tempfile.mkdtemp(".partial", f".{path.name[:100]}.", path.parent)
    except FileNotFoundError:
        raise WorkError(path.parent, "no such directory", "make it, or name another") from None
    partial = Path(made) / "file"
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors writes for the owner alone
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise WorkError(
            path, f"cannot be written ({error.strerror})", "make room and run again"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Remove what killed writers left in a directory that no other process writes now."""
    for entry in directory.iterdir():
        if not LEFTOVER.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically.

    Args:
      path: the file.
      tensors: its arrays by name.
      metadata: of its header; of one key, since the library does not order several.

    Raises:
      WorkError: if it cannot be written, as on a full disk.
    """
    # safetensors writes the buffer as it lies in memory, so a transposed view would come out wrong.
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic(path) as partial:
        try:
            save_file(whole, partial, metadata=dict(metadata or {"format": "pt"}))
        except SafetensorError as error:  # the library's own name for an OSError
            raise WorkError(path, str(error), "make room and run again") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as partial:
        partial.write_bytes(data)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON object as a file of a checkpoint holds it."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # JSON's own escape, of half a surrogate pair


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, json_bytes(value))


def need_room(directory: Path, needed_bytes: int) -> None:
    """Refuse before the work begins if the disk cannot hold its result.

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
      directory: where.
      shards: how many there will be (their number is part of each name).
      overwrite: replace the files of a checkpoint that is there; others stay.
      run: what decides the bytes written. A killed writer of the same run is resumed, with
        ``overwrite`` or without. Empty: never.
      files: names of all other files that will be put.
      inputs: files that the work reads, which are never replaced.

    Raises:
      WorkError: see `prepare`.
    """

    def __init__(
        self,
        directory: Path,
        shards: int,
        *,
        overwrite: bool = False,
        run: str = "",
        files: Sequence[str] = (),
        inputs: Sequence[Path] = (),
    ) -> None:
        self._names = shard_names(shards)
        names = [*self._names, *files]
        state = prepare(directory, run, names, overwrite=overwrite, inputs=inputs)
        self.directory, self._run = directory, run
        self._sums = dict.fromkeys(names, "")
        if state == "begun":
            self._sums |= _marker(directory)["files"]
        else:
            # A directory half cleared must not look whole, nor like something else.
            directory.mkdir(parents=True, exist_ok=True)
            old = sorted(_owned(directory))
            self._mark("", dict.fromkeys(old, ""))
            (directory / INDEX_NAME).unlink(missing_ok=True)
            for name in old:
                (directory / name).unlink(missing_ok=True)
            self._mark(run, self._sums)
        sweep(directory)
        self._weight_map: dict[str, str] = {}
        self._written = 0
        self.size_bytes = 0
        self.parameters = 0

    def _mark(self, run: str, sums: Mapping[str, str]) -> None:
        write_json(self.directory / UNFINISHED, checksum.sealed({"run": run, "files": sums}))

    def write(self, make: Callable[[], Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        """Make and write the next shard, or read it if the run wrote it before it was killed.

        Returns:
          Its tensors.
        """
        name = self._names[self._written]
        self._written += 1
        path = self.directory / name
        if _is_whole(path, self._sums[name]):
            with safe_open(path, "numpy", backend="pread") as file:
                tensors: Mapping[str, np.ndarray] = file.get_tensors()
        else:
            tensors = make()
            write_tensors(path, tensors)
            self._sums[name] = checksum.of_file(path)
            if self._run:
                self._mark(self._run, self._sums)
        self._weight_map.update(dict.fromkeys(tensors, name))
        self.size_bytes += sum(array.nbytes for array in tensors.values())
        self.parameters += sum(array.size for array in tensors.values())
        return tensors

    def put(self, name: str, data: bytes) -> None:
        """Write another file of the checkpoint."""
        write_bytes(self.directory / name, data)
        self._sums[name] = checksum.of_bytes(data)

    def close(self) -> None:
        """Write the index, which makes the directory a checkpoint."""
        if self._written != len(self._names):
            raise AssertionError(f"{self._written} of {len(self._names)} shards were written")
        sums = {name: total for name, total in sorted(self._sums.items()) if total}
        run = {"run": self._run, "files": sums} if self._run else {}
        index = {
            "metadata": {
                "total_size": self.size_bytes, "total_parameters": self.parameters, **run
            },
            "weight_map": dict(sorted(self._weight_map.items())),
        }  # fmt: skip
        write_json(self.directory / INDEX_NAME, index)
        (self.directory / UNFINISHED).unlink()


def shard_names(count: int) -> list[str]:
    """Names of the shards of a checkpoint of so many."""
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


State = Literal["free", "begun", "whole", "replaced"]


def prepare(
    directory: Path,
    run: str,
    names: Sequence[str],
    *,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> State:
    """What a writer of this run finds in a directory; changes nothing.

    Args:
      directory: to write a checkpoint to.
      run: see `CheckpointWriter`.
      names: of the files that will be written, but for the index.
      overwrite: whether a checkpoint that is there may be replaced.
      inputs: files that the work reads.

    Returns:
      ``free``: nothing; ``begun``: what a killed writer of this run left; ``whole``: this run's
      checkpoint, every file of it as it was written; ``replaced``: a checkpoint to be replaced.

    Raises:
      WorkError: if it is a file; holds something else, or a damaged checkpoint of this run, and
        ``overwrite`` is not given; or holds files that no checkpoint names and that would be
        replaced.
    """
    if directory.exists() and not directory.is_dir():
        raise WorkError(directory, "is a file", "name a directory")
    if not directory.exists() or is_empty(directory):
        return "free"
    if run and _marker(directory)["run"] == run:
        if not (directory / INDEX_NAME).exists():
            return "begun"
        (directory / UNFINISHED).unlink()  # of one killed at its very end
    sums = _written_sums(directory, run)
    damaged = [name for name, total in sums.items() if not _is_whole(directory / name, total)]
    if sums and not damaged:
        return "whole"
    if not overwrite:
        if damaged:
            raise WorkError(
                directory / damaged[0], "is damaged or gone", "give --overwrite to write it again"
            )
        raise WorkError(directory, "is not empty", "name another directory or give --overwrite")
    owned = _owned(directory)
    if not owned and not (directory / UNFINISHED).exists():
        raise WorkError(directory, "is not empty and holds no checkpoint", "name another directory")
    here = directory.resolve()
    used = {path.name for path in inputs if path.resolve().parent == here}
    for name in sorted({*names, *owned}):
        path = directory / name
        if name in used or (name not in owned and _is_there(path)):
            raise WorkError(
                path, "would be replaced, and is not of the checkpoint there",
                "move it away, or name another directory",
            )  # fmt: skip
    return "replaced"


def is_empty(directory: Path) -> bool:
    """Whether a directory holds nothing but what killed writes left."""
    return all(LEFTOVER.fullmatch(entry.name) for entry in directory.iterdir())


def _marker(directory: Path) -> dict[str, Any]:
    """Run, and checksums of the files written so far, of a writer that was killed or is at work."""
    nothing: dict[str, Any] = {"run": None, "files": {}}
    with suppress(CheckpointError):
        found = checksum.read_sealed(directory / UNFINISHED)
        return found if found.keys() == nothing.keys() else nothing
    return nothing


def _index(directory: Path) -> dict[str, Any]:
    with suppress(CheckpointError):
        return read_json(directory / INDEX_NAME)
    return {}


def _written_sums(directory: Path, run: str) -> dict[str, str]:
    """Checksums by file of a checkpoint that a writer of this run finished; else nothing."""
    metadata = _index(directory).get("metadata")
    if not run or not isinstance(metadata, dict) or metadata.get("run") != run:
        return {}
    files = metadata.get("files")
    return files if isinstance(files, dict) else {INDEX_NAME: ""}  # a form that cannot be whole


def _owned(directory: Path) -> set[str]:
    """Files of the checkpoint in a directory that may be replaced: what is named and is there.

    An index is input from outside: it names shards, and companions of the names that are written
    here, and nothing else.
    """
    index = _index(directory)
    metadata, shards = index.get("metadata"), index.get("weight_map")
    listed = list(shards.values()) if isinstance(shards, dict) else []
    named = {s for s in listed if isinstance(s, str) and s.endswith(".safetensors")}
    for files in (metadata.get("files") if isinstance(metadata, dict) else None,
                  _marker(directory)["files"]):  # fmt: skip
        if isinstance(files, dict):
            named |= {name for name in files if _may_be_put(name)}
    if _is_there(directory / UNFINISHED):
        named |= {path.name for path in directory.glob("model-?????-of-?????.safetensors")}
    there = {INDEX_NAME, SINGLE_NAME, UNFINISHED} | named
    there = {name for name in there if name == Path(name).name and _is_there(directory / name)}
    if there:  # a checkpoint: its data goes with it
        there |= {name for name in DATA_FILES if _is_there(directory / name)}
    return there - {UNFINISHED}


def _may_be_put(name: str) -> bool:
    """Whether a writer here ever writes a file of this name."""
    texts = ("README.md", *LICENSE_FILES)
    return name in texts or name in DATA_FILES or bool(WRITTEN.fullmatch(name))


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def _is_whole(path: Path, total: object) -> bool:
    """Whether a regular file has this checksum."""
    try:
        return not path.is_symlink() and path.is_file() and checksum.of_file(path) == total
    except OSError:
        return False
