"""``prunetool recover``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prunetool import console, options, records
from prunetool.errors import RecordError

if TYPE_CHECKING:
    from prunetool.corpus import Text

SAMPLES, HELD_OUT = 64, 4


@click.command(cls=options.Command)
@options.source_arg
@partial(options.text_options, by_model=True, required=False)
@click.option(
    "--samples",
    default=SAMPLES,
    show_default=True,
    type=click.IntRange(1),
    help="Sequences to train on; without --text, the first ones of the calibration.",
)
@click.option(
    "--held-out",
    default=HELD_OUT,
    show_default=True,
    type=click.IntRange(1),
    help="Further sequences that only measure; without --text, ones that calibrate held out.",
)
@click.option(
    "--what",
    type=click.Choice(["all", "norms"]),
    default="all",
    show_default=True,
    help="all: every weight that is kept. norms: those of the norms alone, for little disk.",
)
@click.option(
    "--epochs",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="How often each sequence is used.",
)
@click.option(
    "--learning-rate",
    type=options.Finite(0, min_open=True),
    show_default="2.5e-4 times the held-out KL before in nats, at most 5e-4; norms: 5e-3",
    help="The largest rate of the one-cycle schedule.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Seed of the order, and of --text self.",
)
@options.device_options
@options.profile_opt
@options.output_opt
def recover(
    source: str,
    text: "Text | None",
    samples: int,
    held_out: int,
    what: str,
    epochs: int,
    learning_rate: float | None,
    seed: int,
    dtype: str,
    device: str,
    profile: Path | None,
    sink: str,
) -> None:
    """Train the kept weights to predict what the dense model predicts.

    The only step that trains, and optional. Reads the records of compensate (or score) and descends
    on the KL divergence of the next-token distributions over the calibration's tokens, or those of
    --text, one sequence a step. Weights that were removed stay removed. What was best on held-out
    sequences is kept, and if nothing was better, what came in. Costs about five forward passes of
    the tokens per epoch, and disk for four float32 numbers per kept weight and for the residual
    streams. If killed, the same command resumes within the step.

    \b
    Example:
      prunetool recover refitted.jsonl > recovered.jsonl
    """
    options.keep_inputs([sink, profile], [source, *(text.files if text else [])])
    from prunetool import devices
    from prunetool.steps import recover as step

    with console.summary("recover") as said, options.open_source(source) as stream:
        devices.start(device)
        header, layers = records.read(stream)
        options.keep_inputs([sink, profile], [header.source])
        if header.had("recover"):
            raise RecordError(source, "was already recovered", "give --epochs to train for longer")
        if header.adds_biases:
            raise RecordError(
                source, "has biases, and the dense model none", "run compensate without --bias"
            )
        if header.cuts_hidden:
            raise RecordError(
                source, "has its hidden dimensions cut", "leave recover out; fine-tune OUT instead"
            )
        job = step.prepare(
            header, list(layers), text, samples, held_out,
            {"what": what, "epochs": epochs, "seed": seed, "dtype": dtype}, learning_rate, profile,
        )  # fmt: skip
        for option, used in (
            ("samples", len(job.tokens) - job.held_out),
            ("held_out", job.held_out),
        ):
            if options.given(option) and click.get_current_context().params[option] > used:
                console.log.warning(
                    "the calibration has only %d for --%s; give --text for more",
                    used,
                    option.replace("_", "-"),
                )
        job.run.write(partial(options.open_sink, sink), job.layers(), job.needed_bytes)
        (_, before), (steps, after) = job.kl[0], job.best
        said += [
            f"held-out KL {before:.4f} → {after:.4f} nats",
            console.counted(steps, "step"),
            f"learning rate up to {job.largest_rate:.2g}",
        ]
