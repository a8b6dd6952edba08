"""Tensor names of a Llama checkpoint <-> one decoder layer's arrays.

| symbol | is |
|---|---|
| D | hidden size |
| H, n_kv, d | query heads, KV heads, head size |
| I | MLP channels |
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from prunetool.llama.config import LayerShape, LlamaConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

Array = Any  # np.ndarray on the host, jax.Array on the device


class Layer(NamedTuple):
    """The weights of a decoder layer as the checkpoint stores them: a matrix is (out, in)."""

    input_norm: Array  # (D,)
    q: Array  # (H d, D)
    k: Array  # (n_kv d, D)
    v: Array  # (n_kv d, D)
    o: Array  # (D, H d)
    post_norm: Array  # (D,)
    gate: Array  # (I, D)
    up: Array  # (I, D)
    down: Array  # (D, I)
    q_bias: Array = None  # (H d,); a bias is None where the model has none
    k_bias: Array = None  # (n_kv d,)
    v_bias: Array = None  # (n_kv d,)
    o_bias: Array = None  # (D,)
    gate_bias: Array = None  # (I,)
    up_bias: Array = None  # (I,)
    down_bias: Array = None  # (D,)


NAMES = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")  # the seven that sparsity is counted over
ATTENTION_BIASES = ("q_bias", "k_bias", "v_bias", "o_bias")
MLP_BIASES = ("gate_bias", "up_bias", "down_bias")


def tensor_name(layer: int, part: str) -> str:
    """The checkpoint's name of ``part`` (a field of `Layer`) in layer ``layer``."""
    return f"model.layers.{layer}.{NAMES[part]}"


def part_shapes(config: LlamaConfig, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    """Shape of every part that a layer of this model has, in the order of `Layer`."""
    D, d, channels = config.hidden_size, config.head_dim, shape.channels
    q, kv = shape.heads * d, shape.kv_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "input_norm": (D,), "q": (q, D), "k": (kv, D), "v": (kv, D), "o": (D, q),
        "post_norm": (D,), "gate": (channels, D), "up": (channels, D), "down": (D, channels),
    }  # fmt: skip
    if config.attention_bias:
        shapes |= {"q_bias": (q,), "k_bias": (kv,), "v_bias": (kv,), "o_bias": (D,)}
    if config.mlp_bias:
        shapes |= {"gate_bias": (channels,), "up_bias": (channels,), "down_bias": (D,)}
    return shapes


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint, by name."""
    D, V = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, D)}
    for layer, shape in enumerate(config.layer_shapes):
        for part, extent in part_shapes(config, shape).items():
            shapes[tensor_name(layer, part)] = extent
    shapes[FINAL_NORM] = (D,)
    if not config.tied:
        shapes[HEAD] = (V, D)
    return shapes


def tensor_chunks(config: LlamaConfig) -> list[dict[str, tuple[int, ...]]]:
    """The same by what is made at a time: the embedding, each layer, the norm, the head."""
    shapes = tensor_shapes(config)
    chunks = groupby(shapes, lambda name: name.split(".")[:3])  # model.layers.0
    return [{name: shapes[name] for name in names} for _, names in chunks]


def map_layer(function: Callable[[Array], Array], layer: Layer) -> Layer:
    """Apply ``function`` to every part that is there."""
    return Layer(*(None if part is None else function(part) for part in layer))


def select(layer: Layer, shape: LayerShape, groups: np.ndarray, channels: np.ndarray) -> Layer:
    """Keep whole KV groups and MLP channels of a layer.

    Args:
      layer: host arrays of the layer.
      shape: its counts.
      groups: indices of the KV groups to keep, ascending.
      channels: indices of the MLP channels to keep, ascending.
    """
    heads = _spread(groups, shape.group_size)
    d = layer.q.shape[0] // shape.heads
    rows_q, rows_kv = _spread(heads, d), _spread(groups, d)

    def rows(array: Array, index: np.ndarray) -> Array:
        return None if array is None else array[index]

    return layer._replace(
        q=layer.q[rows_q], k=layer.k[rows_kv], v=layer.v[rows_kv], o=layer.o[:, rows_q],
        gate=layer.gate[channels], up=layer.up[channels], down=layer.down[:, channels],
        q_bias=rows(layer.q_bias, rows_q), k_bias=rows(layer.k_bias, rows_kv),
        v_bias=rows(layer.v_bias, rows_kv),
        gate_bias=rows(layer.gate_bias, channels), up_bias=rows(layer.up_bias, channels),
    )  # fmt: skip


def scatter(
    layer: Layer,
    shape: LayerShape,
    target: LayerShape,
    groups: np.ndarray,
    channels: np.ndarray,
) -> Layer:
    """Put a layer's KV groups and channels at the given places of a larger, otherwise zero layer.

    Exact: a head whose output rows are zero adds nothing, and neither does a zero channel.

    Args:
      layer: host arrays of the layer.
      shape: its counts.
      target: the counts of the result, of the same group size.
      groups: place of each KV group in the result.
      channels: place of each channel in the result.
    """
    if shape.group_size != target.group_size:
        raise ValueError(f"group sizes differ: {shape} and {target}")
    d = layer.q.shape[0] // shape.heads
    rows_q, rows_kv = _spread(_spread(groups, shape.group_size), d), _spread(groups, d)

    def rows(array: Array, index: np.ndarray, extent: int) -> Array:
        if array is None:
            return None
        out = np.zeros((extent, *array.shape[1:]), array.dtype)
        out[index] = array
        return out

    def columns(array: Array, index: np.ndarray, extent: int) -> Array:
        out = np.zeros((array.shape[0], extent), array.dtype)
        out[:, index] = array
        return out

    q, kv, wide = target.heads * d, target.kv_heads * d, target.channels
    return layer._replace(
        q=rows(layer.q, rows_q, q), k=rows(layer.k, rows_kv, kv), v=rows(layer.v, rows_kv, kv),
        o=columns(layer.o, rows_q, q),
        gate=rows(layer.gate, channels, wide), up=rows(layer.up, channels, wide),
        down=columns(layer.down, channels, wide),
        q_bias=rows(layer.q_bias, rows_q, q), k_bias=rows(layer.k_bias, rows_kv, kv),
        v_bias=rows(layer.v_bias, rows_kv, kv),
        gate_bias=rows(layer.gate_bias, channels, wide),
        up_bias=rows(layer.up_bias, channels, wide),
    )  # fmt: skip


def _spread(blocks: np.ndarray, size: int) -> np.ndarray:
    """Indices of the elements of contiguous blocks of ``size``."""
    return (np.asarray(blocks)[:, None] * size + np.arange(size)).ravel()
