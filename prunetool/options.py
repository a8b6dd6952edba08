"""The options and arguments that several commands share, one name each."""

import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import IO, Any

import click
from click.core import ParameterSource

from prunetool import console
from prunetool.errors import RecordError, shown

# Other names of a process's open files; macOS has no /proc.
OPEN_FILES = "/proc" if sys.platform == "linux" else "/dev/fd"
# Units as in the Hub's libraries, plus binary units and bytes.
SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,12})?) ?(?:([KMGT])(i?)B|B)?", re.ASCII | re.IGNORECASE)
Parameter = click.Parameter
VERBOSITY = (
    click.Option(
        ["-v", "--verbose"], count=True, help="Say more: tables with a row for every layer."
    ),
    click.Option(["-q", "--quiet"], is_flag=True, help="Say nothing but warnings and errors."),
)


class Command(click.Command):
    """A command that also takes -v and -q after its name, and shows at once that it is at work."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += VERBOSITY

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        verbose, quiet = ctx.params.pop("verbose"), ctx.params.pop("quiet")
        if verbose or quiet:
            console.setup_logging(-1 if quiet else verbose)
        with console.step(self.name or "", waiting=reads_pipe(ctx)):
            return super().invoke(ctx)


def reads_pipe(ctx: click.Context) -> bool:
    """Whether a command's records come from a pipe."""
    return ctx.params.get("source") == "-" and console.is_pipe(sys.stdin)


class Finite(click.FloatRange):
    """A range of numbers without NaN, and without infinity unless ``infinity`` is allowed."""

    def __init__(
        self, low: float, high: float | None = None, *, infinity: bool = False, **is_open: bool
    ) -> None:
        super().__init__(low, high, **is_open)
        self.infinity = infinity

    def convert(self, value: Any, param: Parameter | None, ctx: click.Context | None) -> float:
        """The number, if it is in the range."""
        try:
            number = super().convert(value, param, ctx)
        except click.BadParameter as error:
            if self.max == 1 and (percent := re.fullmatch(r"([1-9]\d?(\.\d*)?)%?", str(value))):
                self.fail(f"{error.message} Did you mean {float(percent[1]) / 100:g}?", param, ctx)
            raise
        if math.isnan(number) or (math.isinf(number) and not self.infinity):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class Several(click.ParamType[tuple[tuple[str, float], ...]]):
    """Numbers of a range, separated by commas, as (as typed, number) pairs."""

    name = "LIST"

    def __init__(self, each: Finite) -> None:
        self.each = each

    def convert(
        self, value: Any, param: Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[str, float], ...]:
        """The numbers; none twice."""
        found = [(part, self.each.convert(part, param, ctx)) for part in value.split(",")]
        if len({number for _, number in found}) < len(found):
            self.fail(f"{value} names a number twice", param, ctx)
        return tuple(found)


class Slice(click.ParamType[str]):
    """A slice as in Python, ``A:B``; either end may be left out, or negative."""

    name = "A:B"

    def convert(self, value: Any, param: Parameter | None, ctx: click.Context | None) -> str:
        """The slice as typed."""
        if not re.fullmatch(r"(-?\d{1,6})?:(-?\d{1,6})?", value, re.ASCII):
            self.fail(f"{value!r} is not a slice, as 4:-2 is", param, ctx)
        return str(value)


def _no_terminal(_: click.Context, __: Parameter, path: str) -> str:
    if path == "-" and sys.stdin.isatty():
        raise click.UsageError(
            "stdin is a terminal: pipe in the previous step, or name a file of its records"
        )
    return path


def _dampings(_: click.Context, __: Parameter, value: str) -> tuple[float, ...] | None:
    if value == "auto":
        return None
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter("give a number, several separated by commas, or auto") from None
    if not all(0 <= number < float("inf") for number in numbers):
        raise click.BadParameter("a damping must be finite and at least 0")
    return numbers


def _size_bytes(_: click.Context, __: Parameter, value: str) -> int:
    said = SIZE.fullmatch(value)
    if said is None:
        raise click.BadParameter("give a size such as 5GB, 500MB, 2GiB, or bytes")
    number, unit, binary = said.groups("")
    power = " KMGT".index(unit.upper() or " ")
    size = round(float(number) * math.pow(1024 if binary else 1000, power))
    if size < 1:
        raise click.BadParameter("a size is at least one byte")
    return size


def named(_: click.Context, __: Parameter, path: Path | None) -> Path | None:
    """An output directory that has a name, and so room for its lock beside it: not the root."""
    if path and path.name == "..":
        path = path.resolve()
    if path and not path.absolute().name:
        raise click.BadParameter("cannot be the root directory: name a directory in it")
    return path


