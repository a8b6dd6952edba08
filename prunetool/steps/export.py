"""Write the pruned checkpoint from the records of all layers."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  makes NumPy know bfloat16
import numpy as np

from prunetool import console, overlap, records, workdir
from prunetool.card import model_card
from prunetool.checkpoint import checksum
from prunetool.checkpoint.gguf import parts_of
from prunetool.checkpoint.index import read_json
from prunetool.checkpoint.reader import dtype_of
from prunetool.checkpoint.shards import TensorSpec
from prunetool.checkpoint.writer import (
    LICENSE_FILES,
    TOKENIZER_FILES,
    UNFINISHED,
    CheckpointWriter,
    is_empty,
    json_bytes,
    remove_checkpoint,
    sketches_of,
    step_of,
    templates,
)
from prunetool.errors import RecordError, WorkError, shown
from prunetool.formats import FORMATS
from prunetool.kept import bases_of, cut_config, kept_shape, kept_units, pruned_layer, pruned_norm
from prunetool.llama import forms
from prunetool.llama.config import PRUNED, LlamaConfig
from prunetool.llama.parts import EMBEDDING, FINAL_NORM, LM_HEAD, MATRICES, PARTS, UNIT_MATRICES
from prunetool.llama.weights import (
    in_basis,
    part_shapes,
    rotated,
    scatter,
    tensor_chunks,
    tensor_name,
)
from prunetool.methods import CHANNELS, GROUPS, load
from prunetool.model import Model, open_model
from prunetool.steps.run import reopen

# Copied unchanged; resaving a tokenizer writes classes that older readers refuse.
COMPANIONS = ("generation_config.json", *TOKENIZER_FILES, *LICENSE_FILES)
# In a companion file, these name code of its repository that a program would run.
CODE_KEYS = ("auto_map", "custom_generate")
LARGE_FILES = ("tokenizer.json", "vocab.json")  # only vocabulary
TOKENIZER_CONFIG = "tokenizer_config.json"
READS_TOKENIZER_JSON = "PreTrainedTokenizerFast"  # unchanged; in every version of transformers


class Export:
    """One export: checks the directory and the companion files before anything is written.

    Args:
      header: the stream's header, with this step in its history.
      out: the directory.
      form: what to write, of `formats.FORMATS`.
      max_shard_bytes: limit on the tensors of a file (`CheckpointWriter.write`).
      overwrite: replace an existing checkpoint.
      inputs: files that are read and must stay.

    Raises:
      WorkError: if ``out`` is taken (`CheckpointWriter`), or the work directory is not the
        stream's own.
      CheckpointError: if the checkpoint has changed, or a companion cannot be read.
    """

    def __init__(
        self,
        header: records.Header,
        out: Path,
        *,
        form: str,
        max_shard_bytes: int,
        overwrite: bool,
        inputs: Sequence[Path] = (),
    ) -> None:
        self.header, self.out, self.format = header, out, FORMATS[form]
        self.max_shard_bytes, self.overwrite = max_shard_bytes, overwrite
        self.model, self.work = reopen(header), Path(header.work)
        if out.exists() and out.resolve() == self.model.directory:
            raise WorkError(out, "is the model itself", "name another directory")
        if self.format.suffix:
            refuse_taken_file(out, overwrite=overwrite)
        self.place = self.format.directory(out)
        self.companions = companions(self.model.directory)
        along = {name: checksum.of_bytes(data) for name, data in self.companions.items()}
        config = dict(self.model.config.raw)
        if self.format.dense and header.cuts_hidden:
            raise RecordError(
                f"--format {form}", "keeps the sizes of the model, and --target hidden cuts one",
                "give another --format",
            )  # fmt: skip
        run = workdir.digest([header.fingerprint, header.history, config, along, max_shard_bytes])
        made = replace(header, history=header.history[:-1])
        read = {tensor.shard for tensor in self.model.index.values()}
        read |= {self.model.directory / name for name in ("config.json", *self.companions)}
        self.writer = CheckpointWriter(
            self.place, overwrite=overwrite, run=run, work=header.work,
            step=workdir.step_directory(made),
            files=sorted({
                "config.json", TOKENIZER_CONFIG, *self.companions, *forms.LOADER_FILES, "README.md"
            }),
            inputs=[*inputs, *sorted(read)],
        )  # fmt: skip

    def write(self, made: Sequence[records.LayerRecord]) -> list[str]:
        """Write what the format is, of a complete stream.

        Returns:
          What to report about it.
        """
        said = self._write_checkpoint(made)
        if self.format.finish:
            said = load(self.format.finish)(
                open_model(str(self.place)), self.out, name=self.out.stem,
                max_shard_bytes=self.max_shard_bytes, overwrite=self.overwrite,
            )  # fmt: skip
            remove_checkpoint(self.place)
        return said

    def _write_checkpoint(self, made: Sequence[records.LayerRecord]) -> list[str]:
        """Write the checkpoint, its index last; returns what to report about it."""
        writer = self.writer
        if writer.state == "whole":
            return [f"{self.out} already has it (delete it to write it again)"]
        model, dense = self.model, self.format.dense
        kept = [
            kept_units(self.work, record, shape)
            for record, shape in zip(made, model.config.layer_shapes, strict=True)
        ]
        shapes = tuple(
            kept_shape(shape, units)
            for shape, units in zip(model.config.layer_shapes, kept, strict=True)
        )
        target = model.config.with_shapes(model.config.layer_shapes if dense else shapes)
        if self.header.adds_biases:
            target = target.with_biases()
        target = cut_config(target, made)
        stored = target.with_shapes(
            tuple(
                replace(kept, output=shape.output)
                for kept, shape in zip(shapes, target.layer_shapes, strict=True)
            )
        )
        if self.format.check:
            load(self.format.check)(model, target)
        kind = forms.choose_form(target)
        target = forms.normalised(target)
        chunks = [
            {
                name: TensorSpec(dtype_of(model.index[stored_name(model, name)]), shape)
                for name, shape in chunk.items()
            }
            for chunk in tensor_chunks(target)
        ]

        def make(number: int) -> dict[str, np.ndarray]:
            n = number - 1  # the embedding comes first
            if n not in range(model.layers):
                return {name: self._end(name, made) for name in chunks[number]}
            if dense:
                places = [np.flatnonzero(kept[n][unit]) for unit in (GROUPS, CHANNELS)]
            else:
                places = [np.arange(shapes[n].kv_heads), np.arange(shapes[n].channels)]
            layer = pruned_layer(model, self.work, made[n], biased=self.header.adds_biases)
            layer = scatter(layer, shapes[n], target.layer_shapes[n], *places)
            if "basis" in made[n].files:
                bases = bases_of(self.work, made, n)
                layer = rotated(layer, bases, shortcuts=target.shortcuts)
            return {
                tensor_name(n, part): array
                for part, array in layer._asdict().items()
                if array is not None
            }

        sketches = _sketches(model.directory, self.work, made)
        masked = any(name.startswith("mask.") for record in made for name in record.files)
        densities = []
        written = writer.write(chunks, make, self.max_shard_bytes)
        for n, tensors in enumerate(console.progress(written, len(chunks), what="part"), -1):
            if masked and n in range(model.layers):
                sizes = part_shapes(model.config, shapes[n])
                densities.append(_densities(tensors, n, sizes))

        self._put_files(target, kind)
        recovered = any("recover" in record.files for record in made)
        card = model_card(
            self.header, model, kind, stored, writer.parameters, densities,
            zeros=dense, recovered=recovered,
        )  # fmt: skip
        writer.put("README.md", card.encode())
        writer.close(sketches)
        return self._said(kind, densities)

    def _end(self, name: str, made: Sequence[records.LayerRecord]) -> np.ndarray:
        """The embedding, the final norm's weight or the head, in its basis if there is one."""
        Q = None
        if "basis" in made[0].files:
            bases = bases_of(self.work, made, 0 if name == EMBEDDING else self.model.layers - 1)
            Q = bases.attention if name == EMBEDDING else bases.behind
        if name == FINAL_NORM:
            norm = pruned_norm(self.model, self.work, made)
            return norm if Q is None else np.ones(Q.shape[1], norm.dtype)
        stored = self.model.read(stored_name(self.model, name))
        if Q is None:
            return stored
        reads = None if name == EMBEDDING else pruned_norm(self.model, self.work, made)
        return in_basis(stored, Q, reads)

    def _said(self, kind: str, densities: Sequence[dict[str, tuple[int, int]]]) -> list[str]:
        """What to say of the checkpoint, with its `_densities` if weights were masked."""
        now, before = self.writer.parameters, self.model.parameters()
        change = f"{abs(1 - now / before):.2%} {'fewer' if now <= before else 'more'}"
        said = [f"{kind}, {now:,} of {before:,} parameters ({change})"]
        if densities:
            filled, size = np.sum([list(layer.values()) for layer in densities], axis=(0, 1))
            said.append(f"{filled:,} of {size:,} layer weights nonzero ({filled / size:.2%})")
        return [*said, f"{self.writer.size_bytes / 1e6:,.1f} MB in {self.out}"]

    def _put_files(self, target: LlamaConfig, kind: str) -> None:
        """Write config.json, what goes along with the model, and loader files if it needs them."""
        self.writer.put("config.json", json_bytes(forms.config_json(target, kind)))
        along: Mapping[str, bytes] = self.companions
        if kind == PRUNED:
            along = with_tokenizer_class(along, self.model.config.raw)
        for name, data in forms.loader_files(kind).items():
            self.writer.put(name, data)
        for name, data in along.items():
            self.writer.put(name, data)


