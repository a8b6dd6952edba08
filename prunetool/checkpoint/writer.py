"""Atomic file writes, and checkpoints whose index is written last."""

import errno
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from prunetool.checkpoint import checksum
from prunetool.checkpoint.index import INDEX_NAME, SINGLE_NAME, read_json
from prunetool.checkpoint.shards import Chunk, TensorSpec, layout, split
from prunetool.errors import CheckpointError, WorkError

T = TypeVar("T")
UNFINISHED = ".unfinished"  # in a checkpoint being written: its run, and checksums by file
# The same for a complete checkpoint, index included; and the work directory it was made from.
MANIFEST = ".prunetool.json"
PARTIAL = ".prunetool-partial"
RANDOM_BYTES = 8  # in the name of a temporary file
# Names of temporary files left by version 0.1 and by safetensors.
OLD_LEFTOVER = re.compile(r"\.tmp\w{6}|\.(hidden-[\w.]+|[\w.-]+\.(json|safetensors))\.partial")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Data files that belong to a checkpoint, by exact name; programs read no others. None is code.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
DATA_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
LICENSE_FILES = (
    "LICENSE", "LICENSE.txt", "LICENSE.md", "USE_POLICY.md", "NOTICE", "NOTICE.txt", "Notice",
    "Notice.txt",
)  # fmt: skip
# Where transformers keeps further chat templates.
TEMPLATES = "additional_chat_templates"
TEMPLATE = re.compile(rf"{TEMPLATES}/[^/]+\.jinja")
SHARDS = "model-?????-of-?????.safetensors"
WRITTEN = re.compile(
    r"model-\d{5}-of-\d{5}\.safetensors|(configuration|modeling|mlx)_pruned_llama\.py"
    r"|llamagen_pruned\.py"
)


def need_directory(path: Path) -> None:
    """Refuse a file to write whose directory is not there.

    Raises:
      WorkError: if it is not.
    """
    if not path.parent.is_dir():
        raise WorkError(path.parent, "no such directory", "make it, or name another")


