"""``prunetool report``."""

import io
import sys
from pathlib import Path

import click

from prunetool import console, options, records


@click.command(cls=options.Command)
@options.source_arg
@click.option(
    "-o", "--output", "sink", show_default="report.html, .md, .csv or .json", metavar="FILE",
    help="Write the report here; - is stdout.",
)  # fmt: skip
@click.option(
    "--format",
    "form",
    type=click.Choice(["html", "markdown", "csv", "json"]),
    default="html",
    show_default=True,
    help="html: one page with tables and pictures. The others: the tables alone; csv has a line "
    "per cell.",
)
@click.option(
    "--plots",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write the pictures there too, as SVG files.",
)
@click.option(
    "--evaluation",
    "evaluated",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Show this result of evaluate too; if made with --against, a heat map of every head's "
    "attention error. May be given several times.",
)
@click.option(
    "--bench",
    "benched",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Show this result of bench too.",
)
def report(
    source: str,
    sink: str | None,
    form: str,
    plots: Path | None,
    evaluated: tuple[Path, ...],
    benched: Path | None,
) -> None:
    """Make a page of what each layer kept and what that cost.

    Reads the records of score, compensate or recover from a file or stdin, all before the page is
    written; given the directory that export wrote, it reads the records that it was made of, and of
    a work directory the last ones. Of several sparsities scored from one calibration, it draws the
    expected loss, and beside it the measured one of every --evaluation made with --against. An
    HTML page is one self-contained file.

    \b
    Example:
      prunetool report OUT
      prunetool report refitted.jsonl -o page.html
      prunetool report OUT --evaluation compared.json --bench speed.json
      prunetool report OUT --format markdown -o - | less
      prunetool report OUT --format csv --plots pictures
    """
    from prunetool import workdir
    from prunetool.checkpoint.writer import write_bytes
    from prunetool.steps import bench, page
    from prunetool.steps import report as step

    format_of = page.FORMS[form]
    sink = sink or f"report{format_of.suffix}"
    options.keep_inputs([sink], [source, *evaluated, benched])

    with console.summary("report") as said:
        if Path(source).is_dir():
            source = str(workdir.records_of(Path(source)))
        evaluations = [step.read_evaluation(path) for path in evaluated]
        with options.open_source(source) as stream:
            header, layers = records.read(stream)
            options.keep_inputs([sink], [header.source])
            made = list(layers)
        speeds = bench.read_speeds(benched) if benched else None
        found, sizes = step.make_page(header, made, evaluations, speeds)
        if plots:
            plots.mkdir(parents=True, exist_ok=True)
            for figure in found.figures:
                write_bytes(plots / f"{figure.name}.svg", figure.svg.encode())
        if isinstance(sys.stdout, io.TextIOWrapper):  # a locale may lack the tables' signs
            sys.stdout.reconfigure(encoding="utf-8")
        with options.open_sink(sink) as out:
            console.write(out, format_of.render(found))
        said += [
            console.counted(len(made), "layer"),
            sizes,
            "page on stdout" if sink == "-" else sink,
        ]
