"""``prunetool score``."""

from pathlib import Path
from typing import Any

import click

from prunetool import __version__, console, options, records

METHODS = (
    "newton", "newton-box", "newton-tied", "obs", "flap", "wanda-sp", "magnitude", "random"
)  # fmt: skip
TARGETS = ("heads", "channels")


@click.command()
@options.source_arg
@click.option(
    "--sparsity", required=True, type=click.FloatRange(0, 1, max_open=True),
    help="Fraction to remove of the parameters of all decoder layers' seven matrices.",
)  # fmt: skip
@click.option(
    "--method", type=click.Choice(METHODS), default="newton", show_default=True,
    help="How units are ranked.",
)  # fmt: skip
@click.option(
    "--target", default="heads,channels", show_default=True, metavar="LIST",
    help="What to prune: heads (whole KV groups), channels (of the MLP), or both.",
)  # fmt: skip
@click.option(
    "--allocation", type=click.Choice(["global", "uniform"]), default="global",
    show_default=True, help="global: one ranking over all layers. uniform: the same counts in "
    "every layer, met to one step of --multiple-of in each.",
)  # fmt: skip
@click.option(
    "--weighting", type=click.Choice(["none", "token"]), default="none", show_default=True,
    help="token: weigh each token by 1/‖residual stream‖² when layers are compared.",
)  # fmt: skip
@click.option(
    "--multiple-of", default=32, show_default=True, type=click.IntRange(1),
    help="A pruned layer keeps a multiple of this many channels.",
)  # fmt: skip
@click.option(
    "--min-channels", default=32, show_default=True, type=click.IntRange(1),
    help="No layer keeps fewer channels.",
)  # fmt: skip
@click.option(
    "--lambda", "lam", default=1.0, show_default=True,
    type=click.FloatRange(0, min_open=True), help="λ of newton and its variants, against inputs "
    "of spectral norm 1; inf makes the count a hard constraint.",
)  # fmt: skip
@click.option(
    "--newton-iterations", type=click.IntRange(1), metavar="T",
    help="Run the paper's Algorithm 1 for T steps instead of its closed form (same result).",
)  # fmt: skip
@click.option(
    "--damping", default=1e-4, show_default=True, type=click.FloatRange(0),
    help="Of newton's and obs's systems, as a fraction of their diagonal.",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of the method random.")
@options.output_opt
def score(source: str, target: str, sink: str, **how: Any) -> None:
    """Say which heads and channels each layer keeps.

    Reads the records of calibrate and adds the units kept. A global ranking must see all layers
    before it writes its first record.

    \b
    Example:
      prunetool calibrate MODEL --text wiki.txt | prunetool score --sparsity 0.2 > kept.jsonl
    """
    targets = tuple(target.split(","))
    if not set(targets) <= set(TARGETS) or len(set(targets)) < len(targets):
        raise click.BadParameter(f"{target!r}: name some of {', '.join(TARGETS)}, with commas")
    if how["newton_iterations"] and (how["method"] != "newton" or how["lam"] == float("inf")):
        raise click.UsageError("--newton-iterations goes with --method newton and a finite λ")

    from prunetool.model import reopen
    from prunetool.steps.score import Scoring

    with console.summary("score") as said, options.open_source(source) as stream:
        header, layers = records.read(stream)
        header = header.after(
            options.history_step("score", __version__, target=",".join(targets), **how)
        )
        model = reopen(header.model, header.fingerprint)
        job = Scoring(model, Path(header.work), targets, how)
        with options.open_sink(sink) as out:
            records.write(out, header, job.layers(header, layers))
        said += job.said
