"""``prunetool compensate``."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from prunetool import console, options, records
from prunetool.errors import RecordError

COLUMNS = ("layer", "matrix", "removed → refitted", "held out", "damping")


@click.command(cls=options.Command)
@options.source_arg
@options.damping_opt
@click.option(
    "--refit-on",
    "other",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Refit on the tokens of another calibration of the same checkpoint, from its records; "
    "what is kept stays as it was scored.",
)
@click.option(
    "--bias",
    type=click.Choice(["mean", "refit"]),
    show_default="as the model has them",
    help="Give every matrix a bias (zero but for o_proj and down_proj), as stock Llama may have. "
    "mean: the mean of what is removed, instead of a refit, as in FLAP. refit: the refit of the "
    "variation around the mean besides.",
)
@options.discard_opt
@options.profile_opt
@options.output_opt
def compensate(
    source: str,
    dampings: tuple[float, ...] | None,
    other: Path | None,
    bias: str | None,
    discard: bool,
    profile: Path | None,
    sink: str,
) -> None:
    """Refit o_proj and down_proj so that the layer's output moves least.

    Reads the records of score. The refit to the kept heads and channels is closed-form; its damping
    is chosen on the held-out calibration tokens, and the final refit uses all tokens. Matrices
    that sparsegpt or fisher masked get SparseGPT's update; those masked by other methods keep
    their values.

    \b
    Example:
      prunetool compensate kept.jsonl > refitted.jsonl
    """
    options.keep_inputs([sink, profile], [source, *([other] if other else [])])
    from prunetool import plan
    from prunetool.steps import compensate as step
    from prunetool.steps.run import Run

    if bias == "mean" and dampings:
        raise click.UsageError("--damping is for a refit, which --bias mean leaves out")
    grid = () if bias == "mean" else dampings or step.DAMPING_GRID
    with console.summary("compensate") as said, options.open_source(source) as stream:
        header, layers = records.read(stream)
        options.keep_inputs([sink, profile], [header.source])
        if header.had("recover"):
            raise RecordError(source, "was already recovered", "run compensate before recover")
        if header.had("compensate"):
            raise RecordError(source, "was already refitted", "give the records of score")
        if bias and not header.removes_units:
            raise RecordError(
                source, "removed no heads or channels", "leave --bias out: it would be zero"
            )
        tokens = step.Tokens.of(header, other)
        own: dict[str, Any] = {"damping": list(grid)} if grid else {}
        own |= {"bias": bias} if bias else {}
        header = header.after("compensate", **own, **tokens.said)
        run = Run.of(header, profile, discard)
        if bias:
            step.check_biases(run.model.config)
        rows: list[tuple[Any, ...]] = []
        need = plan.refit_bytes(run.model, layers=1 if discard else run.model.layers)
        refitted = step.refit_layers(run, layers, tokens, grid, rows, biased=bool(bias))
        run.write(partial(options.open_sink, sink), refitted, need)
        console.table(
            "Relative output error of the refits",
            COLUMNS,
            [
                [layer, matrix, _shown(removed, refitted), _shown(*held_out), _shown(damping)]
                for layer, matrix, removed, refitted, *held_out, damping in rows
            ],
            by=[refitted for _, _, _, refitted, *_ in rows],
        )
        said += [console.counted(header.layers, "layer")]


def _shown(*values: float | None) -> str:
    """Numbers joined by arrows; a dash if there are none."""
    return " → ".join(f"{value:.4g}" for value in values if value is not None) or "–"