def stored_name(model: Model, name: str) -> str:
    """The tensor of the checkpoint that has the dtype, or all, of one of the result.

    Of a tied head it is the embedding, of an added bias its matrix, of a shortcut the one beside.
    """
    for matrix in UNIT_MATRICES:
        name = name.replace(PARTS[f"{matrix}_shortcut"].name, PARTS[matrix].name)
    if name == LM_HEAD and model.config.tied:
        return EMBEDDING
    return name if name in model.index else f"{name.removesuffix('bias')}weight"


def refuse_taken_file(out: Path, *, overwrite: bool) -> None:
    """Refuse to replace what is at the place of a file.

    Raises:
      WorkError: if something is there, and is a directory or not to be overwritten.
    """
    if out.is_dir():
        raise WorkError(out, "is a directory", "name a file")
    if (there := parts_of(out)) and not overwrite:
        raise WorkError(there[0], "exists", "name another file or give --overwrite")


def refuse_taken(out: Path, asked: Mapping[str, Any]) -> None:
    """Refuse, before a run, a directory that this would find taken at its end.

    What an earlier run wrote or began may be the same run's, which goes on there.

    Args:
      out: the directory.
      asked: sparsity and allocation of the run, and whether it will recover.

    Raises:
      WorkError: if it is no checkpoint of this tool, or one that was made in another way.
    """
    if not out.exists() or (out.is_dir() and is_empty(out)):
        return
    taken = "name another directory or give --overwrite"
    if not out.is_dir():
        raise WorkError(out, "is a file", "name a directory")
    if not (step_of(out) or (out / UNFINISHED).exists()):
        raise WorkError(out, "is not empty", taken)
    made: list[Mapping[str, Any]] = [asked]  # if it is not known, export will tell
    with suppress(WorkError, RecordError, OSError, KeyError):
        with workdir.records_of(out).open(encoding="utf-8") as stream:
            header, _ = records.read(stream)
        made = [
            {name: step["options"][name] for name in ("sparsity", "allocation")}
            | {"recover": header.had("recover")}
            for step in header.history[1:]
            if step["command"] == "score"
        ]
    if made != [asked]:
        how = [
            " ".join(f"--{name} {value}" for name, value in each.items() if name != "recover")
            + " and recover" * each["recover"]
            for each in made
        ]
        raise WorkError(out, f"was made with {', '.join(how) or 'nothing pruned'}", taken)


