"""A checkpoint opened as a Llama model: checked from its headers, read one layer at a time."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prunetool.checkpoint.index import Index, read_index, read_json
from prunetool.checkpoint.reader import dtype_of, read_tensor
from prunetool.checkpoint.source import locate
from prunetool.errors import CheckpointError
from prunetool.llama.config import LayerShape, LlamaConfig, parse_config
from prunetool.llama.weights import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    MATRICES,
    Layer,
    part_shapes,
    scatter,
    tensor_name,
    tensor_shapes,
)


@dataclass(frozen=True)
class Model:
    """A Llama checkpoint whose tensors are all where and what config.json makes them."""

    directory: Path
    config: LlamaConfig
    index: Index

    @property
    def dtype(self) -> str:
        """Dtype of the layers' matrices (of the first; they are stored alike), NumPy's name."""
        return dtype_of(self.index[tensor_name(0, "q")])

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
        return read_tensor(self.index, tensor_name(number, part))

    def padded_layer(self, number: int) -> Layer:
        """Read a layer, zero-padded to the model's widest, so that one compilation serves all."""
        layer, shape = self.layer(number), self.config.layer_shapes[number]
        widest = self.config.widest
        if shape == widest or shape.group_size != widest.group_size:
            return layer
        return scatter(layer, shape, widest, np.arange(shape.kv_heads), np.arange(shape.channels))

    def padded_layers(self, start: int = 0) -> Iterator[tuple[int, Layer]]:
        """The layers from ``start`` on, each read while the one before is in use."""
        with ThreadPoolExecutor(1) as thread:
            numbers = range(start, self.layers)
            ahead = [thread.submit(self.padded_layer, n) for n in numbers[:1]]
            for number in numbers:
                layer = ahead.pop().result()
                if number + 1 < self.layers:
                    ahead.append(thread.submit(self.padded_layer, number + 1))
                yield number, layer

    def embedding(self) -> np.ndarray:
        """The token embedding, (V, D)."""
        return read_tensor(self.index, EMBEDDING)

    def final_norm(self) -> np.ndarray:
        """The weight of the norm behind the last layer, (D,)."""
        return read_tensor(self.index, FINAL_NORM)

    def head(self) -> np.ndarray:
        """lm_head, or the embedding where it is tied, (V, D)."""
        return read_tensor(self.index, EMBEDDING if self.config.tied else HEAD)

    def layer_parameters(self, shape: LayerShape) -> int:
        """Parameters of the seven matrices of a layer of this model with these counts."""
        shapes = part_shapes(self.config, shape)
        return sum(int(np.prod(shapes[matrix])) for matrix in MATRICES)

    def parameters(self) -> int:
        """All parameters stored."""
        return sum(int(np.prod(self.index[name].shape)) for name in self.index)


def open_model(name: str, revision: str | None = None) -> Model:
    """Open a directory or Hub id and check every tensor's name, shape and dtype from headers.

    Raises:
      CheckpointError: a tensor missing, of another shape, of a dtype not read, or one that the
        architecture has no place for.
      ConfigError: another architecture (see `parse_config`).
    """
    directory = locate(name, revision)
    config_path = directory / "config.json"
    config = parse_config(read_json(config_path), config_path)
    index = read_index(directory)
    expected = tensor_shapes(config)
    for tensor, shape in expected.items():
        if tensor not in index:
            raise CheckpointError(directory, f"no tensor {tensor}", "get the checkpoint again")
        info = index[tensor]
        if info.shape != shape:
            raise CheckpointError(
                info.shard,
                f"{tensor} is {info.shape}, and config.json makes it {shape}",
                "get config.json and the shards from one place",
            )
        dtype_of(info)
    for tensor in index:
        # A tied model may carry a copy of its head, and old checkpoints their rotary frequencies.
        harmless = tensor == HEAD or tensor.endswith("rotary_emb.inv_freq")
        if tensor not in expected and not harmless:
            raise CheckpointError(
                index[tensor].shard,
                f"{tensor} has no place in this architecture",
                "config.json may lack a setting (biases?); get it again",
            )
    return Model(directory, config, index)


def reopen(directory: str, fingerprint: str) -> Model:
    """Open the checkpoint that an earlier step worked on.

    Raises:
      CheckpointError: where it is no longer the same.
    """
    model = open_model(directory)
    if model.index.fingerprint() != fingerprint:
        raise CheckpointError(
            directory, "is not the checkpoint that was calibrated", "calibrate again"
        )
    return model
