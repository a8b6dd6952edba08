"""``prunetool convert``."""

from pathlib import Path

import click

from prunetool import console, options

SUFFIX = ".gguf"
TORCH = (".pt", ".pth")


@click.command(cls=options.Command)
@click.argument("source", metavar="SOURCE", type=click.Path(path_type=Path))
@options.out_arg
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    show_default="bfloat16, or for LlamaGen as stored",
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
@click.option(
    "--image-size",
    type=click.IntRange(16, 16384),
    metavar="PIXELS",
    show_default="as the file's name says",
    help="For LlamaGen: pixels across a picture, which the file does not hold.",
)
@click.option(
    "--heads",
    type=click.IntRange(1),
    metavar="HEADS",
    show_default="those of LlamaGen's sizes",
    help="For LlamaGen: attention heads, which the file does not hold.",
)
@options.max_shard_size_opt
@options.overwrite_opt("OUT")
def convert(
    source: Path, out: Path, dtype: str | None, kind: str, image_size: int | None,
    heads: int | None, max_shard_bytes: int, overwrite: bool,
) -> None:  # fmt: skip
    """Turn a file of another program into a checkpoint, or a checkpoint into a GGUF file.

    The direction follows from OUT: a file NAME.gguf, or a directory. From a GGUF (Llama, Mistral,
    Qwen2, Qwen3; for a split one, name any part): dequantises, puts the rows of q and k back in
    order, and rebuilds config.json and tokenizer.json; if killed, the same command resumes after
    the last finished shard. To a GGUF: from a checkpoint that prunetool reads or wrote, dense or
    pruned; layers of unequal sizes become llama.cpp's architecture deci. Above --max-shard-size it
    is split, between any two tensors. From LlamaGen's weights (a file NAME.pt of a
    class-conditional model, which is read as data: no code in it runs): splits q, k and v. Files
    appear once all are complete. Either way one layer is in memory at a time.

    \b
    Example:
      prunetool convert SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M
      prunetool convert SmolLM2-pruned SmolLM2-pruned.gguf --type q8_0
      prunetool convert c2i_XXL_384.pt XXL
    """
    to_gguf, torch = out.suffix == SUFFIX, source.suffix.lower() in TORCH
    only_for = {"--dtype": "a checkpoint"} if to_gguf else {"--type": "a GGUF"}
    if to_gguf or not torch:
        only_for |= dict.fromkeys(("--image-size", "--heads"), "LlamaGen's .pt files")
    for parameter in click.get_current_context().command.params:
        given = options.given(parameter.name or "")
        if given and (option := parameter.opts[-1]) in only_for:
            raise click.UsageError(f"{option} is for {only_for[option]} only")
    with console.summary("convert") as said:
        if to_gguf:
            from prunetool.model import open_model
            from prunetool.steps.gguf import convert_checkpoint

            said += convert_checkpoint(
                open_model(str(source)), out, kind,
                max_shard_bytes=max_shard_bytes, overwrite=overwrite,
            )  # fmt: skip
        elif torch:
            from prunetool.steps.convert import convert_llamagen

            said += convert_llamagen(
                source, out, dtype, image_size=image_size, heads=heads,
                max_shard_bytes=max_shard_bytes, overwrite=overwrite,
            )  # fmt: skip
        else:
            from prunetool.steps.convert import convert_gguf

            said += convert_gguf(
                source, out, dtype or "bfloat16",
                max_shard_bytes=max_shard_bytes, overwrite=overwrite,
            )  # fmt: skip