model_arg = click.argument("model")
out_arg = click.argument("out", type=click.Path(path_type=Path), callback=named)
source_arg = click.argument(
    "source", metavar="[FILE]", default="-", callback=_no_terminal, required=False
)
output_opt = click.option(
    "-o", "--output", "sink", default="-", metavar="FILE", help="Write the records here.",
    show_default="stdout",
)  # fmt: skip
revision_opt = click.option("--revision", help="Branch, tag or commit of a Hub model.")
length_opt = click.option(
    "--sequence-length",
    "length",
    default=2048,
    show_default=True,
    type=click.IntRange(2, 1 << 20),
    help="Tokens per sequence.",
)
# Parameters that say how a text is read and cut.
OF_TEXT = {"text_field": "--text-field", "length": "--sequence-length", "bos": "--bos"}
SELF = "self"  # instead of a file: the model writes its own text
TEXT_HELP = (
    "Text to use: plain, JSON lines or Parquet (--text-field), also as .gz, .zst, .bz2 or .xz. "
    "Several are joined."
)
SELF_HELP = (
    f" {SELF}: sequences that the model itself writes, with all of it in memory; a file of this "
    f"name is ./{SELF}."
)
TEXT = (
    click.option(
        "--text-field", show_default="text; with --chat messages",
        help="Field of JSON lines, column of Parquet; of --dataset, if not its own.",
    ),
    click.option(
        "--chat", is_flag=True, help="The field has conversations, lists of messages with role and "
        "content, of which the model's chat template makes text. The template writes the BOS, too.",
    ),
    click.option(
        "--dataset", metavar="NAME",
        help="A data set of the Hub instead of --text: wikitext2, c4, ptb, alpaca, or OWNER/NAME, "
        "if need be followed by :CONFIG (the directory of its files) and @REVISION. Only the files "
        "that are used are downloaded; with --shuffle those are all, of c4 one.",
    ),
    click.option(
        "--tokens", "tokens_path", metavar="FILE", type=click.Path(path_type=Path),
        help="Token ids instead of text: .npy or .safetensors.",
    ),
    length_opt,
    click.option(
        "--bos", type=click.Choice(["auto", "always", "never"]), default="auto",
        show_default=True, help="Begin each window with the BOS token. auto: as the model's "
        "tokenizer does for text; none for --tokens.",
    ),
)  # fmt: skip


def given(option: str) -> bool:
    """Whether an option, by its parameter's name, stands on the command line."""
    source = click.get_current_context().get_parameter_source(option)
    return source is ParameterSource.COMMANDLINE


def text_options(
    command: Callable[..., None],
    *,
    by_model: bool = False,
    required: bool = True,
    split: str = "train",
) -> Callable[..., None]:
    """Add the options for the model's text, passed as one argument ``text`` (`corpus.Text`).

    Args:
      command: the command.
      by_model: whether it can use a text that the model writes.
      required: whether one must be given; without it, ``text`` is None.
      split: the split of a data set, by default.
    """

    @wraps(command)
    def gathered(
        *, texts: tuple[str, ...], text_field: str | None, tokens_path: Path | None, length: int,
        bos: str, dataset: str | None, split: str, chat: bool, **others: Any,
    ) -> None:  # fmt: skip
        sources = sum(map(bool, (texts, tokens_path, dataset)))
        if sources > 1 or (required and not sources):
            raise click.UsageError("give either --text or --tokens or --dataset")
        if given("split") and not dataset:
            raise click.UsageError("--split is for --dataset")
        if text_field and (tokens_path or SELF in texts):
            raise click.UsageError("--text-field is for --text FILE or --dataset")
        if chat and (tokens_path or SELF in texts or not sources):
            raise click.UsageError("--chat is for conversations in --text or --dataset")
        for option, flag in OF_TEXT.items():
            if given(option) and not sources:
                raise click.UsageError(f"{flag} is for --text, --tokens or --dataset: give one")
        if SELF in texts and not by_model:
            raise click.UsageError(
                f"--text {SELF} is for calibrate and recover: a file of this name is ./{SELF}"
            )
        if SELF in texts and len(texts) > 1:
            raise click.UsageError(f"--text {SELF} cannot be joined with other text")
        from prunetool.corpus import Text
        from prunetool.dataset import Dataset

        paths = tuple(Path(path) for path in texts if path != SELF)
        column = text_field or ("messages" if chat else None)
        named = Dataset(dataset, split, column) if dataset else None
        text = Text(paths, column or "text", tokens_path, length, bos, SELF in texts, named, chat)
        command(text=text if sources else None, **others)

    text_opt = click.option(
        "--text", "texts", multiple=True, metavar="FILE", type=click.Path(),
        help=TEXT_HELP + SELF_HELP * by_model,
    )  # fmt: skip
    split_opt = click.option(
        "--split", default=split, show_default=True, help="Split of --dataset, as its files say."
    )
    for option in (split_opt, *reversed(TEXT), text_opt):
        gathered = option(gathered)
    return gathered


