"""What the user is told when the work cannot be done.

Every message is one line, ``where: what; what to do``. Anything raised that is not a
`PrunetoolError` is a bug of ours and keeps its traceback.
"""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN = 100  # characters of a foreign text that a message, a table or a card shows
LONGEST = 3 * 80 - len("Error: ")  # characters of a message: three lines of a terminal


def shown(value: object, limit: int = SHOWN) -> str:
    """Foreign text as it may be shown: one line, nothing that a terminal obeys, and not long.

    Control characters, line separators, direction marks and halves of surrogate pairs become
    escapes (``\\x1b``); of a text beyond ``limit`` characters the middle is left out.
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > 2 * limit:  # nobody waits for a megabyte to be escaped
        text = f"{text[:limit]}…{text[-limit:]}"
    text = "".join(map(_escaped, text))
    if len(text) <= limit:
        return text
    tail = limit // 2  # a file's name is at its end
    return f"{text[: limit - tail - 1]}…{text[-tail:]}"


def _escaped(letter: str) -> str:
    if letter == " " or unicodedata.category(letter)[0] not in "CZ":
        return letter
    return letter.encode("unicode_escape").decode("ascii")


class PrunetoolError(Exception):
    """The work failed for a reason that the user can act on.

    Every part is shown escaped, and cut (`shown`) to `LONGEST` characters in all: file names,
    tensor names and values in it may come from a file of somebody else.

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
    """A config.json or GGUF header asks for something that prunetool does not compute."""


class RecordError(PrunetoolError):
    """The stream from the step before is cut, malformed or of another format."""


class StepFailed(RecordError):
    """The step before failed, and has said why itself."""


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
    """Say where in the model a solve failed, when the mathematics inside cannot know."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{where}: {error.where}", error.what, error.todo) from error
