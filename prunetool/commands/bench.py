"""``prunetool bench``."""

import json
import sys
from pathlib import Path

import click

from prunetool import console, options


@click.command(cls=options.Command)
@click.argument(
    "models", metavar="MODEL…", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--prompt",
    default=128,
    show_default=True,
    type=click.IntRange(1, 1 << 20),
    help="Tokens of the prompt, drawn at random.",
)
@click.option(
    "--generate",
    default=32,
    show_default=True,
    type=click.IntRange(1, 1 << 20),
    help="Tokens to generate after it, one by one.",
)
@click.option(
    "--repeats",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="How often to measure; the table has medians, and half the range as ±.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    show_default="one for each core",
    help="Threads of the program that is measured.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="Dtype in which transformers loads a checkpoint; auto: as stored. A GGUF has its own.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw speed by memory there, as SVG.",
)
def bench(
    models: tuple[Path, ...],
    prompt: int,
    generate: int,
    repeats: int,
    threads: int | None,
    dtype: str,
    plot: Path | None,
) -> None:
    """Measure load time, memory and speed of MODELs in the programs that run them.

    A directory is measured in transformers, a GGUF file in llama.cpp (pip install transformers
    torch, or cyllama), each in a process of its own. The others of a program are compared with its
    first one, so name the model before pruning first. The table goes to stderr, a JSON list to
    stdout. Code of a checkpoint runs only if it is prunetool's own loader.

    \b
    Example:
      prunetool bench SmolLM2-135M SmolLM2-pruned > speed.json
      prunetool bench dense.gguf pruned.gguf --plot speed.svg
    """
    options.keep_inputs([plot], list(models))
    from prunetool.checkpoint.writer import write_bytes
    from prunetool.steps import bench as step

    threads = threads or step.cores()
    how = {
        "prompt": prompt,
        "generate": generate,
        "repeats": repeats,
        "threads": threads,
        "dtype": dtype,
    }
    with console.summary("bench") as said:
        step.check(models)
        found = [step.measure(model, how) for model in console.progress(models, len(models))]
        console.table(*step.table(found))
        console.write(sys.stdout, json.dumps([each.as_json() for each in found]) + "\n")
        if plot:
            write_bytes(plot, step.plot(found).encode())
        said += [console.counted(len(found), "model"), console.counted(threads, "thread")]