def _sketches(model: Path, work: Path, made: Sequence[records.LayerRecord]) -> list[str]:
    """Sketches of the texts that were used, for MODEL too, so that evaluate knows them."""
    found = sketches_of(model)
    if (work / workdir.TOKENS_NAME).exists():  # an older version kept none
        found.append(overlap.sketch(workdir.TensorFile(work, workdir.TOKENS_NAME)["tokens"]))
    for kind in ("refit", "recover"):
        beside = (work / made[0].files.get(kind, kind)).with_name(workdir.PROGRESS_NAME)
        if kind in made[0].files and (kind == "recover" or beside.exists()):
            found.append(str(checksum.read_sealed(beside).get("sketch", "")))
    return found


def companions(directory: Path) -> dict[str, bytes]:
    """The companion data files of a checkpoint, by name, without references to code.

    Only regular files of the checkpoint, or links into its own Hub cache: other links could publish
    a private file.

    Raises:
      CheckpointError: if one of them is not what its name says.
    """
    found = {}
    if code := sorted({path.name for path in directory.glob("*.py")} - {*forms.LOADER_FILES}):
        console.log.warning("%s: code, which is not copied: %s", directory, shown(", ".join(code)))
    for name in (*COMPANIONS, *sorted(templates(directory))):
        path = directory / name
        if not path.exists():
            continue
        if not _belongs(path, directory):
            console.log.warning("%s: a link out of the checkpoint, or not a file; not copied", path)
            continue
        found[name] = path.read_bytes()
        if name.endswith(".json") and name not in LARGE_FILES:
            value = read_json(path)
            if code := [key for key in CODE_KEYS if key in value]:
                console.log.warning("%s: names code (%s), which is left out", path, ", ".join(code))
                found[name] = json_bytes({k: v for k, v in value.items() if k not in code})
    return found


