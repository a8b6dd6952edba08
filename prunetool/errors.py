"""What the user is told when the work cannot be done.

Every message is one line, ``where: what; what to do``. Anything raised that is not a
`PrunetoolError` is a bug of ours and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class PrunetoolError(Exception):
    """The work failed for a reason that the user can act on.

    Args:
      where: the file, layer, matrix or option at fault.
      what: what is wrong with it.
      todo: what the user can do about it.
    """

    def __init__(self, where: object, what: str, todo: str) -> None:
        super().__init__(f"{where}: {what}; {todo}".replace("\n", " "))
        self.where, self.what, self.todo = where, what, todo


class CheckpointError(PrunetoolError):
    """A checkpoint's files are missing, damaged or not what its index says."""


class ConfigError(PrunetoolError):
    """A config.json or GGUF header asks for something that prunetool does not compute."""


class RecordError(PrunetoolError):
    """The stream from the step before is cut, malformed or of another format."""


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
