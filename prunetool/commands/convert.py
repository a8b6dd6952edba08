"""``prunetool convert``."""

from pathlib import Path

import click

from prunetool import console, options


@click.command(cls=options.Command)
@click.argument("gguf_path", metavar="GGUF", type=click.Path(path_type=Path))
@options.out_arg
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Precision of the written tensors.",
)
@options.max_shard_size_opt
@options.overwrite_opt
def convert(gguf_path: Path, out: Path, dtype: str, max_shard_bytes: int, overwrite: bool) -> None:
    """Turn a GGUF file (Llama, Mistral, Qwen2, Qwen3) into a checkpoint.

    Dequantises, puts the rows of q and k back in order, and rebuilds config.json and
    tokenizer.json, one layer at a time. For a split model, name any part. If killed, the same
    command resumes after the last finished shard.

    \b
    Example:
      prunetool convert SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M
    """
    from prunetool.steps.convert import convert_gguf

    with console.summary("convert") as said:
        said += convert_gguf(
            gguf_path, out, dtype, max_shard_bytes=max_shard_bytes, overwrite=overwrite
        )
