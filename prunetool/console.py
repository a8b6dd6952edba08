"""What people see, on stderr: progress, tables, a summary. The only user of tqdm and rich."""

import logging
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from prunetool.errors import shown

T = TypeVar("T")
log = logging.getLogger("prunetool")
LINE = 1000  # characters of a message or title; paths in it may be long


class _Formatter(logging.Formatter):
    """A message as one line that no terminal obeys: it may hold names of somebody else's."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), LINE)


def setup_logging(verbosity: int) -> None:
    """Log to stderr: warnings at -1, the summaries at 0, every layer at 1 and above."""
    level = {-1: logging.WARNING, 0: logging.INFO}.get(max(verbosity, -1), logging.DEBUG)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(level)
    log.propagate = False


def progress(items: Iterable[T], what: str, total: int, done: int = 0) -> Iterator[T]:
    """Iterate with a bar on a terminal; silent elsewhere and with -q."""
    from tqdm import tqdm

    quiet = not log.isEnabledFor(logging.INFO)
    yield from tqdm(
        items, what, total, initial=done, disable=True if quiet else None, leave=False, unit="layer"
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table to stderr, unless -q. All but the columns' names may be foreign text."""
    if not log.isEnabledFor(logging.INFO):
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(shown(title, LINE), "table.title"), title_justify="left")
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*(Text(shown(cell)) for cell in row))
    console = Console(stderr=True)
    # Not on a terminal, rich would fold a table at 80 columns.
    console.width = console.width if console.is_terminal else 120
    console.print(made)


@contextmanager
def summary(command: str) -> Iterator[list[str]]:
    """Give a list for what to say; at the end log it with time and peak memory."""
    started = time.monotonic()
    said: list[str] = []
    yield said
    seconds = time.monotonic() - started
    log.info("%s: %s", command, ", ".join([*said, f"{seconds:.1f} s", f"peak {_peak()} MB"]))


def _peak() -> int:
    """Peak resident memory of this process, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1_000_000 if sys.platform == "darwin" else 1000)
