"""``prunetool report``."""

from pathlib import Path

import click

from prunetool import console, options, records


@click.command(cls=options.Command)
@options.source_arg
@click.option(
    "-o", "--output", "sink", default="report.html", show_default=True, metavar="FILE",
    help="Write the page here; - is stdout.",
)  # fmt: skip
@click.option(
    "--evaluation",
    "evaluated",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Show this result of evaluate too; if made with --against, a heat map of every head's "
    "attention error. May be given several times.",
)
def report(source: str, sink: str, evaluated: tuple[Path, ...]) -> None:
    """Make an HTML page of what each layer kept and what that cost.

    Reads the records of score or compensate from a file or stdin, all before the page is written;
    given the directory that export wrote, it reads the records that it was made of, and of a work
    directory the last ones. Of several sparsities scored from one calibration, it draws the
    expected loss, and beside it the measured one of every --evaluation made with --against. The
    page is one self-contained file.

    \b
    Example:
      prunetool report OUT
      prunetool report refitted.jsonl -o page.html
      prunetool report refitted.jsonl --evaluation compared.json
    """
    options.keep_inputs([sink], [source, *evaluated])
    from prunetool import workdir
    from prunetool.steps import report as step

    with console.summary("report") as said:
        if Path(source).is_dir():
            source = str(workdir.records_of(Path(source)))
        evaluations = [step.read_evaluation(path) for path in evaluated]
        with options.open_source(source) as stream:
            header, layers = records.read(stream)
            options.keep_inputs([sink], [header.source])
            made = list(layers)
        page, sizes = step.make_page(header, made, evaluations)
        with options.open_sink(sink) as out:
            out.write(page)
        said += [f"{len(made)} layers", sizes, "page on stdout" if sink == "-" else sink]