dtype_opt = click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="Precision of matrix products; sums are float32. auto: bfloat16 "
    "if the checkpoint is, else float32.",
)
max_shard_size_opt = click.option(
    "--max-shard-size", "max_shard_bytes", metavar="SIZE", callback=_size_bytes, default="5GB",
    show_default=True, help="Maximum shard size, such as 5GB, 2GiB or 1000000. No layer of a "
    "checkpoint is split: a larger one gets its own shard, as does a larger embedding or head.",
)  # fmt: skip
damping_opt = click.option(
    "--damping",
    "dampings",
    default="auto",
    show_default=True,
    callback=_dampings,
    help="Damping of the refit, as a fraction of the Gram matrix's mean diagonal. auto tries "
    "1e-4 … 1 on the held-out tokens; a number, or several separated by commas, is tried the same "
    "way. A matrix whose held-out error none lowers keeps its weights.",
)


device_opt = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="Where JAX computes; auto uses a GPU if there is one.",
)


def overwrite_opt(what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The flag --overwrite of a command that replaces ``what`` only then."""
    return click.option("--overwrite", is_flag=True, help=f"Replace {what}.")


def device_options(command: Callable[..., None]) -> Callable[..., None]:
    """Where the forward computes, and in which precision: ``device`` and ``dtype``."""
    return dtype_opt(device_opt(command))


profile_opt = click.option(
    "--profile",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write JAX's trace here (.json.gz, for Perfetto), and seconds per phase to the records.",
)
discard_opt = click.option(
    "--discard",
    is_flag=True,
    help="Delete a layer's stats once it is done, to save disk "
    "space. Another sparsity then needs another calibration.",
)


@contextmanager
def open_source(path: str) -> Iterator[IO[str]]:
    """Open the records to read, ``-`` being stdin."""
    if path == "-":
        yield sys.stdin
        return
    try:
        file = Path(path).open(encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise RecordError(path, error.strerror or "cannot be read", "check the name") from error
    with file:
        yield file


@contextmanager
def open_sink(path: str) -> Iterator[IO[str]]:
    """Open the records' destination, ``-`` being stdout. A file appears once the stream is whole.

    If it is a link, its target is written. Devices, pipes and open files (/dev/stdout) are appended
    to, never replaced.
    """
    from prunetool.checkpoint.writer import atomic

    try:
        if path == "-":
            yield sys.stdout
            return
        place = _place(Path(path))
        if place.is_relative_to(OPEN_FILES) or (place.exists() and not place.is_file()):
            with place.open("a", encoding="utf-8") as file:
                yield file
        else:
            with atomic(place) as partial, partial.open("w", encoding="utf-8") as file:
                yield file
    except OSError as error:  # only errors on opening name the file
        error.filename = error.filename or ("stdout" if path == "-" else path)
        raise


def _place(path: Path) -> Path:
    """Follow a chain of links to its end or an open file: /dev/stdout leads to /proc/self/fd/1.

    Raises:
      OSError: if the chain is endless.
    """
    with suppress(FileNotFoundError):
        path.stat()
    while True:
        path = Path(os.path.realpath(path.parent), path.name)
        if path.is_relative_to(OPEN_FILES) or not path.is_symlink():
            return path
        path = path.parent / path.readlink()


def keep_inputs(outputs: Iterable[Path | str | None], inputs: Iterable[Path | str | None]) -> None:
    """Refuse a command line that would overwrite the command's inputs, or that cannot be written.

    Args:
      outputs: files to write, ``-`` being stdout.
      inputs: files to read, ``-`` being stdin; for a directory, the checkpoint files in it.

    Raises:
      click.UsageError: if an output is one of the inputs.
      WorkError: if an output's directory is not there.
    """
    from prunetool.checkpoint.source import NEEDED_FILES
    from prunetool.checkpoint.writer import need_directory

    for output in outputs:
        if output and output != "-":
            need_directory(Path(output))

    read = set()
    for given in inputs:
        files = [given]
        if given and given != "-" and os.path.isdir(given):
            files = [file for name in NEEDED_FILES for file in Path(given).glob(name)]
        read |= {_regular_file(file, 0) for file in files}
    for output in outputs:
        if _regular_file(output, 1) in read - {None}:
            name = "stdout" if output == "-" else shown(output)
            raise click.UsageError(f"{name} is an input of this command: write to another file")


def _regular_file(path: Path | str | None, number: int) -> tuple[int, int] | None:
    """Identify a regular file independent of its name; None for a device, a pipe or nothing.

    Args:
      path: its path, or ``-`` for a standard stream.
      number: number of that stream.
    """
    try:
        found = os.fstat(number) if path == "-" else os.stat(path or "")
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None
