"""``prunetool clean``."""

from pathlib import Path

import click

from prunetool import console, options


@click.command(cls=options.Command)
@click.argument("place", metavar="DIR", type=click.Path(path_type=Path))
def clean(place: Path) -> None:
    """Delete the files of a work directory: stats, scores, refits and their records.

    DIR is the work directory, or the checkpoint that export wrote from it, which stays. All
    checkpoints made from one calibration share it: another sparsity, or a report on any of them,
    then needs another calibration. Files that no step wrote stay.

    \b
    Example:
      prunetool clean OUT
    """
    from prunetool import workdir
    from prunetool.checkpoint import writer

    with console.summary("clean") as said:
        made_in = writer.work_of(place)
        if made_in and not Path(made_in).exists():
            said += [f"{made_in} is gone already"]
            return
        work = workdir.of(place)
        with workdir.lock(work):
            before = workdir.size_bytes(work, *workdir.EVERYTHING)
            workdir.clear(work)
            freed = before - workdir.size_bytes(work, *workdir.EVERYTHING)
        said += [f"deleted {freed / 1e6:,.1f} MB in {work}"]
        if work.exists():
            said += ["files that no step wrote stay there"]
