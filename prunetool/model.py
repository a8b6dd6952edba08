"""A checkpoint opened as a model: checked by its headers, read one layer at a time."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from prunetool.checkpoint import checksum
from prunetool.checkpoint.index import Index, read_index, read_json, tokenizer_path
from prunetool.checkpoint.reader import dtype_of, read_tensor, same_values
from prunetool.checkpoint.source import fetch_weights, locate
from prunetool.checkpoint.writer import write_json
from prunetool.errors import CheckpointError, shown
from prunetool.llama.config import LayerShape, LlamaConfig, parse_config
from prunetool.llama.parts import CLASS_EMBEDDING, EMBEDDING, FINAL_NORM, LM_HEAD
from prunetool.llama.weights import (
    Layer,
    layer_parameters,
    part_shapes,
    scatter,
    tensor_name,
    tensor_shapes,
)


@dataclass(frozen=True)
class Model:
    """A checkpoint whose tensors all match config.json.

    Attributes:
      checksums: checksum of every tensor read so far, by name; it must not change.
      recorded: file with the checksums that an earlier step read; it may still grow.
    """

    directory: Path
    config: LlamaConfig
    index: Index
    checksums: dict[str, str] = field(default_factory=dict, compare=False)
    recorded: Path | None = None

    def identity(self) -> dict[str, Any]:
        """What distinguishes this checkpoint from others: headers, config.json and tokenizer."""
        tokenizer = tokenizer_path(self.directory)
        return {
            "tensors": self.index.fingerprint(),
            "config": self.config.identity(),
            "tokenizer": checksum.of_file(tokenizer) if tokenizer.is_file() else None,
        }

    def read(self, name: str) -> np.ndarray:
        """Read a tensor in its stored dtype.

        Raises:
          CheckpointError: see `read_tensor`; or if it has changed since it was last read, by
            this run or an earlier one (`recall`).
        """
        array = read_tensor(self.index, name)
        found = checksum.of_array(array)
        if self.recorded is not None and name not in self.checksums:
            self.checksums.update(read_weights(self.recorded)["tensors"])
        if self.checksums.setdefault(name, found) != found:
            raise CheckpointError(
                self.index[name].shard,
                f"{shown(name)} has changed since the run began",
                "restore it, or start again with --overwrite or another --work",
            )
        return array

    def remember(self, path: Path) -> None:
        """Write the checksums of all tensors read to a file, for `recall`."""
        value = {"shards": self.index.stamps(), "tensors": dict(sorted(self.checksums.items()))}
        write_json(path, checksum.sealed(value))

    def recall(self, value: Mapping[str, Any]) -> None:
        """Accept the checksums that `remember` wrote; if a shard was touched, check them all.

        Raises:
          CheckpointError: if a tensor has changed.
        """
        self.checksums.update(value["tensors"])
        if value["shards"] != self.index.stamps():
            for name in value["tensors"].keys() & self.index.keys():
                self.read(name)

    @property
    def dtype(self) -> str:
        """NumPy's name of the layers' dtype (from the first matrix; all are stored alike)."""
        return dtype_of(self.index[tensor_name(0, "q")])

    def product_dtype(self, asked: str) -> str:
        """Resolve ``--dtype`` against what the checkpoint stores."""
        auto = "bfloat16" if self.dtype == "bfloat16" else "float32"
        return auto if asked == "auto" else asked

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.config.layers

    def layer(self, number: int) -> Layer:
        """Read a decoder layer in its stored dtype."""
        parts = part_shapes(self.config, self.config.layer_shapes[number])
        return Layer(**{part: self.part(number, part) for part in parts})

    def part(self, number: int, part: str) -> np.ndarray:
        """Read one part (a field of `Layer`) of a decoder layer in its stored dtype."""
        return self.read(tensor_name(number, part))

    def part_if_any(self, number: int, part: str) -> np.ndarray | None:
        """Read one part; None if this model's layers have no such part, like most biases."""
        there = part in part_shapes(self.config, self.config.layer_shapes[number])
        return self.part(number, part) if there else None

    def padded_layer(self, number: int) -> Layer:
        """Read a layer, zero-padded to the widest one, so that one compilation serves all."""
        layer, shape = self.layer(number), self.config.layer_shapes[number]
        widest = self.config.widest
        if shape == widest or shape.group_size != widest.group_size:
            return layer
        return scatter(layer, shape, widest, np.arange(shape.kv_heads), np.arange(shape.channels))

    def padded_layers(
        self, start: int = 0, *, backwards: bool = False
    ) -> Iterator[tuple[int, Layer]]:
        """The layers, each read ahead while the previous one is in use.

        Args:
          start: yield those from this one on.
          backwards: yield those below it instead, the highest first.
        """
        numbers = range(start - 1, -1, -1) if backwards else range(start, self.layers)
        with ThreadPoolExecutor(1) as thread:
            ahead = [thread.submit(self.padded_layer, n) for n in numbers[:1]]
            for number, following in zip_longest(numbers, numbers[1:]):
                layer = ahead.pop().result()
                if following is not None:
                    ahead.append(thread.submit(self.padded_layer, following))
                yield number, layer

    def embedding(self) -> np.ndarray:
        """The token embedding, (V, D); of a model of pictures, the classes' below it."""
        table = self.read(EMBEDDING)
        return np.concatenate([table, self.read(CLASS_EMBEDDING)]) if self.config.classes else table

    def final_norm(self) -> np.ndarray:
        """The weight of the norm after the last layer, (D,)."""
        return self.read(FINAL_NORM)

    def head(self) -> np.ndarray:
        """lm_head, or the embedding if tied, (V, D)."""
        return self.read(EMBEDDING if self.config.tied else LM_HEAD)

    def layer_parameters(self, shape: LayerShape) -> int:
        """Parameters of the matrices of a layer of this shape."""
        return layer_parameters(self.config, shape)

    def parameters(self) -> int:
        """Number of all stored parameters."""
        return sum(int(np.prod(self.index[name].shape)) for name in self.index)


