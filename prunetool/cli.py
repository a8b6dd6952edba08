"""The command group, logging, and the one place where errors become messages."""

import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import click

from prunetool import __version__
from prunetool.console import setup_logging
from prunetool.errors import PrunetoolError

COMMANDS = (
    "convert", "inspect", "calibrate", "score", "compensate", "export", "evaluate", "report"
)  # fmt: skip


class Group(click.Group):
    """Loads a command's module when it is asked for, in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"prunetool.commands.{cmd_name}"), cmd_name)
        return command


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prunetool")
@click.option("-v", "--verbose", count=True, help="Say more: a line for every layer.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors.")
def group(verbose: int, quiet: bool) -> None:
    """Make Llama checkpoints smaller without training, one layer at a time.

    \b
    Example:
      prunetool calibrate MODEL --text wiki.txt \\
        | prunetool score --sparsity 0.2 \\
        | prunetool compensate \\
        | prunetool export OUT
    """
    setup_logging(-1 if quiet else verbose)


def main() -> None:
    """Run a command; exit 0 done, 1 the work failed, 2 the command line was wrong."""
    # OpenBLAS, read when NumPy loads: its idle threads spin for 2²⁶ cycles by default, which made
    # solves 10 to 20 times slower beside another step of the pipe on two cores.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    _restart_with_huge_pages()
    try:
        group()
    except PrunetoolError as error:
        if os.environ.get("PRUNETOOL_DEBUG"):
            raise
        click.echo(f"Error: {error}", err=True)
    except OSError as error:
        # A disk that is full, a permission that is missing: the user's, not a bug.
        if os.environ.get("PRUNETOOL_DEBUG"):
            raise
        where = error.filename or "output"
        click.echo(f"Error: {where}: {error.strerror or error}; mend it and run again", err=True)
    sys.exit(1)


def _restart_with_huge_pages() -> None:
    """Have glibc put large arrays in huge pages, which made calibrate 11 % faster.

    It reads the variable when a program starts.
    """
    own = Path(sys.argv[0]).name in ("prunetool", "__main__.py")  # nobody else's process
    if own and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        with suppress(OSError):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
