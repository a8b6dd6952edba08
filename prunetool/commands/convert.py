"""``prunetool convert``."""

import json
from pathlib import Path

import click
import numpy as np

from prunetool import console, options


@click.command()
@click.argument("gguf_path", metavar="GGUF", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16",
    show_default=True, help="Of the tensors written.",
)  # fmt: skip
@options.overwrite_opt
def convert(gguf_path: Path, out: Path, dtype: str, overwrite: bool) -> None:
    """Turn a llama GGUF file into a checkpoint directory.

    Dequantises, puts the rows of q and k back in order, and rebuilds config.json and
    tokenizer.json. One layer at a time.

    \b
    Example:
      prunetool convert SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2-135M
    """
    import ml_dtypes

    from prunetool.checkpoint.gguf import GGUFModel
    from prunetool.checkpoint.gguf_tokenizer import build_tokenizer, tokenizer_config
    from prunetool.checkpoint.writer import CheckpointWriter, need_room, write_json, write_text
    from prunetool.llama.config import parse_config
    from prunetool.llama.weights import tensor_shapes

    with console.summary("convert") as said:
        model = GGUFModel(gguf_path)
        config = model.config(dtype)
        shapes = tensor_shapes(parse_config(config, gguf_path))
        tokenizer = build_tokenizer(model)
        target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        need_room(out, sum(int(np.prod(shape)) for shape in shapes.values()) * target.itemsize)

        writer = CheckpointWriter(out, model.layers + 1, overwrite=overwrite)
        for shard in console.progress(model.shards(), "convert", model.layers + 1):
            writer.write({name: array.astype(target) for name, array in shard.items()})
        write_json(out / "config.json", config)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {key: number for key, number in ids.items() if number is not None}
        write_json(out / "generation_config.json", generation)
        document = json.loads(tokenizer.to_str())
        write_text(out / "tokenizer.json", json.dumps(document, ensure_ascii=False) + "\n")
        write_json(out / "tokenizer_config.json", tokenizer_config(model))
        writer.close()
        said += [f"{writer.parameters:,} parameters", f"{writer.size_bytes / 1e6:,.1f} MB in {out}"]
