"""A GGUF file made a checkpoint directory."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from prunetool import console
from prunetool.checkpoint.gguf import GGUFModel
from prunetool.checkpoint.gguf_tokenizer import build_tokenizer, tokenizer_config
from prunetool.checkpoint.writer import CheckpointWriter, need_room, write_json, write_text
from prunetool.llama.config import parse_config
from prunetool.llama.weights import tensor_shapes


def convert_gguf(path: Path, out: Path, dtype: str, *, overwrite: bool) -> list[str]:
    """Write the checkpoint of a GGUF file, its index last.

    Args:
      path: the GGUF file.
      out: the directory.
      dtype: of the tensors, NumPy's name.
      overwrite: replace a checkpoint that lies there.

    Returns:
      What to say of it.
    """
    model = GGUFModel(path)
    config = model.config(dtype)
    shapes = tensor_shapes(parse_config(config, path))
    tokenizer = build_tokenizer(model)
    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    need_room(out, sum(int(np.prod(shape)) for shape in shapes.values()) * target.itemsize)

    writer = CheckpointWriter(out, model.layers + 1, overwrite=overwrite)
    for shard in console.progress(model.shards(), "convert", model.layers + 1):
        writer.write(
            lambda shard=shard: {  # type: ignore[misc]
                name: array.astype(target) for name, array in shard.items()
            }
        )
    write_json(out / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {key: number for key, number in ids.items() if number is not None}
    write_json(out / "generation_config.json", generation)
    document = json.loads(tokenizer.to_str())
    write_text(out / "tokenizer.json", json.dumps(document, ensure_ascii=False) + "\n")
    write_json(out / "tokenizer_config.json", tokenizer_config(model))
    writer.close()
    return [f"{writer.parameters:,} parameters", f"{writer.size_bytes / 1e6:,.1f} MB in {out}"]