def read_weights(path: Path) -> dict[str, dict[str, Any]]:
    """Read what `Model.remember` wrote: stamps of shards, and checksums of tensors.

    Raises:
      CheckpointError: if it is missing or damaged.
    """
    try:
        value = checksum.read_sealed(path)
        if not all(isinstance(value.get(key), dict) for key in ("shards", "tensors")):
            raise CheckpointError(path, "lacks checksums of weights", "")
    except CheckpointError as error:
        raise CheckpointError(path, error.what, "run calibrate again") from error
    return value


def open_model(name: str, revision: str | None = None) -> Model:
    """Open a directory or Hub id, and check every tensor's name, shape and dtype by the headers.

    Raises:
      CheckpointError: if a tensor is missing, of another shape or unsupported dtype, or unknown to
        the architecture.
      ConfigError: if it is of another architecture (see `parse_config`).
    """
    directory = locate(name, revision)
    config_path = directory / "config.json"
    config = parse_config(read_json(config_path), config_path)
    fetch_weights(name, directory)  # only once it is clear that they are usable
    index = read_index(directory, unstored=[LM_HEAD] if config.tied else [])
    if config.tied and _has_own_head(index):
        config = replace(config, tied=False)
    expected = tensor_shapes(config)
    for tensor, shape in expected.items():
        if tensor not in index:
            raise CheckpointError(directory, f"no tensor {tensor}", "download the checkpoint again")
        info = index[tensor]
        if info.shape != shape:
            raise CheckpointError(
                info.shard,
                f"{tensor} is {info.shape}, but config.json requires {shape}",
                "take config.json and the shards from the same checkpoint",
            )
        dtype_of(info)
    for tensor in index:
        # A tied model may carry a copy of its head, and old checkpoints their rotary frequencies.
        harmless = tensor == LM_HEAD or tensor.endswith("rotary_emb.inv_freq")
        if tensor not in expected and not harmless:
            raise CheckpointError(
                index[tensor].shard,
                f"{shown(tensor)} has no place in this architecture",
                "config.json may lack a setting (biases?); download it again",
            )
    return Model(directory, config, index.of(expected))


def _has_own_head(index: Index) -> bool:
    """Whether a stored head differs from the embedding: then it is used, even if tied.

    As in transformers since version 5.
    """
    return (
        LM_HEAD in index
        and EMBEDDING in index
        and not same_values(index[LM_HEAD], index[EMBEDDING])
    )
