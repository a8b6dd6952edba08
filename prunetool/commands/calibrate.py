"""``prunetool calibrate``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prunetool import console, options
from prunetool.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from prunetool.corpus import Text
    from prunetool.model import Model

GRADIENTS = 32
FIRST_TOKENS = 2048
ATTENTION_LENGTH = 512  # learning's cost grows with its square


@click.command(cls=options.Command)
@options.model_arg
@partial(options.text_options, by_model=True)
@click.option(
    "--samples", default=128, show_default=True, type=click.IntRange(1), help="Sequences to use."
)
@click.option(
    "--shuffle",
    type=click.IntRange(0),
    metavar="SEED",
    help="Draw windows at random positions of all the text (which tokenises all of it) instead of "
    "consecutive ones from the start. With --text self: the seed of its sampling (default 0).",
)
@click.option(
    "--held-out",
    type=click.IntRange(0),
    show_default="an eighth of --samples, at least 1 of 2",
    help="How many samples, the last ones, are set aside to choose the damping of the refit, and "
    "for recover to measure on. They are not run backward; score and the final refit use them too.",
)
@click.option(
    "--gradients",
    type=click.IntRange(0),
    metavar="SEQUENCES",
    show_default="32, or all that are not held out",
    help="How many samples, evenly spread over those not held out, also run backward, for the "
    "loss's curvature at the outputs of o_proj and down_proj, which score --allocation loss needs, "
    "or for what --labels text keeps instead. "
    "Unless it is 0, the records come when all layers are done.",
)
@click.option(
    "--first-tokens",
    type=click.IntRange(0),
    metavar="COUNT",
    show_default=f"{FIRST_TOKENS}; 0 if the samples have no more or all begin with the same one",
    help="Also run this many tokens of the samples, each as a text of its own (rounded up to whole "
    "samples, at most all). The refit of heads and channels gives them a tenth of the others' "
    "weight; masks of single weights ignore them. For texts that begin with no fixed token such as "
    "BOS: to a model a text's first token is unlike the others, and each sample has only one. "
    "0: none, as in the published methods.",
)
@click.option(
    "--labels",
    type=click.Choice(["model", "text"]),
    default="model",
    show_default=True,
    help="Which token the loss of --gradients expects next. model: one drawn from the model's own "
    "distribution, for score --allocation loss. text: the text's, for score --method taylor; then "
    "sums over each unit's weights are kept instead of sums over outputs.",
)
@click.option(
    "--stream-dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Precision of the residual streams that --gradients keeps on disk.",
)
@click.option(
    "--stats",
    type=click.Choice(["structural", "token", "all", "residual"]),
    default="structural",
    show_default=True,
    help="structural: sums over the inputs of o_proj and down_proj. token: also "
    "their full token-weighted Gram matrices. all: also the inputs of q, k, v and of gate, up, and "
    "the squares of the gradients at the outputs of all seven matrices. residual: also the "
    "residual stream before each norm, for score --basis layer. score --target hidden needs all "
    "or residual, as do most methods for single weights other than those of o and down.",
)
@click.option(
    "--attention-samples",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    metavar="A",
    help="Keep the attention inputs of the first A sequences (to learn masks) and the last A (to "
    "validate them), for score --target qk.",
)
@click.option(
    "--attention-length",
    type=click.IntRange(2),
    metavar="N",
    show_default="512, or all",
    help="Keep the first N tokens of each such sequence.",
)
@click.option(
    "--stats-dtype",
    type=click.Choice(["float32", "float64"]),
    default="float32",
    show_default=True,
    help="Precision of the stored stats; sums are float64.",
)
@click.option(
    "--guidance",
    type=click.Choice(["both", "class"]),
    show_default="both",
    help="For models of pictures. both: use each picture twice in a row, with its class and with "
    "the null class, as classifier-free guidance does; each counts as a sample. class: once.",
)
@options.device_options
@click.option(
    "--batch-size",
    "batch",
    type=click.IntRange(1),
    metavar="SEQUENCES",
    show_default="about 2048 tokens for each device",
    help="Sequences at a time: more are faster "
    "but take more memory. Stats differ by rounding (about 1e-6).",
)
@click.option(
    "--coordinator",
    metavar="HOST:PORT",
    help="Share the sequences with other processes that run "
    "this command: the address of process 0, which writes. auto: this and the next two from "
    "SLURM, Open MPI or Kubernetes.",
)
@click.option("--processes", type=click.IntRange(1), help="Number of processes.")
@click.option("--process-id", type=click.IntRange(0), help="Number of this process, from 0.")
@options.profile_opt
@options.revision_opt
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    callback=options.named,
    metavar="DIR",
    show_default="MODEL's name.prunetool, here",
    help="Work directory of this run; rerun the same command to resume there.",
)
@options.overwrite_opt("the work directory of another calibration")
@options.output_opt
def calibrate(
    model: str,
    text: "Text",
    samples: int,
    shuffle: int | None,
    held_out: int | None,
    gradients: int | None,
    first_tokens: int | None,
    labels: str,
    stream_dtype: str,
    stats: str,
    attention_samples: int,
    attention_length: int | None,
    stats_dtype: str,
    guidance: str | None,
    dtype: str,
    batch: int | None,
    device: str,
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    profile: Path | None,
    revision: str | None,
    work: Path | None,
    overwrite: bool,
    sink: str,
) -> None:
    """Run text through MODEL and keep statistics of each pruned matrix's inputs.

    MODEL is a directory of safetensors or a Hub id. Layer by layer, keeps the Gram matrix, mean
    and token-weighted second moments of the inputs of o_proj and down_proj; then, from the last
    layer to the first, the Gram matrices of the loss's gradients at their outputs, or sums over the
    loss's slopes of every unit's weights (--labels text). If killed, the same command resumes after
    the last finished layer.

    \b
    Example:
      prunetool calibrate SmolLM2-135M --text wiki.txt --samples 32 > stats.jsonl
    """
    asked = held_out, gradients
    held_out, gradients = split(samples, *asked)
    attention = attention_samples, attention_length
    _check(text, text.length, samples, held_out, gradients, *attention, coordinator)
    if labels == "text" and not gradients:
        raise click.UsageError("--labels text goes with --gradients, which is 0")
    if {processes is None, process_id is None} != {coordinator in (None, "auto")}:
        raise click.UsageError("--coordinator HOST:PORT, --processes and --process-id go together")
    options.keep_inputs([sink, profile], [model, *text.files])

    from prunetool import devices, streaming
    from prunetool.model import open_model
    from prunetool.profiling import Profile
    from prunetool.steps.backward import Precision
    from prunetool.steps.calibrate import AttentionSamples, Calibration, draw_first_tokens

    with console.summary("calibrate") as said:
        team = devices.start(device, coordinator, processes, process_id)
        work = (work or Path(f"{Path(model).resolve().name}.prunetool")).absolute()
        opened = open_model(model, revision)
        if opened.config.shortcuts:
            raise ConfigError(
                model,
                "has a basis of the stream before each norm, and is not pruned again",
                "prune the model that it was made from",
            )
        dtype = opened.product_dtype(dtype)
        if guidance and not opened.config.classes:
            raise click.UsageError("--guidance is for models of pictures")
        if first_tokens and opened.config.classes:
            raise click.UsageError("--first-tokens is for models of text: a picture's is its class")
        guidance = guidance or "both"
        if opened.config.classes:
            if guidance == "both":
                _check_pairs(samples, asked[0], attention_samples)
                held_out, gradients = split(samples, held_out + held_out % 2, asked[1])
            _check(text, opened.config.codes, samples, held_out, gradients, *attention, coordinator)
        if not held_out:
            console.log.warning(
                "no sample is held out: compensate will have no tokens to choose its damping with, "
                "and needs --damping NUMBER"
            )
        tokens, chosen = _read(
            opened, text, samples, shuffle, guidance, dtype, work, said, overwrite
        )
        length = tokens.shape[1]
        if first_tokens is None:
            alike = opened.config.classes or (tokens[:, 0] == tokens[0, 0]).all()
            first_tokens = 0 if alike else usual_first_tokens(tokens.size)
        kept = min(length, attention_length or ATTENTION_LENGTH) if attention_samples else 0
        job = Calibration(
            opened, tokens, held_out, stats, Precision(dtype, stats_dtype, stream_dtype), work,
            AttentionSamples(attention_samples, kept), draw_first_tokens(tokens, first_tokens),
            batch or streaming.batch_size(length) * devices.local_mesh().size, gradients, team,
            Profile(profile), chosen, labels, overwrite,
        )  # fmt: skip
        job.write(model, partial(options.open_sink, sink))
        said += [
            console.counted(opened.layers, "layer"),
            f"{tokens.size:,} tokens",
            *([f"{job.first.size:,} first tokens"] if job.first.size else []),
            f"work in {work}",
        ]


def split(
    samples: int, held_out: int | None = None, gradients: int | None = None
) -> tuple[int, int]:
    """How many samples are held out, and how many of the others run backward."""
    if held_out is None:
        held_out = max(samples // 8, min(samples - 1, 1))
    return held_out, min(GRADIENTS, samples - held_out) if gradients is None else gradients


def usual_first_tokens(tokens: int) -> int:
    """The default of --first-tokens for samples of this many tokens, not all beginning alike."""
    return FIRST_TOKENS if tokens > FIRST_TOKENS else 0


def _read(
    model: "Model", text: "Text", samples: int, shuffle: int | None, guidance: str, dtype: str,
    work: Path, said: list[str], overwrite: bool,
) -> tuple["np.ndarray", dict[str, Any]]:  # fmt: skip
    """The sequences, (samples, N), and how they were chosen, for the history."""
    from prunetool.steps.run import as_fed, read_text
    from prunetool.steps.selftext import own_text

    if text.by_model:
        return own_text(model, text, samples, dtype, shuffle or 0, work, said, overwrite=overwrite)
    of_pictures = {"guidance": guidance} if model.config.classes else {}
    each = 2 if of_pictures and guidance == "both" else 1
    tokens, bos = read_text(model, text, samples // each, shuffle)
    tokens = as_fed(model, tokens, guidance)
    return tokens, {"shuffle": shuffle, "bos": bos, **of_pictures, **text.said}


def _check_pairs(samples: int, held_out: int | None, attention_samples: int) -> None:
    """Refuse to hold out one of a picture's two samples."""
    counts = {
        "--samples": samples,
        "--held-out": held_out or 0,
        "--attention-samples": attention_samples,
    }
    for option, count in counts.items():
        if count % 2:
            raise click.BadParameter(
                f"{option} {count}: --guidance both uses each picture twice; give an even number"
            )


def _check(
    text: "Text", length: int, samples: int, held_out: int, gradients: int, attention_samples: int,
    attention_length: int | None, coordinator: str | None,
) -> None:  # fmt: skip
    """Refuse options that contradict each other."""
    if text.by_model and coordinator is not None:
        raise click.UsageError(
            "--text self is for a single process; several can take the ids that it keeps in its "
            "work directory, by --tokens"
        )
    if held_out >= samples:
        raise click.BadParameter(f"--held-out {held_out} of --samples {samples} leaves none to fit")
    if gradients > samples - held_out:
        raise click.BadParameter(
            f"--gradients {gradients}: only {samples - held_out} samples are not held out"
        )
    if 2 * attention_samples > samples:
        raise click.BadParameter(
            f"--attention-samples {attention_samples} and as many held out need --samples "
            f"{2 * attention_samples}"
        )
    if attention_length and not attention_samples:
        raise click.UsageError("--attention-length goes with --attention-samples")
    if attention_length and attention_length > length:
        raise click.BadParameter(
            f"--attention-length {attention_length} exceeds --sequence-length {length}"
        )
