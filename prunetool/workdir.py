"""The work directory: what a run is about, and the files from which a killed one resumes.

    work/
      run.json              the run's identity: checkpoint, tokens, options, version
      self-8c0d….safetensors  ids that the model wrote for --text self, shared by several runs
      weights.json          checksums of the checkpoint's tensors, as calibrate read them
      tokens.safetensors    the sequences of token ids
      stats/                sums over calibration tokens; per layer: fit, held-out, first tokens
      hidden-00012          residual stream before layer 12, while calibrate runs
      residual-00012        the same, of the sequences of --gradients; kept for the backward pass
      gradient-00012        the loss's gradient with respect to it, while the backward pass runs
      calibrated            all layers are done (and may have been discarded)
      discarded             a later step deleted stats after using them
      scores-51d0…/         scores, shared by several sparsities
      score-3f9a…/          units kept, one file per layer
      compensate-77c1…/     refitted weights, one file per layer
      recover-90ab…/        recovered weights, one file per layer; streams and state while it runs
      */records.jsonl       the records of the directory's step, once complete
      */cost.json           the seconds and memory that it took

A step's directory name has a hash of all options so far, so several sparsities share one
calibration, and a file that exists is complete (files are renamed into place): a rerun step makes
only what is missing or damaged. Every array has its checksum in its file's header.

A stream names its work directory, and is untrusted input: only files named by the steps are read or
deleted, below a directory whose run.json matches that stream, and never through links.
"""

import glob
import hashlib
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from filelock import SoftFileLock, Timeout
from safetensors import SafetensorError, safe_open

from prunetool import console
from prunetool.checkpoint import checksum
from prunetool.checkpoint import writer as files
from prunetool.checkpoint.index import read_json
from prunetool.errors import CheckpointError, RecordError, WorkError, shown
from prunetool.records import Header, LayerRecord

OTHER = "another --work"
RUN_NAME = "run.json"
STATS = "stats"  # the directory of calibrate
WEIGHTS_NAME = "weights.json"
TOKENS_NAME = "tokens.safetensors"
STREAM_NAME = "stream.safetensors"  # sums over the residual stream after the last layer
DISCARDED_NAME = "discarded"
SILENT_SECONDS = 60.0  # of waiting for a lock before it is reported
BROKEN_SECONDS = 2.0  # writing a lock file takes less than this
# Files of calibrate, for `size_bytes`.
CALIBRATED = ("stats/*.safetensors", "hidden-*", "residual-*", "gradient-*")
EVERYTHING = ("*", "*/*")
# Of calibrate's files for a layer.
STATS_KINDS = (STATS, "held_out", "first", "attention", "gradients")
# Names of everything that the steps make in a work directory; nothing else is ever removed.
DIRECTORIES = re.compile(r"stats|(scores|score|compensate|recover)-[0-9a-f]{12}")
OWN_TEXT = re.compile(r"self-[0-9a-f]{12}\.safetensors")
FILES = re.compile(
    r"((hidden|residual|gradient)-\d{5}|calibrated)(\.\d+of\d+)?|weights\.json|discarded"
    rf"|(tokens|stream)\.safetensors|{OWN_TEXT.pattern}"
)
RECORDS_NAME = "records.jsonl"
COST_NAME = "cost.json"
PROGRESS_NAME = "progress.json"  # has a sketch of the text that recover or compensate took
STEP_FILES = re.compile(
    rf"layer-\d{{5}}(\.\w+)?\.safetensors|{re.escape(RECORDS_NAME)}|{re.escape(WEIGHTS_NAME)}"
    rf"|{re.escape(COST_NAME)}"
    r"|basis\.safetensors|(hidden|residual|gradient)-\d{5}|state-\d{5}\.\w+\.\d+|progress\.json"
)
AGAIN = (
    "run the step that made it again; if discarded, delete the work directory and calibrate again"
)


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing what this one writes, by ``path``.lock.

    The lock contains the process's id. A dead process's lock is taken over with a message.

    Args:
      path: the directory or file to write.
      wait: wait for a living process that holds the lock.

    Raises:
      WorkError: if a living process holds it and this one does not wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = SoftFileLock(path.with_name(f"{path.name}.lock"))
    _remove_broken(held)
    holder = held.pid
    left = holder is not None and _is_dead(holder) and held.pid == holder
    advice = (
        "wait for it, or stop it (if it ran on another machine and is gone, delete "
        f"{held.lock_file})"
    )
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise WorkError(path, f"is being written by {_named(holder)}", advice) from error
        _wait(held, path, advice)
    except OSError as error:
        raise WorkError(
            held.lock_file,
            f"cannot be written ({error.strerror})",
            "make room, or check the permissions",
        ) from error
    else:
        if left:
            console.log.warning("%s: process %d, which wrote it, is gone; continuing", path, holder)
    try:
        files.sweep(path)
        yield
    finally:
        held.release()


