"""Errors that tell the user why the work cannot be done.

Every message is one line, ``where: what; what to do``. Any other exception is a bug and keeps its
traceback.
"""

import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN = 100  # characters of foreign text that a message, table or card shows
LONGEST = 3 * 80 - len("Error: ")  # characters of a message: three lines of a terminal


def shown(value: object, limit: int = SHOWN) -> str:
    """Make foreign text safe to show: one short line without control characters.

    Control characters, line separators, direction marks and halves of surrogate pairs become
    escapes (``\\x1b``); the middle of a text beyond ``limit`` characters is left out.
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > 2 * limit:  # do not escape a megabyte
        text = f"{text[:limit]}…{text[-limit:]}"
    text = "".join(map(_escaped, text))
    if len(text) <= limit:
        return text
    tail = limit // 2  # a path ends in the file's name
    return f"{text[: limit - tail - 1]}…{text[-tail:]}"


def plain(text: str, limit: int = SHOWN) -> str:
    """Escape foreign text for a Markdown page: one short line without markup."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|&~$:@])", r"\\\1", shown(text, limit))


def _escaped(letter: str) -> str:
    if letter == " " or unicodedata.category(letter)[0] not in "CZ":
        return letter
    return letter.encode("unicode_escape").decode("ascii")


class PrunetoolError(Exception):
    """The work failed for a reason that the user can act on.

    Every part is escaped, and cut (`shown`) to `LONGEST` characters in all: file names, tensor
    names and values in it may come from a foreign file.

    Args:
      where: the file, layer, matrix or option at fault.
      what: what is wrong with it.
      todo: what the user can do about it.
    """

    def __init__(self, where: object, what: str, todo: str) -> None:
        end = f"; {shown(todo, SHOWN)}"
        where_least = min(len(str(where)), 60)
        middle = f": {shown(what, LONGEST - len(end) - where_least - 2)}"
        super().__init__(shown(where, LONGEST - len(middle) - len(end)) + middle + end)
        self.where, self.what, self.todo = where, what, todo


class CheckpointError(PrunetoolError):
    """A checkpoint's files are missing, damaged or not what its index says."""


class ConfigError(PrunetoolError):
    """A config.json or GGUF header requires something that prunetool does not compute."""


class RecordError(PrunetoolError):
    """The stream from the previous step is cut, malformed or of another format."""


class StepFailed(RecordError):
    """The previous step failed, and has said why itself."""


class CorpusError(PrunetoolError):
    """The text or tokens cannot be used."""


class NumericalError(PrunetoolError):
    """A solve failed or a value is not finite."""


class WorkError(PrunetoolError):
    """The work or output directory is in use, out of room, or from another run."""


class HubError(PrunetoolError):
    """The Hugging Face Hub refused or did not answer."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Add to a solve's error where in the model it failed."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{where}: {error.where}", error.what, error.todo) from error