def with_tokenizer_class(
    along: Mapping[str, bytes], config: Mapping[str, Any]
) -> Mapping[str, bytes]:
    """The companions for a model type that transformers does not know.

    For a known type it knows the tokenizer's class. Here version 4 finds none unless
    tokenizer_config.json names one, and asks whether to run the model's code.
    """
    said = json.loads(along.get(TOKENIZER_CONFIG, b"{}"))
    if "tokenizer.json" not in along or said.get("tokenizer_class"):
        return along
    name = config.get("tokenizer_class") or READS_TOKENIZER_JSON
    console.log.debug("%s: tokenizer_class set to %s; it named none", TOKENIZER_CONFIG, shown(name))
    return {**along, TOKENIZER_CONFIG: json_bytes({**said, "tokenizer_class": name})}


def _belongs(path: Path, directory: Path) -> bool:
    """Whether a file is the checkpoint's own: regular, or a Hub cache link to its blobs."""
    if not path.is_symlink():
        return path.is_file()
    blobs = directory.parent.parent / "blobs"  # of .../models--owner--name/snapshots/REVISION
    target = path.resolve()
    cached = directory.parent.name == "snapshots" and target.parent == blobs.resolve()
    return cached and not blobs.is_symlink() and target.is_file()


def _densities(
    tensors: Mapping[str, np.ndarray], layer: int, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, int]]:
    """Nonzero weights, and all weights of kept units, for each of the seven matrices."""
    return {
        part: (int(np.count_nonzero(tensors[tensor_name(layer, part)])), int(np.prod(shapes[part])))
        for part in MATRICES
    }