@contextmanager
def atomic(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a path to write to; on success, flush the file to disk and rename it to ``path``.

    It is in a new directory beside ``path``, with a random name and closed to other users, so that
    nothing can be planted there. The file's mode follows the umask.

    Args:
      path: the file.
      durable: whether to flush. Without it the file survives this process, but not a power cut: for
        files that are soon replaced, and checked before they are read again.

    Raises:
      WorkError: if the directory does not exist, or the disk is full.
    """
    need_directory(path)
    made = path.with_name(f"{_prefix(path)}{secrets.token_hex(RANDOM_BYTES)}{PARTIAL}")
    partial = made / "file"
    try:
        made.mkdir(0o700)  # in here: a signal may come at any moment
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors writes for the owner only
        if durable:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():
            raise WorkError(path, "is a directory", "remove it, and run again")
        partial.replace(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise WorkError(
            path, f"cannot be written ({error.strerror})", "make room and run again"
        ) from error
    finally:
        try:
            _remove(made)
        finally:  # if a signal, of which one is raised, came in the middle
            _remove(made)


def _remove(directory: Path) -> None:
    """Remove a directory that `atomic` made, if it is there."""
    with suppress(OSError):
        for entry in list(directory.iterdir()):
            entry.unlink(missing_ok=True)
        directory.rmdir()


def _prefix(path: Path) -> str:
    """Prefix of the directories that `atomic` makes for a file."""
    return f".{os.fsdecode(os.fsencode(path.name)[:100])}."


def sweep(path: Path) -> None:
    """Remove what killed writers of a file left beside it, or left in a directory.

    Call it only while nobody else writes there.
    """
    digits = "[0-9a-f]" * 2 * RANDOM_BYTES  # so not those of x.gguf beside x
    found = path.parent.glob(f"{glob.escape(_prefix(path))}{digits}{PARTIAL}")
    inside = path.glob(f".*{PARTIAL}") if path.is_dir() else ()
    for entry in (*found, *inside):
        if _is_leftover(entry):
            _remove(entry)


def sweep_old(directory: Path) -> None:
    """Remove temporary files of version 0.1 from a directory of the tool's own."""
    for entry in directory.iterdir():
        if OLD_LEFTOVER.fullmatch(entry.name) and not entry.is_symlink() and entry.is_file():
            entry.unlink()


def _is_leftover(path: Path) -> bool:
    """Whether a directory is one that `atomic` made."""
    if path.is_symlink() or not path.is_dir() or not path.name.endswith(PARTIAL):
        return False
    return all(re.fullmatch(r"file|\.tmp\w+", entry.name) for entry in path.iterdir())


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically.

    Args:
      path: the file.
      tensors: arrays by name.
      metadata: for its header; one key only, since the library does not order several.

    Raises:
      WorkError: if it cannot be written, for example on a full disk.
    """
    # safetensors writes the buffer in memory order, so a transposed view would come out wrong.
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with atomic(path) as partial:
        try:
            save_file(whole, partial, metadata=dict(metadata or {"format": "pt"}))
        except SafetensorError as error:  # the library's own form of an OSError
            raise WorkError(path, str(error), "make room and run again") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as partial:
        partial.write_bytes(data)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON object in the form of a checkpoint's files."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # JSON's own escape, for half a surrogate pair


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, json_bytes(value))


def need_room(directory: Path, needed_bytes: int) -> None:
    """Refuse before the work begins if the disk has no room for the result.

    Raises:
      WorkError: if it has not; says how much is needed.
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


State = Literal["free", "begun", "whole", "replaced"]


class CheckpointWriter:
    """Writes a checkpoint shard by shard; the directory is a checkpoint only after `close`.

    Nothing is changed before `write`.

    Args:
      directory: where to write.
      overwrite: replace the files of an existing checkpoint; others stay.
      run: what determines the bytes written. A killed writer of the same run is resumed, with or
        without ``overwrite``. Empty: never.
      work, step: for `work_of` and `step_of`.
      files: names of all other files to be written (`put`).
      inputs: files that the run reads, which are never replaced.

    Attributes:
      state: what the directory has. ``free``: nothing; ``begun``: what a killed writer of this
        run left; ``whole``: this run's checkpoint, every file as written; ``replaced``: a
        checkpoint that `write` replaces.

    Raises:
      WorkError: if the directory is a file; without ``overwrite``, if it contains something else or
        a damaged checkpoint of this run; or if files of the user would be replaced.
    """

    def __init__(
        self,
        directory: Path,
        *,
        overwrite: bool = False,
        run: str = "",
        work: str = "",
        step: str = "",
        files: Sequence[str] = (),
        inputs: Sequence[Path] = (),
    ) -> None:
        self._files = files
        self.directory, self._run = directory, run
        self._from = {"work": work, "step": step}
        begun = _sealed(directory / UNFINISHED)
        self.state = self._find(overwrite, begun["run"])
        if self.state in ("begun", "replaced"):
            self._protect(inputs, begun["files"])
        self._sums = dict.fromkeys(files, "")
        if self.state == "begun":
            self._sums |= begun["files"]
        self._weight_map: dict[str, str] = {}
        self.size_bytes = 0
        self.parameters = 0

    def _find(self, overwrite: bool, begun: object) -> State:
        """The state; ``begun`` is the run that was not finished. An error if it is not writable."""
        directory = self.directory
        if directory.exists() and not directory.is_dir():
            raise WorkError(directory, "is a file", "name a directory")
        if not directory.exists() or is_empty(directory):
            return "free"
        if self._run and begun == self._run:
            return "begun"
        manifest = _sealed(directory / MANIFEST)
        if self._run and manifest["run"] == self._run:
            sums = {INDEX_NAME: "", **manifest["files"]}
            damaged = [n for n, total in sums.items() if not _is_whole(directory / n, total)]
            if not damaged:
                return "whole"
            if not overwrite:
                raise WorkError(
                    directory / damaged[0],
                    "has changed since it was written, or is missing",
                    "give --overwrite to write it as it was",
                )
        elif not overwrite:
            raise WorkError(directory, "is not empty", "name another directory or give --overwrite")
        if not _owned(directory) and not (directory / UNFINISHED).exists():
            raise WorkError(
                directory, "is not empty and holds no checkpoint", "name another directory"
            )
        return "replaced"

    def _protect(self, inputs: Sequence[Path], sums: Mapping[str, str]) -> None:
        """Refuse to replace the user's files or the inputs, or to leave foreign data."""
        used = {path.absolute() for path in inputs} | {path.resolve() for path in inputs}
        if self.state == "begun":
            paths = [self.directory / name for name in self._files]
            foreign = [
                self.directory / name
                for name in self._files
                if not _is_whole(self.directory / name, sums.get(name))
            ]
        else:
            owned = _owned(self.directory)
            shards = {path.name for path in self.directory.glob(SHARDS)}
            names = {*shards, *self._files} - owned
            # Data of another checkpoint must not stay beside the new one, but somebody may need it.
            left = {*DATA_FILES, *templates(self.directory)} - names
            foreign = [self.directory / n for n in sorted((names - {*DATA_FILES}) | (left - owned))]
            paths = [self.directory / name for name in sorted(names | owned)]
        for path in paths:
            if _is_there(path) and {path.absolute(), path.resolve()} & used:
                raise WorkError(
                    path, "is read by this run, which would replace it", "name another directory"
                )
        # Never write through a link; what it leads to would be loaded.
        for path in filter(_is_there, [*foreign, self.directory / TEMPLATES]):
            raise WorkError(
                path,
                "would be replaced or out of place, but is not part of the checkpoint there",
                "move it away, or name another directory",
            )

    def _begin(self) -> None:
        """Claim the directory for this run."""
        if self.state in ("whole", "begun"):
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        # A half-cleared directory must look neither complete nor like something else.
        names = (*_owned(self.directory), *self._sums)
        old = sorted({name for name in names if _is_there(self.directory / name)})
        self._mark("", dict.fromkeys(old, ""))
        (self.directory / INDEX_NAME).unlink(missing_ok=True)
        for name in (*old, MANIFEST):
            (self.directory / name).unlink(missing_ok=True)
        with suppress(OSError):  # holds the user's files, or does not exist
            (self.directory / TEMPLATES).rmdir()
        self._mark(self._run, self._sums)
        sweep_old(self.directory)
        self.state = "begun"

    def _mark(self, run: str, sums: Mapping[str, str]) -> None:
        write_json(self.directory / UNFINISHED, checksum.sealed({"run": run, "files": sums}))

    def write(
        self,
        chunks: Sequence[Chunk],
        make: Callable[[int], Mapping[str, np.ndarray]],
        max_shard_bytes: int,
    ) -> Iterator[Mapping[str, np.ndarray]]:
        """Make and write the chunks in turn; read those in shards that a killed run finished.

        Args:
          chunks: the chunks of all tensors.
          make: makes the tensors of a chunk, given its number.
          max_shard_bytes: limit of a shard (`split`).

        Yields:
          The tensors of each chunk.

        Raises:
          WorkError: before the first is made, if the disk has no room for the missing ones.
        """
        shards = split(chunks, max_shard_bytes)
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        specs = [spec for chunk in chunks for spec in chunk.values()]
        self.size_bytes = sum(spec.size_bytes for spec in specs)
        self.parameters = sum(spec.size for spec in specs)
        there: list[Path] = []  # written already, or removed before the first is written
        if self.state == "begun":
            there = [self.directory / name for name in names]
        elif self.state == "replaced":
            there = [self.directory / name for name in _owned(self.directory)]
        need_room(
            self.directory, self.size_bytes - sum(p.stat().st_size for p in there if p.is_file())
        )
        self._sums = dict.fromkeys(names, "") | self._sums
        self._begin()
        for name, numbers in zip(names, shards, strict=True):
            of_shard = [chunks[number] for number in numbers]
            self._weight_map |= {tensor: name for chunk in of_shard for tensor in chunk}
            path = self.directory / name
            if _is_whole(path, self._sums[name]):
                with safe_open(path, "numpy", backend="pread") as file:
                    for chunk in of_shard:
                        yield {tensor: file.get_tensor(tensor) for tensor in chunk}
            else:
                yield from _write_shard(path, of_shard, map(make, numbers))
                self._sums[name] = checksum.of_file(path)
                self._mark(self._run, self._sums)

    def put(self, name: str, data: bytes) -> None:
        """Write another file of the checkpoint."""
        self._sums[name] = checksum.of_bytes(data)
        self._mark(self._run, self._sums)  # first: an unrecorded file is the user's
        (self.directory / name).parent.mkdir(exist_ok=True)
        write_bytes(self.directory / name, data)

    def close(self, sketches: Sequence[str] = ()) -> None:
        """Write the index, which makes the directory a checkpoint.

        Args:
          sketches: of the texts that it was made with, for `sketches_of`.
        """
        if unwritten := [n for n in self._weight_map.values() if not self._sums[n]]:
            raise AssertionError(f"{unwritten[0]} was not written to its end")
        metadata = {"total_size": self.size_bytes, "total_parameters": self.parameters}
        index = {"metadata": metadata, "weight_map": dict(sorted(self._weight_map.items()))}
        data = json_bytes(index)
        self._sums[INDEX_NAME] = checksum.of_bytes(data)
        sums = {name: total for name, total in sorted(self._sums.items()) if total}
        if self._run:
            said = {"run": self._run, "files": sums, **self._from, "sketches": list(sketches)}
            write_json(self.directory / MANIFEST, checksum.sealed(said))
        write_bytes(self.directory / INDEX_NAME, data)
        (self.directory / UNFINISHED).unlink()


def _write_shard(
    path: Path, chunks: Sequence[Chunk], made: Iterable[Mapping[str, np.ndarray]]
) -> Iterator[Mapping[str, np.ndarray]]:
    """Write a shard atomically, chunk by chunk as they are made; yields their tensors."""
    header, starts = layout({name: spec for chunk in chunks for name, spec in chunk.items()})
    with atomic(path) as partial:
        with partial.open("r+b") as file:
            file.write(header)
            for chunk, tensors in zip(chunks, made, strict=True):
                found = {
                    n: TensorSpec(array.dtype.name, array.shape) for n, array in tensors.items()
                }
                if found != chunk:
                    raise AssertionError(f"{found} was made, not {chunk}")
                for name, array in tensors.items():
                    file.seek(starts[name])
                    # In the header's order, not a view's memory order.
                    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                yield tensors
        with safe_open(partial, "numpy", backend="pread"):
            pass  # its header fits its length


def remove_checkpoint(directory: Path) -> None:
    """Remove a checkpoint that this tool wrote, and its directory if nothing else is in it."""
    (directory / INDEX_NAME).unlink(missing_ok=True)  # first: the rest is no checkpoint
    for name in (*_owned(directory), MANIFEST):
        (directory / name).unlink(missing_ok=True)
    for place in (directory / TEMPLATES, directory):
        with suppress(OSError):
            place.rmdir()


def work_of(directory: Path) -> str:
    """The work directory that a checkpoint was exported from; empty if unknown."""
    return _stated(directory, "work", "")


def step_of(directory: Path) -> str:
    """The directory, below the work directory, of the step that it was made of; or empty."""
    return _stated(directory, "step", "")


def sketches_of(directory: Path) -> list[str]:
    """Sketches of the texts that a checkpoint was made with; none if unknown."""
    found: list[Any] = _stated(directory, "sketches", [])
    return [sketch for sketch in found if isinstance(sketch, str)]


def _stated(directory: Path, key: str, empty: T) -> T:
    """A value of a checkpoint's manifest, of the type of ``empty``; that if there is none."""
    with suppress(CheckpointError):
        found = checksum.read_sealed(directory / MANIFEST).get(key)
        return found if isinstance(found, type(empty)) else empty
    return empty


def is_empty(directory: Path, *, but: re.Pattern[str] | None = None) -> bool:
    """Whether a directory has only what killed writers left, and files with names like ``but``."""
    others = (entry for entry in directory.iterdir() if not but or not but.fullmatch(entry.name))
    return all(map(_is_leftover, others))


def whole_files(directory: Path) -> list[str]:
    """File names of a checkpoint that this tool finished, after checking that none has changed.

    Only README.md may have been edited since.

    Raises:
      WorkError: if it was not finished, is damaged, or was written by another program.
    """
    if not directory.is_dir():
        raise WorkError(directory, "no such directory", "name one that export wrote")
    if _is_there(directory / UNFINISHED):
        raise WorkError(directory, "was not finished", "run the command that writes it again")
    sums = _sealed(directory / MANIFEST)["files"]
    if INDEX_NAME not in sums:
        raise WorkError(
            directory,
            f"has no {MANIFEST} to check it against",
            "name a checkpoint that this version of prunetool wrote",
        )
    for name, total in sums.items():
        path = directory / name
        edited = name == "README.md" and path.is_file() and not path.is_symlink()
        if not edited and not _is_whole(path, total):
            raise WorkError(path, "is damaged or missing", "write the checkpoint again")
    return sorted(sums)


def _sealed(path: Path) -> dict[str, Any]:
    """A checkpoint's run, and checksums by file; both empty if the file is missing or damaged."""
    with suppress(CheckpointError):
        found = checksum.read_sealed(path)
        if found.keys() >= {"run", "files"} and isinstance(found["files"], dict):
            sums = {name: total for name, total in found["files"].items() if _may_be_put(name)}
            return {"run": found["run"], "files": sums}
    return {"run": None, "files": {}}


def _owned(directory: Path) -> set[str]:
    """Existing files of a directory's checkpoint that may be removed.

    An index is untrusted input: only the shards that it names count. Other files are named by
    this tool's own manifest.
    """
    named = {INDEX_NAME, SINGLE_NAME}
    with suppress(CheckpointError):
        shards = read_json(directory / INDEX_NAME).get("weight_map")
        listed = shards.values() if isinstance(shards, dict) else ()
        named |= {s for s in listed if isinstance(s, str) and s.endswith(".safetensors")}
    for path in (directory / MANIFEST, directory / UNFINISHED):
        named |= _sealed(path)["files"].keys()
    if _is_there(directory / UNFINISHED):
        named |= {path.name for path in directory.glob(SHARDS)}
    inside = {name for name in named if name == Path(name).name} | named & templates(directory)
    return {name for name in inside if _is_there(directory / name)}


def templates(directory: Path) -> set[str]:
    """Names of the chat templates in their directory of a checkpoint; none if that is a link."""
    where = directory / TEMPLATES
    found = () if where.is_symlink() else where.glob("*.jinja")
    return {name for path in found if TEMPLATE.fullmatch(name := f"{TEMPLATES}/{path.name}")}


def _may_be_put(name: str) -> bool:
    """Whether this tool ever writes a file of this name."""
    known = (INDEX_NAME, "README.md", *LICENSE_FILES, *DATA_FILES)
    return name in known or bool(WRITTEN.fullmatch(name) or TEMPLATE.fullmatch(name))


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def _is_whole(path: Path, total: object) -> bool:
    """Whether a regular file has this checksum."""
    try:
        return not path.is_symlink() and path.is_file() and checksum.of_file(path) == total
    except OSError:
        return False