def _is_dead(pid: int) -> bool:
    if os.name != "posix":
        return False  # there os.kill would end the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _remove_broken(held: SoftFileLock) -> None:
    """Remove a lock file that still names no process: the machine crashed while making it.

    Raises:
      WorkError: if it has content that is no lock's, such as that of a package manager.
    """
    path = Path(held.lock_file)
    with suppress(FileNotFoundError):
        before = path.lstat()
        if held.pid is not None:
            return
        time.sleep(BROKEN_SECONDS)
        now = path.lstat()
        if (before.st_ino, before.st_mtime_ns) == (now.st_ino, now.st_mtime_ns):
            # A crash may leave zeros, or a process's number without the rest.
            if not re.match(rb"\0*(\d|$)", path.read_bytes()):
                raise WorkError(path, "is no lock of prunetool", "name another directory or file")
            path.unlink()
            console.log.warning("%s: names no process, so it is from a crash; taken over", path)


def _wait(held: SoftFileLock, path: Path, advice: str) -> None:
    try:
        held.acquire(timeout=SILENT_SECONDS, poll_interval=0.1)
    except Timeout:
        console.log.warning("%s: still being written by %s; %s", path, _named(held.pid), advice)
        held.acquire(poll_interval=1)


def _named(pid: int | None) -> str:
    """A process in words; its lock may be gone already, or not name it yet."""
    return "another process" if pid is None else f"process {pid}"


