"""``prunetool convert``."""

from pathlib import Path

import click
from click.core import ParameterSource

from prunetool import console, options

SUFFIX = ".gguf"


@click.command(cls=options.Command)
@click.argument("source", metavar="SOURCE", type=click.Path(path_type=Path))
@options.out_arg
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Precision of the tensors of a checkpoint.",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]),
    default="f16",
    show_default=True,
    help="Type of the matrices of a GGUF; vectors are f32, and embedding and head of q4 and q5 "
    "are q8_0.",
)
@options.max_shard_size_opt
@options.overwrite_opt
def convert(
    source: Path, out: Path, dtype: str, kind: str, max_shard_bytes: int, overwrite: bool
) -> None:
    """Turn a GGUF file into a checkpoint, or a checkpoint into a GGUF file for llama.cpp.

    The direction follows from OUT: a file NAME.gguf, or a directory. From a GGUF (Llama, Mistral,
    Qwen2, Qwen3; for a split one, name any part): dequantises, puts the rows of q and k back in
    order, and rebuilds config.json and tokenizer.json; if killed, the same command resumes after
    the last finished shard. To a GGUF: from any checkpoint that prunetool reads or wrote, dense or
    pruned; layers of unequal sizes become llama.cpp's architecture deci. Above --max-shard-size it
    is split, between any two tensors. Files appear once all are complete. Either way one layer is
    in memory at a time.

    \b
    Example:
      prunetool convert SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M
      prunetool convert SmolLM2-pruned SmolLM2-pruned.gguf --type q8_0
    """
    to_gguf = out.suffix == SUFFIX
    unused, option, what = (
        ("dtype", "--dtype", "a GGUF") if to_gguf else ("kind", "--type", "a checkpoint")
    )
    given = click.get_current_context().get_parameter_source(unused)
    if given is ParameterSource.COMMANDLINE:
        raise click.UsageError(f"{option} is not for writing {what}")
    with console.summary("convert") as said:
        if to_gguf:
            from prunetool.model import open_model
            from prunetool.steps.gguf import convert_checkpoint

            said += convert_checkpoint(
                open_model(str(source)), out, kind,
                max_shard_bytes=max_shard_bytes, overwrite=overwrite,
            )  # fmt: skip
        else:
            from prunetool.steps.convert import convert_gguf

            said += convert_gguf(
                source, out, dtype, max_shard_bytes=max_shard_bytes, overwrite=overwrite
            )
