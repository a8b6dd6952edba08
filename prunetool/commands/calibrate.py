"""``prunetool calibrate``."""

from pathlib import Path

import click

from prunetool import __version__, console, options, records
from prunetool.errors import ConfigError

ATTENTION_LENGTH = 512  # the cost of learning grows with its square


@click.command(cls=options.Command)
@options.model_arg
@options.text_opt
@options.text_field_opt
@options.tokens_opt
@click.option(
    "--samples", default=128, show_default=True, type=click.IntRange(1), help="Sequences to use."
)
@options.length_opt
@options.bos_opt
@click.option(
    "--shuffle", type=click.IntRange(0), metavar="SEED",
    help="Draw windows at random positions of all the text, and so tokenise all of it, instead of "
    "consecutive ones from the start.",
)  # fmt: skip
@click.option(
    "--held-out", type=click.IntRange(0), show_default="an eighth of --samples, at least 1 of 2",
    help="Of the samples, how many (the last) only choose the damping of the refit.",
)  # fmt: skip
@click.option(
    "--stats", type=click.Choice(["structural", "token", "all"]), default="structural",
    show_default=True, help="structural: of the inputs of o_proj and down_proj. token: also their "
    "full token-weighted Gram matrices. all: also the inputs of q, k, v and of gate, up.",
)  # fmt: skip
@click.option(
    "--attention-samples", default=0, show_default=True, type=click.IntRange(0), metavar="A",
    help="Keep what each attention was given, of the first A sequences to learn from and of the "
    "last A to check on: for score --target qk.",
)  # fmt: skip
@click.option(
    "--attention-length", type=click.IntRange(2), metavar="N", show_default="512, or all",
    help="Of each such sequence, the first N tokens.",
)  # fmt: skip
@click.option(
    "--stats-dtype", type=click.Choice(["float32", "float64"]), default="float32",
    show_default=True, help="Of the stats as they are stored; they are summed in float64.",
)  # fmt: skip
@options.dtype_opt
@click.option(
    "--batch-size", "batch", type=click.IntRange(1), metavar="SEQUENCES",
    show_default="about 2048 tokens for each device", help="Sequences at a time: more are faster "
    "and take more memory. Stats differ by rounding (about 1e-6).",
)  # fmt: skip
@options.device_opt
@click.option(
    "--coordinator", metavar="HOST:PORT", help="Share the sequences with other processes that run "
    "this command: the address of process 0, which writes. auto: from SLURM, Open MPI or "
    "Kubernetes, the next two as well.",
)  # fmt: skip
@click.option("--processes", type=click.IntRange(1), help="How many there are.")
@click.option("--process-id", type=click.IntRange(0), help="Which of them this one is.")
@options.profile_opt
@options.revision_opt
@click.option(
    "--work", type=click.Path(path_type=Path), callback=options.named, metavar="DIR",
    show_default="NAME.prunetool",
    help="Work directory of this run; the same command goes on there where it was.",
)  # fmt: skip
@options.overwrite_opt
@options.output_opt
def calibrate(
    model: str,
    texts: tuple[Path, ...],
    text_field: str,
    tokens_path: Path | None,
    samples: int,
    length: int,
    bos: str,
    shuffle: int | None,
    held_out: int | None,
    stats: str,
    attention_samples: int,
    attention_length: int | None,
    stats_dtype: str,
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
    """Run text through MODEL and keep what each pruned matrix was given.

    MODEL is a directory of safetensors or a Hub id. Of the inputs of o_proj and down_proj it
    keeps, layer by layer: Gram matrix, mean, and token-weighted second moments. Killed, the same
    command goes on after the last whole layer.

    \b
    Example:
      prunetool calibrate SmolLM2-135M --text wiki.txt --samples 32 > stats.jsonl
    """
    if bool(texts) == bool(tokens_path):
        raise click.UsageError("give either --text or --tokens")
    if held_out is None:
        held_out = max(samples // 8, min(samples - 1, 1))
    if held_out >= samples:
        raise click.BadParameter(f"{held_out} of {samples} samples leave none to fit")
    if 2 * attention_samples > samples:
        raise click.BadParameter(
            f"--attention-samples {attention_samples} and as many held out need --samples "
            f"{2 * attention_samples}"
        )
    if attention_length and attention_length > length:
        raise click.BadParameter(
            f"--attention-length {attention_length} is beyond --sequence-length {length}"
        )

    if {processes is None, process_id is None} != {coordinator in (None, "auto")}:
        raise click.UsageError("--coordinator HOST:PORT, --processes and --process-id go together")
    options.keep_inputs([sink, profile], [model, *texts, tokens_path])

    from prunetool import corpus, devices, plan, streaming, tokenizer, workdir
    from prunetool.checkpoint import checksum
    from prunetool.checkpoint.writer import need_room
    from prunetool.model import open_model
    from prunetool.profiling import Profile
    from prunetool.steps.calibrate import AttentionSamples, Calibration, Precision

    kept = min(length, attention_length or ATTENTION_LENGTH) if attention_samples else 0
    attention = AttentionSamples(attention_samples, kept)

    if not held_out:
        console.log.warning(
            "no sample is held out: compensate will have no tokens to choose its damping on, and "
            "needs --damping NUMBER"
        )
    with console.summary("calibrate") as said:
        team = devices.start(device, coordinator, processes, process_id)
        opened = open_model(model, revision)
        bos_id = tokenizer.bos_id(opened.directory, opened.config.vocab_size, bos, tokens_path)
        console.doing("reading text")
        tokens = corpus.load(
            opened.directory, opened.config.vocab_size, texts, text_field, tokens_path,
            samples=samples, length=length, shuffle=shuffle, bos=bos_id,
        )  # fmt: skip
        console.doing("checking")
        work = (work or Path(f"{Path(model).resolve().name}.prunetool")).absolute()
        precision = Precision(options.product_dtype(dtype, opened.dtype), stats_dtype)
        how = {
            "samples": samples, "sequence_length": length, "shuffle": shuffle, "bos": bos_id,
            "held_out": held_out, "stats": stats, "attention": list(attention),
            **precision._asdict(),
        }  # fmt: skip
        known = opened.identity()
        run = workdir.identity("calibrate", known, corpus.fingerprint(tokens), __version__, how)
        header = records.Header(
            str(opened.directory), model, checksum.of_json(known), str(work), opened.layers
        ).after(options.history_step("calibrate", __version__, **how, tokens=run["tokens"]))
        need = plan.stats_bytes(opened, stats, attention, stats_dtype)
        need += plan.hidden_bytes(opened, *tokens.shape)
        profiled = Profile(profile)
        job = Calibration(
            opened, tokens, held_out, stats, precision, work, attention,
            batch or streaming.batch_size(length) * devices.local_mesh().size, team, profiled,
            overwrite,
        )  # fmt: skip
        if not team.same(int(workdir.digest(run), 16)):
            raise ConfigError(
                "--coordinator", "the processes run different things",
                "give all the same checkpoint, text and options",
            )  # fmt: skip
        # Process 0 holds the lock that a process alone would.
        locked = work.with_name(f"{work.name}{team.suffix if team.index else ''}")
        with workdir.lock(locked), profiled.trace():
            for index in range(team.count):  # process 0 first: others may share its directory
                if index == team.index:
                    workdir.claim(work, run, overwrite=overwrite)
                team.wait(f"claim of process {index}")
            if not job.whole:
                need_room(work, need - workdir.size_bytes(work, *workdir.CALIBRATED))
            layers = console.progress(job.layers(), opened.layers)
            if team.index == 0:
                copied = workdir.records_copy(work, workdir.STATS)
                with options.open_sink(sink) as stream, copied as copy:
                    records.write(stream, header, layers, copy)
            else:
                for _ in layers:
                    pass
            team.leave()
        said += [f"{opened.layers} layers", f"{tokens.size:,} tokens", f"work in {work}"]