def identity(
    command: str, checkpoint: Mapping[str, Any], tokens: str, version: str, how: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that determines a run's result; only an equal run is resumed.

    Args:
      command: the step.
      checkpoint: `Model.identity`; the bytes of all tensors are checked as they are read
        (`WEIGHTS_NAME`).
      tokens: digest of the token ids, and so of the text, the windows and their BOS.
      version: version of prunetool.
      how: the options that matter. Batch sizes, devices and processes do not: they change only the
        last digits, as documented.
    """
    return {"command": command, **checkpoint, "tokens": tokens, **how, "version": version}


def claim(
    work: Path, run: Mapping[str, Any], *, overwrite: bool = False, other: str = OTHER
) -> None:
    """Claim ``work`` for this run, or resume the same run in it.

    Args:
      work: the directory.
      run: its `identity`.
      overwrite: delete the files of another run of the same command.
      other: what to give for another directory.

    Raises:
      WorkError: if it has another run; says what differs.
    """
    run_path = work / RUN_NAME
    if run_path.exists():
        try:
            old = checksum.read_sealed(run_path)
        except CheckpointError as error:
            if not overwrite:
                todo = f"give --overwrite to start again, or {other}"
                raise WorkError(run_path, error.what, todo) from error
            old = {"command": run["command"]}
        if changes := differing(old, run):
            _refuse(work, changes, overwrite=overwrite, other=other)
            drop(work)  # run.json is replaced last: it says whose this is
    else:
        old = {}
        _refuse_foreign(work, other)
        if (work / STATS).is_dir():
            if not overwrite:
                raise WorkError(
                    work,
                    "holds a run without its run.json",
                    f"give --overwrite to start again, or {other}",
                )
            drop(work)
        work.mkdir(parents=True, exist_ok=True)
    for directory in (work, work / STATS):
        if directory == work or (directory.is_dir() and not directory.is_symlink()):
            files.sweep(directory)
            files.sweep_old(directory)
    if old != run:
        files.write_json(run_path, checksum.sealed(run))


def check(work: Path, known: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Refuse early what `claim` will refuse, while only a part of a run's `identity` is known.

    Raises:
      WorkError: if ``work`` has a run that differs in it, or files that are not the steps'.
    """
    if not (work / RUN_NAME).exists():
        _refuse_foreign(work)
        return
    with suppress(CheckpointError):  # damaged: `claim` says it
        old = checksum.read_sealed(work / RUN_NAME)
        if changes := differing({key: old.get(key) for key in known}, known):
            _refuse(work, changes, overwrite=overwrite)


def _refuse(
    work: Path, changes: Sequence["Change"], *, overwrite: bool, other: str = OTHER
) -> None:
    """Refuse a directory whose run differs; with ``overwrite`` only if it is another command's."""
    if changes[0].key == "command":
        raise WorkError(work, f"holds a run of {shown(changes[0].was)}", f"give {other}")
    if not overwrite:
        raise WorkError(
            work,
            f"holds another run: {_in_words(changes)}",
            f"give --overwrite to delete it, or {other}",
        )


def _refuse_foreign(work: Path, other: str = OTHER) -> None:
    """Refuse a directory without run.json that has files that are not the steps'."""
    if not work.exists() or (work.is_dir() and files.is_empty(work, but=OWN_TEXT)):
        return
    if not (work / STATS).is_dir() or not all(map(_is_ours, work.iterdir())):
        raise WorkError(work, "is not a work directory of prunetool", f"give {other}")


class Change(NamedTuple):
    """A value in which two runs differ; its key is like ``config.rope.theta``."""

    key: str
    was: Any
    now: Any


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """All values in which two runs differ."""
    found = []
    for key in {**old, **new}:
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            found += [inner._replace(key=f"{key}.{inner.key}") for inner in differing(was, now)]
        elif json.dumps(was) != json.dumps(now):
            found.append(Change(key, was, now))
    return found


# Descriptions of keys with checksums as values; and of keys that differ from their option's name.
CHECKSUMS = {
    "tensors": "the tensors of the checkpoint",
    "tokenizer": "the tokenizer files of the checkpoint",
    "tokens": "the token ids of the text",
}
NAMES = {"version": "prunetool", "attention": "--attention-samples with --attention-length"}


def _in_words(changes: Sequence[Change]) -> str:
    """What differs, in the user's terms."""
    words = []
    for key, was, now in changes:
        if key in CHECKSUMS:
            continue
        name = NAMES.get(key, key if "." in key else f"--{key.replace('_', '-')}")
        words.append(f"{name} was {shown(json.dumps(was), 20)} and is {shown(json.dumps(now), 20)}")
    # Other options make other token ids from the same text.
    words = words or [f"{CHECKSUMS[key]} are not the same" for key, *_ in changes]
    return shown(", ".join(words), 140)


def drop(work: Path, *, own_text: bool = False) -> None:
    """Remove only what the steps made below ``work``; run.json stays.

    Args:
      work: the directory.
      own_text: also the ids that the model wrote, which other runs can use.

    Raises:
      WorkError: if one of their directories is a link, or a step is running there.
    """
    for held in work.glob("*.lock"):
        if DIRECTORIES.fullmatch(held.stem):
            with lock(held.with_suffix("")):
                pass
    for entry in sorted(filter(_is_ours, work.iterdir())):
        if not DIRECTORIES.fullmatch(entry.name):
            if own_text or not OWN_TEXT.fullmatch(entry.name):
                entry.unlink(missing_ok=True)
            continue
        _refuse_link(entry)
        files.sweep(entry)
        for path in entry.iterdir():
            if STEP_FILES.fullmatch(path.name.removesuffix(".lock")):
                path.unlink()
        with suppress(OSError):  # it has files of the user
            entry.rmdir()


def _is_ours(entry: Path) -> bool:
    """Whether an entry of a work directory has a step's file name (other than run.json)."""
    if entry.is_dir():
        return bool(DIRECTORIES.fullmatch(entry.name))
    return bool(FILES.fullmatch(entry.name)) or (
        entry.suffix == ".lock" and bool(DIRECTORIES.fullmatch(entry.stem))
    )


def clear(work: Path) -> None:
    """Remove everything that the steps made in ``work``, and ``work`` itself if then empty."""
    drop(work, own_text=True)
    (work / RUN_NAME).unlink()
    with suppress(OSError):  # has the user's files, or cannot be removed
        work.rmdir()


def run_of(header: Header) -> dict[str, Any]:
    """The run of a stream, from its work directory.

    Raises:
      WorkError: if it is not the work directory of the stream's calibration.
    """
    work, first = Path(header.work), header.history[0]
    where = work / RUN_NAME
    try:
        run = checksum.read_sealed(where)
    except CheckpointError as error:
        raise WorkError(where, error.what, "run calibrate again, with --overwrite") from error
    said = {"command": first["command"], "version": first["version"], **first["options"]}
    if any(run.get(key) != value for key, value in said.items()):
        raise WorkError(work, "is not the work directory of this stream", "calibrate again")
    return run


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise WorkError(path, "is a link, and links are not followed", "remove it and run again")


def below(work: Path, name: str) -> Path:
    """The path below ``work`` of a file named by the steps, ``directory/file`` or ``file``.

    Raises:
      WorkError: if it or its directory is a link.
    """
    path = work / name
    for part in (path.parent, path) if path.parent != work else (path,):
        _refuse_link(part)
    return path


def size_bytes(work: Path, *patterns: str) -> int:
    """Bytes of the files below ``work`` that match one of the patterns.

    Another step may be running there: what it deletes meanwhile counts nothing.
    """

    def size(path: Path) -> int:
        with suppress(FileNotFoundError):
            if path.is_file():
                return path.stat().st_size
        return 0

    # Unlike Path.glob, it passes over a directory that goes.
    found = (glob.iglob(pattern, root_dir=work, include_hidden=True) for pattern in patterns)
    return sum(size(work / name) for name in chain.from_iterable(found))


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def step_directory(header: Header) -> str:
    """Name, below ``work``, of the directory for the last step in the header's history."""
    return f"{header.history[-1]['command']}-{digest(header.history)}"


def layer_file(directory: str, layer: int, kind: str = "") -> str:
    """Name, below ``work``, of a layer's file."""
    return f"{directory}/layer-{layer:05d}{kind}.safetensors"


@contextmanager
def records_copy(work: Path, directory: str) -> Iterator[IO[str]]:
    """Yield a stream for a copy of a step's records; once complete, it is written to a file."""
    copy = io.StringIO()
    yield copy
    path = below(work, f"{directory}/{RECORDS_NAME}")
    path.parent.mkdir(exist_ok=True)
    files.write_bytes(path, copy.getvalue().encode())
    _keep_cost(work, directory)


def _keep_cost(work: Path, directory: str) -> None:
    """Keep what a step took, unless an earlier run, whose files this one read, took longer."""
    (seconds, peak), known = console.spent(), cost_of(work, directory)
    if known is None or known[0] < seconds:
        value = {"seconds": round(seconds, 3), "peak_mb": peak}
        files.write_json(below(work, f"{directory}/{COST_NAME}"), value)


def cost_of(work: Path, directory: str) -> tuple[float, int] | None:
    """Seconds and peak memory, MB, of a step's longest run; None if they are not known."""
    with suppress(CheckpointError, KeyError, TypeError, ValueError, OverflowError):
        said = read_json(work / directory / COST_NAME)
        seconds, peak = float(said["seconds"]), int(said["peak_mb"])
        return (seconds, peak) if math.isfinite(seconds) else None
    return None


def of(place: Path) -> Path:
    """The work directory of a checkpoint that export wrote, or ``place`` if it is one.

    Raises:
      WorkError: if it is neither, or the checkpoint's work directory is gone.
    """
    work = Path(files.work_of(place) or place).absolute()
    with suppress(CheckpointError):
        checksum.read_sealed(work / RUN_NAME)
        return work
    if work != place.absolute():
        raise WorkError(
            place,
            f"its work directory {work} is gone",
            "a report or another sparsity needs another calibration",
        )
    raise WorkError(
        place, "is neither a work directory nor a checkpoint that export wrote", "name one of these"
    )


def records_of(place: Path) -> Path:
    """The records that a checkpoint was made of; of a work directory, the last ones.

    Raises:
      WorkError: if ``place`` is neither (`of`), or no step has finished there.
    """
    work, step = of(place), files.step_of(place)
    if DIRECTORIES.fullmatch(step):
        path = below(work, f"{step}/{RECORDS_NAME}")
        if path.is_file():
            return path
    return _last_records(work)


def _last_records(work: Path) -> Path:
    """The records last written by a step after calibrate in a work directory.

    Raises:
      WorkError: if no such step has finished there.
    """
    made = [
        path
        for path in work.glob(f"*/{RECORDS_NAME}")
        if DIRECTORIES.fullmatch(path.parent.name) and path.parent.name != STATS
    ]
    if not made:
        raise WorkError(work, "has no records of score or compensate", "run score to its end")
    return max(made, key=lambda path: path.stat().st_mtime_ns)


def make_once(
    work: Path, name: str, make: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the arrays of a file below ``work``, making and writing it if missing or damaged."""
    path = below(work, name)
    if path.exists():
        try:
            return load(work, name)
        except RecordError as error:
            console.log.warning("%s: %s; made again", path, error.what)
    arrays = dict(make())
    write(work, name, arrays)
    return arrays


def write(work: Path, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a file below ``work``, with their checksums."""
    path = below(work, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    sums = {key: checksum.of_array(array) for key, array in sorted(arrays.items())}
    files.write_tensors(path, arrays, {SUMS: json.dumps(sums)})


def is_intact(work: Path, name: str) -> bool:
    """Whether a file of stats is as written, or discarded; a warning says why not."""
    try:
        if not (work / DISCARDED_NAME).exists() or (work / name).exists():
            TensorFile(work, name).check()
    except RecordError as error:
        console.log.warning("%s: %s; starting again", error.where, error.what)
        return False
    return True


def discard_stats(work: Path, record: LayerRecord) -> None:
    """Delete a layer's stats once their last reader is done."""
    below(work, DISCARDED_NAME).touch()
    for kind in STATS_KINDS:
        if kind in record.files:
            below(work, layer_file(STATS, record.index, f".{kind}")).unlink(missing_ok=True)


SUMS = "checksums"  # key in the header of a work directory's files: by array, as JSON


class TensorFile:
    """A file below ``work`` whose arrays are read one at a time, each checked when read.

    The file is read, not mapped: mapped pages would count in the peak memory.

    Raises:
      RecordError: if it is gone, damaged, or lacks a requested array.
    """

    def __init__(self, work: Path, name: str) -> None:
        self._path = below(work, name)
        with self._opened() as file:
            self._sums = _sums_of(file.metadata())
            if self._sums.keys() != set(file.keys()):
                raise self._error("is damaged: its arrays are not those of its checksums")

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self:
            raise self._error(f"lacks {name}")
        with self._opened() as file:
            array: np.ndarray = file.get_tensor(name)
        if checksum.of_array(array) != self._sums[name]:
            raise self._error(f"is damaged: the checksum of {shown(name)} does not match")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._sums))

    def check(self) -> None:
        """Read everything, to check that it is intact."""
        for name in self:
            self[name]

    def _error(self, what: str) -> RecordError:
        return RecordError(self._path, what, AGAIN)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        if self._path.exists() and not self._path.is_file():
            raise self._error("is not a regular file")
        try:
            with safe_open(self._path, "numpy", backend="pread") as file:
                yield file
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise self._error(f"cannot be read ({shown(error, 60)})") from error


def _sums_of(metadata: Any) -> dict[str, str]:
    """Checksums by array from a header's metadata; empty if they cannot be read."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        sums = json.loads(metadata[SUMS])
        if isinstance(sums, dict):
            return sums
    return {}


def load(work: Path, name: str) -> dict[str, np.ndarray]:
    """Read all arrays of a file below ``work``.

    Raises:
      RecordError: as in `TensorFile`.
    """
    file = TensorFile(work, name)
    return {key: file[key] for key in file}
