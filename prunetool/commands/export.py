"""``prunetool export``."""

from pathlib import Path

import click

from prunetool import __version__, console, options, records


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@options.source_arg
@click.option(
    "--format", "form", type=click.Choice(["auto", "dense"]), default="auto", show_default=True,
    help="auto: really smaller matrices, as a stock architecture where the layers are alike, else "
    "with a loader file. dense: the original shapes with zeros, loadable everywhere.",
)  # fmt: skip
@options.overwrite_opt
def export(out: Path, source: str, form: str, overwrite: bool) -> None:
    """Write the pruned checkpoint to the directory OUT.

    Reads the records of score or compensate, all of them before anything is written. OUT is a
    checkpoint only once its index is there, which is written last. Killed, the same command goes on
    after the last whole layer.

    \b
    Example:
      prunetool export SmolLM2-pruned refitted.jsonl
    """
    from prunetool import workdir
    from prunetool.checkpoint.writer import begun, finished, refuse_non_empty
    from prunetool.steps.export import write_checkpoint

    with console.summary("export") as said, options.open_source(source) as stream:
        header, layers = records.read(stream)
        header = header.after(options.history_step("export", __version__, format=form))
        run = workdir.digest([header.fingerprint, header.history])
        with workdir.lock(out.absolute()):
            there = finished(out, run)
            if not there and not begun(out, run):
                refuse_non_empty(out, overwrite=overwrite)
            made = list(layers)
            if there:
                said += [f"{out} holds it already (delete it to write it again)"]
            else:
                said += write_checkpoint(
                    header, made, out,
                    run=run, dense=form == "dense", overwrite=overwrite,
                )  # fmt: skip
