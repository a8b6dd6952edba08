"""The command group, logging, and the one place where errors become messages."""

import gc
import os
import select
import sys
import traceback
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from signal import SIGTERM

import click

from prunetool import __version__, console, options, records, signals
from prunetool.errors import PrunetoolError, StepFailed, shown

SECTIONS = {
    "In one command": ("run",),
    "Step by step": ("calibrate", "score", "compensate", "recover", "export"),
    "Look and measure": ("inspect", "evaluate", "bench", "report"),
    "Bring in, pass on, tidy up": ("convert", "sample", "upload", "clean"),
}
COMMANDS = tuple(name for names in SECTIONS.values() for name in names)
# and evaluate with --work
RESUMED = (
    "run", "convert", "sample", "calibrate", "score", "compensate", "recover", "export", "upload",
)  # fmt: skip
STREAMING = ("calibrate", "score", "compensate", "recover")  # the next step reads their output
WRITES_FILES = ("convert", "sample", "export")  # and nothing to stdout
WAIT_SECONDS = 5  # at most, for the previous step to clean up


class Group(click.Group):
    """Imports a command's module only when needed; lists commands in order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands in sections, with one width for all names."""
        width = max(map(len, COMMANDS))
        for title, names in SECTIONS.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            limit = formatter.width - width - 6
            rows = [(f"{n:{width}}", c.get_short_help_str(limit)) for n, c in found if c]
            with formatter.section(title):
                formatter.write_dl(rows)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        if cmd_name not in COMMANDS:
            if ctx and not ctx.resilient_parsing and not cmd_name.startswith("-"):
                near = get_close_matches(cmd_name, COMMANDS, 1)
                meant = f" Did you mean {near[0]!r}?" if near else ""
                ctx.fail(f"No such command {shown(cmd_name)!r}.{meant}")
            return None
        command: click.Command = getattr(import_module(f"prunetool.commands.{cmd_name}"), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run a command. If it fails, the next step is told, and fails silently."""
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except BaseException:
            if ctx.invoked_subcommand in (None, *STREAMING):
                records.tell_failed(sys.stdout)
            raise


@click.group(
    cls=Group, params=[*options.VERBOSITY], context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="prunetool")
def group(verbose: int, quiet: bool) -> None:
    """Make Llama checkpoints smaller without training, one layer at a time.

    Also for checkpoints of Mistral, Qwen2 and Qwen3, and for LlamaGen's models of pictures.

    \b
    Example:
      prunetool run MODEL OUT --text wiki.txt --sparsity 0.2
    \b
    The same, step by step:
      prunetool calibrate MODEL --text wiki.txt \\
        | prunetool score --sparsity 0.2 \\
        | prunetool compensate \\
        | prunetool export OUT
    """
    console.setup_logging(-1 if quiet else verbose)
    if sys.stdout is None and click.get_current_context().invoked_subcommand not in WRITES_FILES:
        raise PrunetoolError("stdout", "is closed", "redirect it to a file, or to /dev/null")


def main() -> None:
    """Run a command.

    Exit status: 0: done; 1: the work failed; 2: the command line was wrong; 128 plus a signal's
    number: ended by that signal.
    """
    # Read by OpenBLAS when NumPy loads: its idle threads spin for 2²⁶ cycles by default, which made
    # solves 10 to 20 times slower beside another step of the pipe on two cores.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    _restart_with_huge_pages()
    _fill_streams()
    code, said = _run()
    if not code:
        sys.exit()
    gc.collect()  # closes generators that the failure left suspended; they remove their files
    with suppress(OSError), console.no_bar():
        click.echo(said, nl=bool(said), err=True)
    if sys.stdout:
        with suppress(OSError):
            sys.stdout.flush()
    # JAX may still be computing, which would segfault while the interpreter shuts down.
    os._exit(code)


def _run() -> tuple[int, str]:
    """Run a command; returns the exit code, and the line to print once its frames are released."""
    try:
        with signals.raised(lambda: click.get_current_context(silent=True)):
            return group.main(standalone_mode=False) or 0, ""
    except signals.Interrupted as signal:
        number, context = signal.number, signal.during
    except click.ClickException as error:
        with console.no_bar():
            error.show()
        return error.exit_code, ""
    except SystemExit as done:  # from click, if nobody reads the output any more
        return int(done.code or 0), ""
    except Exception as error:
        if os.environ.get("PRUNETOOL_DEBUG") or not isinstance(error, PrunetoolError | OSError):
            with console.no_bar():
                traceback.print_exc()
            return 1, ""
        if isinstance(error, StepFailed):  # the failed step has said why
            return 1, ""
        if isinstance(error, OSError):  # such as a missing permission: not a bug
            reason = error.strerror or str(error)
            error = PrunetoolError(error.filename or "output", reason, "fix it and run again")
        return 1, f"Error: {error}"
    return 128 + number, _notice(number, context)


def _notice(number: int, context: click.Context | None) -> str:
    """What to say about a signal; nothing before a command begins, or if a previous step does."""
    if context is None or context.parent is None:
        return ""
    if options.reads_pipe(context):
        # A terminal signals every step; after SIGTERM, see whether the previous step ends.
        before = select.poll()
        before.register(0, 0)  # only for its end
        if number != SIGTERM or before.poll(WAIT_SECONDS * 1000):
            return ""
    starts_over = (
        context.info_name == "convert" and Path(context.params.get("out", "")).suffix == ".gguf"
    )
    if context.params.get("work") or (context.info_name in RESUMED and not starts_over):
        return signals.GO_ON
    return "Interrupted; nothing is kept"


def _fill_streams() -> None:
    """Open the null device for every standard stream that is closed.

    Otherwise a file opened later would get the stream's number, and the stream's output.
    ``sys.stdout`` stays None, so that commands can tell.
    """
    # A newly opened file gets the lowest free number: the stream's own.
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        os.open(os.devnull, os.O_WRONLY)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115


def _restart_with_huge_pages() -> None:
    """Have glibc put large arrays in huge pages, which made calibrate 11 % faster.

    glibc reads the variable when a program starts.
    """
    own = Path(sys.argv[0]).name in ("prunetool", "__main__.py")  # not an embedding process
    if own and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        with suppress(OSError):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
