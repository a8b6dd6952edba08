"""Convert a file of another program, GGUF or LlamaGen's, to a checkpoint directory."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from prunetool import __version__, console, workdir
from prunetool.checkpoint.gguf import GGUFModel
from prunetool.checkpoint.gguf_tokenizer import build_tokenizer, tokenizer_config
from prunetool.checkpoint.llamagen import LlamaGenFile
from prunetool.checkpoint.shards import TensorSpec
from prunetool.checkpoint.writer import CheckpointWriter, json_bytes
from prunetool.llama import forms
from prunetool.llama.config import PICTURES, PRUNED, LlamaConfig, parse_config
from prunetool.llama.weights import tensor_chunks, tensor_shapes


class _Source(Protocol):
    """A file whose tensors can be had by a checkpoint's names."""

    parts: list[Path]

    def fingerprint(self) -> list[str]: ...

    def check(self, needed: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any]) -> None: ...

    def tensors(self, names: Iterable[str], dtype: np.dtype[Any]) -> dict[str, np.ndarray]: ...


def convert_gguf(
    path: Path, out: Path, dtype: str, *, max_shard_bytes: int, overwrite: bool
) -> list[str]:
    """Write the checkpoint of a GGUF file, its index last; resumes a killed run.

    Args:
      path: the GGUF file, or any part of a split one.
      out: the directory.
      dtype: dtype of the tensors, NumPy's name.
      max_shard_bytes: limit on the tensors of a file (`CheckpointWriter.write`).
      overwrite: replace an existing checkpoint.

    Returns:
      What to report about it.

    Raises:
      ConfigError: if the file cannot be converted exactly.
      WorkError: if disk space is short, or ``out`` is taken or being written.
    """
    model = GGUFModel(path)
    config = model.config(dtype)
    parsed = parse_config(config, model.path)
    if config["model_type"] == PRUNED:
        config = forms.config_json(parsed, PRUNED)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokenizer = json.loads(build_tokenizer(model).to_str())
    files = {
        "config.json": json_bytes(config),
        "generation_config.json": json_bytes({k: v for k, v in ids.items() if v is not None}),
        "tokenizer.json": (json.dumps(tokenizer, ensure_ascii=False) + "\n").encode(),
        "tokenizer_config.json": json_bytes(tokenizer_config(model)),
    }
    if config["model_type"] == PRUNED:
        files |= forms.loader_files(PRUNED)
    return _write(model, parsed, files, out, dtype, max_shard_bytes, overwrite=overwrite)


def convert_llamagen(
    path: Path,
    out: Path,
    dtype: str | None,
    *,
    image_size: int | None,
    heads: int | None,
    max_shard_bytes: int,
    overwrite: bool,
) -> list[str]:
    """Write the checkpoint of a LlamaGen file; as `convert_gguf`.

    Args:
      path: the file, of a class-conditional model.
      out: the directory.
      dtype: dtype of the tensors; None: as stored.
      image_size, heads: as in `LlamaGenFile`.
      max_shard_bytes, overwrite: as in `convert_gguf`.
    """
    model = LlamaGenFile(path, image_size, heads)
    parsed = parse_config(model.config(), path)
    files = {"config.json": json_bytes(forms.config_json(parsed, PICTURES))}
    files |= forms.loader_files(PICTURES)
    said = _write(
        model, parsed, files, out, dtype or model.dtype, max_shard_bytes, overwrite=overwrite
    )
    return [*model.said, *said]


def _write(
    model: _Source, config: LlamaConfig, files: Mapping[str, bytes], out: Path, dtype: str,
    max_shard_bytes: int, *, overwrite: bool,
) -> list[str]:  # fmt: skip
    """Write a checkpoint from another program's file; returns what to report about it."""
    target = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    chunks = [
        {name: TensorSpec(dtype, shape) for name, shape in chunk.items()}
        for chunk in tensor_chunks(config)
    ]

    run = workdir.digest([model.fingerprint(), dtype, __version__, max_shard_bytes])
    with workdir.lock(out.absolute()):
        writer = CheckpointWriter(
            out, overwrite=overwrite, run=run, files=list(files), inputs=model.parts
        )
        if writer.state == "whole":
            return [f"{out} already has it (delete it to write it again)"]
        model.check(tensor_shapes(config), target)
        written = writer.write(
            chunks, lambda number: model.tensors(chunks[number], target), max_shard_bytes
        )
        for _ in console.progress(written, len(chunks), what="part"):
            pass
        for name, data in files.items():
            writer.put(name, data)
        writer.close()
    return [f"{writer.parameters:,} parameters", f"{writer.size_bytes / 1e6:,.1f} MB in {out}"]
