"""Output for people, on stderr: a bar, tables, a summary. The only user of tqdm and rich.

The steps of a pipe are processes that write to one terminal. Each locks it while it writes
(`fcntl.lockf`), and clears the line that a bar may be on, so that no line is torn. Another lock on
it (`fcntl.flock`) belongs to the step whose bar is shown: it works, while the others wait for their
input or their turn. Both are kernel locks: they leave no file, and end with their process.
"""

import fcntl
import logging
import os
import resource
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, TypeVar

from prunetool.errors import shown

T = TypeVar("T")
log = logging.getLogger("prunetool")
SEPARATOR = ", "
LINE = 1000  # characters of a message or title; paths in it may be long
COLUMNS = 80  # at most, so that a bar still fits when a wider window is narrowed to this
MOVES = 200  # recent moves from which the time left is estimated
ROWS = 12  # of a table without -v, at most
TICK_SECONDS = 0.2  # between two redraws
GRACE_SECONDS = 1.0  # for another process to finish writing; a stopped one never does
MARGIN = 3  # columns after the bar, so that ^C stays on its line
CLEAR = "\r\x1b[K"
TERMINAL = "/proc/self/fd/2" if sys.platform == "linux" else ""  # reopens it, even without a name

_write_lock = threading.Lock()  # the kernel's locks do not distinguish threads


class _Handler(logging.StreamHandler[IO[str]]):
    """Writes a message as one line without control characters: it may contain foreign names.

    On a terminal, a summary is folded between its parts.
    """

    def format(self, record: logging.LogRecord) -> str:
        said = shown(super().format(record), LINE)
        parts = said.split(SEPARATOR) if getattr(record, "folds", False) and _on_terminal() else []
        lines = [parts.pop(0)] if parts else [said]
        for part in parts:
            if len(lines[-1]) + len(part) + 3 <= _columns():
                lines[-1] += f", {part}"
            else:
                lines[-1] += ","
                lines.append(f"  {part}")
        return "\n".join(lines)

    def emit(self, record: logging.LogRecord) -> None:
        with no_bar():
            super().emit(record)


