"""``prunetool export``."""

import shlex
from pathlib import Path

import click

from prunetool import console, options, records
from prunetool.formats import FORMATS


@click.command(cls=options.Command)
@options.out_arg
@options.source_arg
@click.option(
    "--format",
    "form",
    type=click.Choice(list(FORMATS)),
    default=next(iter(FORMATS)),
    show_default=True,
    help=" ".join(f"{name}: {row.help}." for name, row in FORMATS.items()),
)
@options.max_shard_size_opt
@options.overwrite_opt("OUT")
def export(out: Path, source: str, form: str, max_shard_bytes: int, overwrite: bool) -> None:
    """Write the pruned checkpoint to the directory OUT, or a file for llama.cpp.

    Reads all records of score, compensate or recover before anything is written. The index is
    written last; without it OUT is not a checkpoint. If killed, the same command resumes after the
    last finished shard.

    \b
    Example:
      prunetool export SmolLM2-pruned refitted.jsonl
      prunetool export SmolLM2-pruned.gguf refitted.jsonl --format gguf
    """
    if wrong := FORMATS[form].wrong_name(out):
        raise click.UsageError(wrong)
    from prunetool import workdir
    from prunetool.steps.export import Export

    with console.summary("export") as said, options.open_source(source) as stream:
        header, layers = records.read(stream)
        header = header.after("export", format=form)
        inputs = [] if source == "-" else [Path(source)]
        with workdir.lock(FORMATS[form].directory(out).absolute()):
            job = Export(
                header,
                out,
                form=form,
                max_shard_bytes=max_shard_bytes,
                overwrite=overwrite,
                inputs=inputs,
            )
            said += job.write(list(layers))
    _say_next(out, Path(header.work), form)


def _say_next(out: Path, work: Path, form: str) -> None:
    """Suggest what to do next."""
    from prunetool import workdir
    from prunetool.checkpoint.gguf import parts_of
    from prunetool.checkpoint.index import read_json
    from prunetool.llama.config import PICTURES, PRUNED

    size = workdir.size_bytes(work, *workdir.EVERYTHING)
    name, clean = shlex.quote(str(out)), f"Delete {size / 1e6:,.1f} MB of work files"
    if FORMATS[form].suffix:
        first = shlex.quote(str(parts_of(out)[0]))
        console.log.info("Measure its speed: prunetool bench %s", first)
        console.log.info("%s: prunetool clean %s", clean, shlex.quote(str(work)))
        return
    config = read_json(out / "config.json")
    model_type = config["model_type"]
    trust = ", trust_remote_code=True" if model_type == PRUNED else ""
    load = f"AutoModelForCausalLM.from_pretrained({str(out)!r}{trust})"
    measure, pictures = f"prunetool evaluate {name} --text OTHER.txt", model_type == PICTURES
    to_gguf = not pictures and "sliced_from" not in config  # llama.cpp computes neither
    if pictures:
        load = f"see README.md in {name}"
        measure = f"prunetool evaluate {name} --tokens OTHER.npy --against MODEL"
    for what, how in {
        "Load it": load,
        "Measure it": measure,
        "See what was kept": f"prunetool report {name}",
        **({"Take it to llama.cpp": f"prunetool convert {name} {name}.gguf"} if to_gguf else {}),
        "Put it on the Hub": f"prunetool upload {name} OWNER/NAME",
        clean: f"prunetool clean {name}",
    }.items():
        console.log.info("%s: %s", what, how)
