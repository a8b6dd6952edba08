"""SIGINT, SIGTERM and SIGHUP as an exception, so that unfinished work is cleaned up."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# timeout(1) and others signal a process and then its group: two signals, one request.
SAME_SECONDS = 0.5
GO_ON = "Interrupted; run the same command again to resume"

_last_words: list[str] = []  # if not empty, a signal ends the process at once


class Interrupted(BaseException):
    """A signal asks the process to end. Not an `Exception`, so the work does not catch it.

    Attributes:
      number: the signal's number.
      during: what was going on, from the caller of `raised`.
    """

    def __init__(self, number: int, during: Any) -> None:
        super().__init__(number)
        self.number, self.during = number, during


@contextmanager
def raised(during: Callable[[], Any]) -> Iterator[None]:
    """Raise `Interrupted` in the main thread at the first signal; end at once at a second.

    An ignored signal, as under nohup, stays ignored. After a signal this lasts until the process
    ends; otherwise default handling returns, since nothing is left to clean up.

    Args:
      during: called when the signal arrives.
    """
    first: list[Interrupted] = []

    def handle(number: int, _: FrameType | None) -> None:
        if not first and not _last_words:
            first.append(Interrupted(number, during()))
            raise first[0]

    def not_raised(lost: Any) -> None:
        # Python drops what is raised in a destructor or a weak reference's callback: raise it again
        # afterwards.
        if lost.exc_value not in first:
            sys.__unraisablehook__(lost)
            return
        number = first.pop().number
        threading.Timer(SAME_SECONDS / 5, os.kill, (os.getpid(), number)).start()

    handled = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    threading.Thread(target=_watch, args=(read_end,), daemon=True).start()
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    sys.unraisablehook = not_raised
    for number in handled:
        signal.signal(number, handle)
    try:
        yield
    finally:
        if not first:
            for number in handled:
                signal.signal(number, signal.SIG_DFL)
            sys.unraisablehook = sys.__unraisablehook__
            signal.set_wakeup_fd(-1)
            os.close(write_end)


@contextmanager
def at_once(line: str) -> Iterator[None]:
    """End the process at the first signal, during a long C call before any work begins.

    Args:
      line: message to print then.
    """
    _last_words.append(line)
    try:
        yield
    finally:
        _last_words.clear()


def _watch(signals: int) -> None:
    """End the process at the second signal, even during a long C call in the main thread."""
    seen = 0.0
    while number := os.read(signals, 1):
        now = time.monotonic()
        if _last_words:
            clear = "\r\x1b[K" if os.isatty(2) else ""  # clears a bar
            os.write(2, f"{clear}{_last_words[0]}\n".encode())
            os._exit(128 + number[0])
        if seen and now - seen > SAME_SECONDS:
            os._exit(128 + number[0])
        seen = seen or now
    os.close(signals)
