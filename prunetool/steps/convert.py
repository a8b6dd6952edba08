"""A GGUF file made a checkpoint directory."""

import json
import math
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from prunetool import __version__, console, workdir
from prunetool.checkpoint.gguf import GGUFModel
from prunetool.checkpoint.gguf_tokenizer import build_tokenizer, tokenizer_config
from prunetool.checkpoint.writer import (
    CheckpointWriter,
    json_bytes,
)
from prunetool.llama.config import parse_config
from prunetool.llama.weights import part_shapes, tensor_name, tensor_shapes


def convert_gguf(path: Path, out: Path, dtype: str, *, overwrite: bool) -> list[str]:
    """Write the checkpoint of a GGUF file, its index last; killed, go on with it.

    Args:
      path: the GGUF file, or one part of a split one.
      out: the directory.
      dtype: of the tensors, NumPy's name.
      overwrite: replace a checkpoint that is there.

    Returns:
      What to say of it.

    Raises:
      ConfigError: if the file cannot be converted exactly.
      WorkError: if the disk is short, or ``out`` is taken or being written.
    """
    model = GGUFModel(path)
    config = model.config(dtype)
    parsed = parse_config(config, model.path)
    shapes = tensor_shapes(parsed)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokenizer = json.loads(build_tokenizer(model).to_str())
    files = {
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes({k: v for k, v in ids.items() if v is not None}),
        "tokenizer.json": (json.dumps(tokenizer, ensure_ascii=False) + "\n").encode(),
        "tokenizer_config.json": json_bytes(tokenizer_config(model)),
    }
    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    shards = [
        [tensor_name(layer, part) for part in part_shapes(parsed, shape)]
        for layer, shape in enumerate(parsed.layer_shapes)
    ]
    shards.append([name for name in shapes if not name.startswith("model.layers.")])

    run = workdir.digest([model.fingerprint(), dtype, __version__])
    with workdir.lock(out.absolute()):
        writer = CheckpointWriter(
            out, len(shards), overwrite=overwrite, run=run, files=list(files), inputs=model.parts
        )
        if writer.state == "whole":
            return [f"{out} holds it already (delete it to write it again)"]
        model.check(shapes, target)
        writer.need_room(sum(math.prod(shape) for shape in shapes.values()) * target.itemsize)
        for tensors in console.progress(shards, len(shards), what="shard"):
            writer.write(partial(model.tensors, tensors, target))
        for name, data in files.items():
            writer.put(name, data)
        writer.close()
    return [f"{writer.parameters:,} parameters", f"{writer.size_bytes / 1e6:,.1f} MB in {out}"]