def setup_logging(verbosity: int) -> None:
    """Log to stderr: only warnings at -1, summaries at 0, full tables at 1."""
    level = {-1: logging.WARNING, 0: logging.INFO}.get(max(verbosity, -1), logging.DEBUG)
    log.handlers = [_Handler(sys.stderr)]
    log.setLevel(level)
    log.propagate = False


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def _writing() -> Iterator[None]:
    """Keep other threads and processes from writing to the terminal."""
    last = time.monotonic() + GRACE_SECONDS
    with _write_lock:
        while time.monotonic() < last:
            try:
                fcntl.lockf(sys.stderr, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # another process holds it
                time.sleep(0.005)
            except OSError:  # terminals cannot be locked here
                break
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.lockf(sys.stderr, fcntl.LOCK_UN)


@contextmanager
def no_bar(instead: str = CLEAR) -> Iterator[None]:
    """Clear the bar of any step, and keep it away while lines are written to the terminal."""
    if not _on_terminal():
        yield
        return
    with _writing():
        sys.stderr.write(instead)
        sys.stderr.flush()
        yield
        sys.stderr.flush()


def write(sink: IO[str], text: str) -> None:
    """Write to a stream at once, clearing a bar on the same terminal."""
    with no_bar() if sink.isatty() else nullcontext():
        sink.write(text)
        sink.flush()


def counted(number: int, noun: str) -> str:
    """A number of things: 1 step, 1,000 steps."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def is_pipe(stream: IO[str]) -> bool:
    """Whether a stream is one end of a pipe."""
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):  # not a system stream, or closed
        return False


class _Step:
    """What a command is doing and how far it is, for the bar and the summary.

    Args:
      command: its name.
      waiting: whether it begins by waiting for a previous step.
    """

    def __init__(self, command: str, *, waiting: bool = False) -> None:
        self.command = command
        self.item = self.doing = "starting"
        self.bar: _Bar | None = None
        self.begun = time.monotonic()
        self.waited = 0.0  # seconds
        self.waits_since = self.begun if waiting else None
        self.start(0, 0)

    def start(self, done: float, total: int) -> None:
        """Begin work on ``total`` units, of which an earlier run did ``done``."""
        self.done, self.total = done, total
        self.moves: deque[tuple[float, float]] = deque(maxlen=MOVES)

    def move(self, done: float) -> None:
        """Record how many units are done, fractions included."""
        if done <= self.done:
            return
        self.done = done
        self.moves.append((done, self.worked()))

    def worked(self) -> float:
        """Seconds worked so far."""
        now = time.monotonic()
        return now - self.begun - self.waited - (now - (self.waits_since or now))

    def left(self) -> float | None:
        """Estimated seconds for the rest; None if there is no estimate yet."""
        moves = list(self.moves)
        if len(moves) < 2:  # the first one does not count: it was compiled
            return None
        (before, then), (done, last) = moves[0], moves[-1]
        seconds = (self.total - done) * (last - then) / (done - before)
        return max(seconds - (self.worked() - last), 0.0)

    def line(self, columns: int) -> str:
        """One line of at most ``columns`` columns."""
        from tqdm import tqdm

        said = f"{self.command}: {self.doing}"
        clock = tqdm.format_interval(self.worked())
        if not self.total:
            return f"{said} {clock}"[:columns]
        left = self.left()
        rest = "" if left is None else f", {tqdm.format_interval(left)} left"
        meter: str = tqdm.format_meter(
            min(self.done, self.total),
            self.total,
            self.worked(),
            ncols=columns,
            prefix=said,
            ascii="utf" not in (sys.stderr.encoding or "").lower(),
            bar_format=f"{{desc}} {{percentage:3.0f}}% |{{bar}}| {clock}{rest}",
        )
        return meter[:columns]


_step = _Step("prunetool")


@contextmanager
def step(command: str, *, waiting: bool) -> Iterator[None]:
    """Show what a command does until it ends: a bar on a terminal, nothing elsewhere or with -q.

    Args:
      command: its name.
      waiting: whether it reads from a pipe; then there is no bar before the first input.
    """
    global _step
    _step = _Step(command, waiting=waiting)
    if not (_on_terminal() and log.isEnabledFor(logging.INFO)):
        yield
        return
    with _turn() as mine:
        _step.bar = bar = _Bar(_step, mine)
        thread = threading.Thread(target=bar.keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            bar.ended.set()
            thread.join()


class _Bar:
    """Draws a step's bar while it works and no other step's is shown.

    Args:
      step: the step.
      mine: takes or returns the turn to show a bar (`_turn`).
    """

    def __init__(self, step: _Step, mine: Callable[[bool], bool]) -> None:
        self._step, self._mine, self._drawn = step, mine, False
        self._lock = threading.Lock()
        self.ended = threading.Event()

    def keep(self) -> None:
        """Redraw until the step has ended."""
        with suppress(OSError):  # the terminal is gone
            while not self.ended.is_set():
                self.look()
                self.ended.wait(TICK_SECONDS)
            if self._drawn:
                with no_bar():
                    pass

    def look(self) -> None:
        """Draw the current state."""
        with self._lock:
            since = self._step.waits_since
            works = since is None or (self._drawn and time.monotonic() - since < TICK_SECONDS)
            if works and self._mine(True):
                with no_bar(f"\r{self._step.line(_columns() - MARGIN)}\x1b[K"):
                    self._drawn = True
            elif self._drawn:
                with no_bar():
                    self._drawn = self._mine(False)


@contextmanager
def _turn() -> Iterator[Callable[[bool], bool]]:
    """Yield a function that takes or returns the turn to show a bar; True if it has it.

    The terminal is opened anew for the lock: an inherited descriptor would share it with all
    processes, and `fcntl.lockf` drops its lock whenever any library closes the terminal.
    """
    try:
        own = os.open(TERMINAL or os.ttyname(2), os.O_WRONLY | os.O_NOCTTY)
    except OSError:  # another user's terminal
        yield lambda wanted: wanted
        return

    def mine(wanted: bool) -> bool:
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB if wanted else fcntl.LOCK_UN)
        except BlockingIOError:
            return False
        except OSError:  # terminals cannot be locked here
            pass
        return wanted

    try:
        yield mine
    finally:
        os.close(own)


def _columns() -> int:
    """Columns to use, on a terminal or elsewhere."""
    with suppress(OSError):
        return min(os.get_terminal_size(sys.stderr.fileno()).columns or COLUMNS, COLUMNS)
    return COLUMNS


def doing(what: str) -> None:
    """Say what is being done; its time does not count in the estimate.

    It is drawn at once: a long C call may block Python's other threads.
    """
    _step.doing = what
    _step.moves.clear()
    if _step.bar:
        with suppress(OSError):
            _step.bar.look()


def progress(items: Iterable[T], total: int, done: int = 0, what: str = "layer") -> Iterator[T]:
    """Iterate, moving the bar: an item is done when the next one is asked for.

    Args:
      items: the remaining items.
      total: number of all items, including the first ``done``.
      done: number done by an earlier run.
      what: word for them.
    """
    step = _step
    step.item = step.doing = f"{what} {min(done + 1, total)}/{total}"
    step.start(done, total)
    for number, item in enumerate(items, done + 1):
        yield item
        step.item = step.doing = f"{what} {min(number + 1, total)}/{total}"
        step.move(number)
    step.doing = "finishing"
    step.start(0, 0)


def within(done: int, total: int, what: str) -> None:
    """Move the bar within the current item of `progress`.

    Args:
      done: finished parts.
      total: all parts.
      what: word for them.
    """
    _step.doing = f"{_step.item}, {what} {min(done + 1, total)}/{total}"
    _step.move(int(_step.done) + min(done / total, 0.999))


@contextmanager
def waiting() -> Iterator[None]:
    """Count the time inside as waiting on input, without a bar."""
    step, started = _step, time.monotonic()
    step.waits_since = step.waits_since or started
    try:
        yield
    finally:
        step.waited, step.waits_since = step.waited + time.monotonic() - started, None


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    by: Sequence[float] | None = None,
) -> None:
    """Print a table to stderr, unless -q; at most `ROWS` of its rows, unless -v.

    Args:
      title: may be foreign text.
      columns: column names.
      rows: cells; may be foreign text.
      by: a number per row, if the rows with the largest matter. Without it, neighbours that differ
        only in the number in the first cell are merged, and the middle rows are left out.
    """
    if not log.isEnabledFor(logging.INFO):
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    every = [list(row) for row in rows]
    some = every if log.isEnabledFor(logging.DEBUG) else _fewer(every, by)
    title = shown(title, LINE)
    if by is not None and len(some) < len(every):
        title += f"; the {len(some)} largest of {len(every)} rows, all with -v"
    made = Table()
    for column in columns:
        made.add_column(column, justify="right", overflow="fold")
    for row in some:
        made.add_row(*(Text(shown(cell)) for cell in row))
    with no_bar():
        console = Console(file=sys.stderr, width=_columns())
        console.print(Text(title, "table.title"), made, sep="\n")


def _fewer(rows: list[list[object]], by: Sequence[float] | None) -> list[list[object]]:
    """Reduce the rows to at most `ROWS`, as described in `table`."""
    if by is not None:
        largest = sorted(range(len(rows)), key=lambda i: by[i], reverse=True)[:ROWS]
        return [rows[i] for i in sorted(largest)]
    runs: list[list[list[object]]] = []
    for row in rows:
        if runs and isinstance(row[0], int) and runs[-1][0][1:] == row[1:]:
            runs[-1].append(row)
        else:
            runs.append([row])
    merged = [
        run[0] if len(run) == 1 else [f"{run[0][0]}-{run[-1][0]}", *run[0][1:]] for run in runs
    ]
    if len(merged) <= ROWS:
        return merged
    half = ROWS // 2
    return [*merged[:half], ["…"] * len(merged[0]), *merged[half + 1 - ROWS :]]


@contextmanager
def summary(command: str) -> Iterator[list[str]]:
    """Yield a list for what to say; at the end log it with the times and peak memory."""
    with suppress(OSError):  # of this step alone: `run` does several in one process
        Path("/proc/self/clear_refs").write_text("5")
    said: list[str] = []
    yield said
    times = [f"{_step.worked():.1f} s"]
    if _step.waited >= 0.05:
        times = [f"{times[0]} working", f"{_step.waited:.1f} s waiting on input"]
    parts = [*said, *times, f"peak {_peak()} MB"]
    log.info("%s: %s", command, SEPARATOR.join(parts), extra={"folds": True})


def spent() -> tuple[float, int]:
    """Seconds that this command has worked, and the peak memory of its process, MB."""
    return _step.worked(), _peak()


def _peak() -> int:
    """Peak resident memory of this process, MB."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 // 1_000_000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1_000_000 if sys.platform == "darwin" else 1000)
