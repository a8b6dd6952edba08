"""Write a checkpoint as a GGUF file for llama.cpp."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from prunetool import console, workdir
from prunetool.chat import chat_templates
from prunetool.checkpoint import gguf_writer, rotary
from prunetool.checkpoint.gguf import INTERLEAVED, ROPE_FACTORS
from prunetool.checkpoint.gguf_vocabulary import Ends, vocabulary_fields
from prunetool.checkpoint.hub import hub_id
from prunetool.checkpoint.index import read_json, tokenizer_path
from prunetool.errors import ConfigError
from prunetool.llama import gguf_form
from prunetool.llama.config import LlamaConfig
from prunetool.llama.weights import tensor_chunks
from prunetool.model import Model
from prunetool.tokenizer import bos_id, load_tokenizer, named_token, template_ends

TURNED = ("q_proj", "k_proj")  # whose rows the rotary embedding pairs
QUANTIZATION_VERSION = 2  # of the layouts of the quantised types


def check(model: Model, config: LlamaConfig) -> None:
    """Refuse what llama.cpp does not compute, before anything is written.

    Args:
      model: the checkpoint whose tokenizer goes along.
      config: of the checkpoint to be written.

    Raises:
      ConfigError: see `convert_checkpoint`.
    """
    gguf_form.choose(config)
    _tokenizer_fields(model.directory, config, warns=False)


def convert_checkpoint(
    model: Model,
    out: Path,
    kind: str = "f16",
    *,
    max_shard_bytes: int,
    overwrite: bool,
    name: str = "",
) -> list[str]:
    """Write a checkpoint as GGUF, layer by layer.

    Args:
      model: the checkpoint, dense or pruned.
      out: the file; if split, the parts are named after it.
      kind: how matrices are stored, of `gguf_writer.KINDS`.
      max_shard_bytes: limit on the tensors of a file.
      overwrite: replace files that exist.
      name: of the model; that of its directory or of its repository by default.

    Returns:
      What to report about it.

    Raises:
      ConfigError: if llama.cpp does not compute this model, or not its tokenizer.
      WorkError: if a file exists, or the disk is too small.
    """
    config = model.config
    form = gguf_form.choose(config)
    if form.warning:
        console.log.warning("%s: %s", model.directory, form.warning)
    stored = gguf_writer.KINDS[kind]
    fields = {
        "general.name": _utf8(name or hub_id(model.directory) or model.directory.resolve().name),
        "general.file_type": int(stored.file_type),
        "general.quantization_version": QUANTIZATION_VERSION,
        **{f"{form.architecture}.{key}": value for key, value in form.fields.items()},
        **_tokenizer_fields(model.directory, config),
    }
    chunks = tensor_chunks(config)
    planned = [gguf_writer.plan_tensors(chunk, stored) for chunk in chunks]
    first = []
    if (factors := form.rope_factors) is not None:
        first.append(gguf_writer.Tensor(ROPE_FACTORS, factors.shape, gguf_writer.Type.F32))

    def arrays() -> Iterator[Mapping[str, np.ndarray]]:
        if factors is not None:
            yield {ROPE_FACTORS: factors}
        turned = form.architecture in INTERLEAVED
        for chunk in console.progress(planned, len(planned), what="part"):
            made = {}
            for name, tensor in chunk.items():
                array = model.read(name)
                if turned and name.rsplit(".", 2)[-2] in TURNED:
                    array = rotary.interleaved(array, config.head_dim)
                made[tensor.name] = array
            yield made

    tensors = [*first, *(tensor for chunk in planned for tensor in chunk.values())]
    with workdir.lock(out.absolute()):
        paths = gguf_writer.write_gguf(
            out, form.architecture, fields, tensors, arrays(),
            max_bytes=max_shard_bytes, overwrite=overwrite,
            needed=[tensor.shard for tensor in model.index.values()],
        )  # fmt: skip
    size = sum(path.stat().st_size for path in paths)
    where = str(out) if len(paths) == 1 else f"{len(paths)} parts, from {paths[0]}"
    return [f"{form.architecture}, {kind}", f"{size / 1e6:,.1f} MB in {where}"]


def _tokenizer_fields(
    directory: Path, config: LlamaConfig, *, warns: bool = True
) -> dict[str, Any]:
    """The header's fields of a checkpoint's tokenizer."""
    where = tokenizer_path(directory)
    if not where.exists():
        raise ConfigError(where, "no such file", "copy the tokenizer of the model it comes from")
    tokenizer = load_tokenizer(directory)
    path = directory / "tokenizer_config.json"
    said = read_json(path) if path.exists() else {}
    document, ends = json.loads(tokenizer.to_str()), _ends(tokenizer, said, config)
    before, _ = template_ends(tokenizer)
    if len(before) > 1:
        raise ConfigError(where, f"puts {len(before)} tokens before a text", "llama.cpp adds one")
    start = bos_id(directory, config.vocab_size, "auto")
    if start is not None:
        ends = ends._replace(bos=start, adds_bos=True)
    if warns and '"Metaspace"' in json.dumps(document.get("pre_tokenizer")):
        console.log.warning(
            "%s: llama.cpp also puts a space after special tokens, and before a text that begins "
            "with one",
            where,
        )
    templates = {_utf8(name): _utf8(text) for name, text in chat_templates(directory).items()}
    return vocabulary_fields(where, document, config.vocab_size, ends, templates)


def _utf8(text: str) -> str:
    """The text, without what UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _ends(tokenizer: Tokenizer, said: Mapping[str, Any], config: LlamaConfig) -> Ends:
    """The special tokens: those that tokenizer_config.json names, else config.json's."""
    last = template_ends(tokenizer)[1]

    def number(key: str) -> int | None:
        token = named_token(said, f"{key}_token")
        found = None if token is None else tokenizer.token_to_id(token)
        stated: Any = config.raw.get(f"{key}_token_id") if found is None else found
        stated = stated[0] if isinstance(stated, list) and stated else stated
        if not isinstance(stated, int) or isinstance(stated, bool):
            return None
        return stated if 0 <= stated < config.vocab_size else None

    eos = number("eos")
    adds_eos = eos is not None and last == [eos]
    return Ends(number("bos"), eos, number("unk"), number("pad"), adds_bos=False, adds_eos=adds_eos)
