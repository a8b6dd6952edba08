"""The work directory: what a run is of, and the files that let a killed one go on.

    work/
      run.json              what the run is of: checkpoint, tokens, options, version
      stats/                sums over calibration tokens, two files a layer (fit, held-out)
      hidden-00012          residual stream before layer 12, while calibrate is under way
      calibrated            all layers are there (or were, see --discard)
      score-3f9a…/          scores and units kept, one file a layer
      compensate-77c1…/     refitted weights, one file a layer

A step's directory carries a hash of all options so far, so several sparsities share one
calibration, and a file that exists is whole (files are renamed into place): a step run again
makes only what is missing.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import SoftFileLock, Timeout
from safetensors import SafetensorError, safe_open

from prunetool import console
from prunetool.checkpoint.index import read_json
from prunetool.checkpoint.writer import is_empty, write_json, write_tensors
from prunetool.errors import RecordError, WorkError
from prunetool.records import Header, LayerRecord

RUN_NAME = "run.json"
SILENT_SECONDS = 60.0  # of waiting for a lock before a word is said
STATS_KINDS = ("stats", "held_out", "attention")  # of the files that calibrate makes of a layer


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing what this one writes, as ``path``.lock says.

    The lock holds the process's id. That of a process that is gone is taken over with a message.

    Args:
      path: the directory, or file name, that is written.
      wait: for a living process that has it.

    Raises:
      WorkError: where a living process has it and this one does not wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = SoftFileLock(path.with_name(f"{path.name}.lock"))
    holder = held.pid
    advice = (
        f"wait for it, or stop it (if it is of another machine and gone, delete {held.lock_file})"
    )
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise WorkError(path, f"is being written by process {holder}", advice) from error
        _wait(held, path, advice)
    else:
        if holder is not None:
            console.log.warning(
                "%s: process %d, which wrote it, is gone; this one goes on", path, holder
            )
    try:
        yield
    finally:
        held.release()


def _wait(held: SoftFileLock, path: Path, advice: str) -> None:
    try:
        held.acquire(timeout=SILENT_SECONDS, poll_interval=0.1)
    except Timeout:
        console.log.warning("%s: still being written by process %s; %s", path, held.pid, advice)
        held.acquire(poll_interval=1)


def claim(work: Path, run: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Make ``work`` the directory of this run, or go on with the same run in it.

    Args:
      work: the directory.
      run: everything that decides the result: ``command`` first, then checkpoint, tokens,
        options, version.
      overwrite: drop the files of another run of the same command.

    Raises:
      WorkError: where it holds another run; names what differs.
    """
    run_path = work / RUN_NAME
    if run_path.exists():
        old = read_json(run_path)
        differing = [key for key in {**old, **run} if old.get(key) != run.get(key)]
        if not differing:
            return
        key = differing[0]
        if key == "command":
            raise WorkError(work, f"holds a run of {old.get(key)}", "give another --work")
        if not overwrite:
            raise WorkError(
                work,
                f"holds another run: {key} was {old.get(key)!r} and is {run.get(key)!r}",
                "give --overwrite to drop it, or another --work",
            )
        for entry in work.iterdir():  # run.json last, by being replaced: it says whose this is
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry != run_path:
                entry.unlink()
    elif work.exists() and not (work.is_dir() and is_empty(work)):
        raise WorkError(work, "is not a work directory of prunetool", "give another --work")
    work.mkdir(parents=True, exist_ok=True)
    write_json(run_path, run)


def clear(work: Path) -> None:
    """Remove what a run that keeps nothing but the residual stream left, and ``work`` if empty."""
    for path in (*work.glob("hidden-*"), *work.glob(".hidden-*"), work / RUN_NAME):
        path.unlink()
    with suppress(OSError):  # the user's own files, or a place that cannot be removed
        work.rmdir()


def size_bytes(work: Path, directory: str = "") -> int:
    """Bytes of the files of a step that are there already; of calibrate, without ``directory``."""
    if directory:
        files = list((work / directory).glob("*"))
    else:
        files = [*work.glob("stats/*.safetensors"), *work.glob("hidden-*")]
    return sum(path.stat().st_size for path in files)


def digest(value: Any) -> str:
    """Twelve hexadecimal digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def step_directory(header: Header) -> str:
    """Name, below ``work``, of the directory of the last step in the header's history."""
    return f"{header.history[-1]['command']}-{digest(header.history)}"


def layer_file(directory: str, layer: int, kind: str = "") -> str:
    """Name, below ``work``, of a layer's file."""
    return f"{directory}/layer-{layer:05d}{kind}.safetensors"


def make_once(
    work: Path, name: str, make: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the arrays of a file below ``work``, making and writing it where it is not there."""
    path = work / name
    if path.exists():
        return load(work, name)
    arrays = dict(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, arrays)
    return arrays


def discard_stats(work: Path, record: LayerRecord) -> None:
    """Delete what calibrate kept of a layer, whose last reader is done with it."""
    for kind in STATS_KINDS:
        if kind in record.files:
            (work / record.files[kind]).unlink(missing_ok=True)


class TensorFile:
    """A file below ``work``, whose arrays are read one at a time.

    The file is read, not mapped: mapped pages would count in the peak memory.

    Raises:
      RecordError: where it is gone or damaged.
    """

    def __init__(self, work: Path, name: str) -> None:
        self._path = work / name
        with self._opened() as file:
            self._names = frozenset(file.keys())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> np.ndarray:
        with self._opened() as file:
            array: np.ndarray = file.get_tensor(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safe_open(self._path, "numpy", backend="pread") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise RecordError(
                self._path,
                f"cannot be read ({error})",
                "run the step that made it again; if it was discarded, delete the work directory "
                "and calibrate again",
            ) from error


def load(work: Path, name: str) -> dict[str, np.ndarray]:
    """Read all arrays of a file below ``work``.

    Raises:
      RecordError: as `TensorFile`.
    """
    file = TensorFile(work, name)
    return {key: file[key] for key in file}
