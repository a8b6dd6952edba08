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
from prunetool.llama.parts import (
    CLASS_EMBEDDING,
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    MATRICES,
    NORM_OF,
    PARTS,
    SHORTCUTS,
    UNIT_MATRICES,
)

ROWS = 4096  # that are in float64 at a time
Array = Any  # np.ndarray on the host, jax.Array on the device


class Layer(NamedTuple):
    """The parts of a decoder layer (`PARTS`); None if the model has no such part."""

    input_norm: Array
    q: Array
    k: Array
    v: Array
    o: Array
    post_norm: Array
    gate: Array
    up: Array
    down: Array
    q_bias: Array = None
    k_bias: Array = None
    v_bias: Array = None
    o_bias: Array = None
    gate_bias: Array = None
    up_bias: Array = None
    down_bias: Array = None
    q_norm: Array = None
    k_norm: Array = None
    o_shortcut: Array = None
    down_shortcut: Array = None


def tensor_name(layer: int, part: str) -> str:
    """The checkpoint's name of ``part`` (a field of `Layer`) in layer ``layer``."""
    return f"model.layers.{layer}.{PARTS[part].name}"


def axis_sizes(config: LlamaConfig, shape: LayerShape) -> dict[str, int]:
    """Size of every axis of `PARTS`: D, before and behind; d, H d, n_kv d for KV groups, I."""
    heads, groups = shape.heads * config.head_dim, shape.kv_heads * config.head_dim
    return {
        "hidden": config.hidden_size,
        "output": shape.output or config.hidden_size,
        "head": config.head_dim,
        "heads": heads,
        "groups": groups,
        "channels": shape.channels,
    }


def part_shapes(config: LlamaConfig, shape: LayerShape) -> dict[str, tuple[int, ...]]:
    """Shape of every part that a layer of this model has, in the order of `Layer`."""
    sizes = axis_sizes(config, shape)
    return {
        part: tuple(sizes[axis] for axis in axes)
        for part, (_, axes, needs) in PARTS.items()
        if not needs or any(getattr(config, setting) for setting in needs)
    }


def input_sizes(config: LlamaConfig, shape: LayerShape) -> dict[str, int]:
    """Number of input features of each of `UNIT_MATRICES`."""
    shapes = part_shapes(config, shape)
    return {matrix: shapes[matrix][1] for matrix in UNIT_MATRICES}


def layer_parameters(config: LlamaConfig, shape: LayerShape) -> int:
    """Parameters of the seven matrices of a layer, and of its shortcuts."""
    shapes = part_shapes(config, shape)
    return sum(int(np.prod(shapes[p])) for p in (*MATRICES, *SHORTCUTS) if p in shapes)


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint, by name."""
    D, V = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (V, D)}
    for layer, shape in enumerate(config.layer_shapes):
        for part, extent in part_shapes(config, shape).items():
            shapes[tensor_name(layer, part)] = extent
    D = config.size_before(config.layers)
    shapes[FINAL_NORM] = (D,)
    if config.classes:
        shapes[CLASS_EMBEDDING] = (config.classes, D)
    if not config.tied:
        shapes[LM_HEAD] = (V, D)
    return shapes


def tensor_chunks(config: LlamaConfig) -> list[dict[str, tuple[int, ...]]]:
    """The same, grouped as it is made: the embedding, each layer, the norm, what follows."""
    shapes = tensor_shapes(config)
    chunks = groupby(shapes, lambda name: name.split(".")[:3])  # model.layers.0
    return [{name: shapes[name] for name in names} for _, names in chunks]


def map_layer(function: Callable[[Array], Array], layer: Layer) -> Layer:
    """Apply ``function`` to every part that exists."""
    return Layer(*(None if part is None else function(part) for part in layer))


def with_biases(layer: Layer) -> Layer:
    """The layer with zeros for the biases of its matrices that it does not have."""
    parts = layer._asdict()
    zeros = {
        f"{matrix}_bias": np.zeros(len(parts[matrix]), parts[matrix].dtype)
        for matrix in MATRICES
        if parts[f"{matrix}_bias"] is None
    }
    return layer._replace(**zeros)


def unit_axes(
    groups: np.ndarray, channels: np.ndarray, shape: LayerShape, head_dim: int
) -> dict[str, np.ndarray]:
    """The elements of some units along every axis that units have.

    Args:
      groups: indices of KV groups, or a mask of them.
      channels: the same for MLP channels.
      shape: the layer's shape.
      head_dim: d.

    Returns:
      Indices or a mask, as given, by axis.
    """

    def spread(units: np.ndarray, size: int) -> np.ndarray:
        if units.dtype == bool:
            return np.repeat(units, size)
        return (units[:, None] * size + np.arange(size)).ravel()

    return {
        "heads": spread(groups, shape.group_size * head_dim),
        "groups": spread(groups, head_dim),
        "channels": channels,
    }


def select(layer: Layer, shape: LayerShape, groups: np.ndarray, channels: np.ndarray) -> Layer:
    """Select whole KV groups and MLP channels of a layer.

    Args:
      layer: host arrays of the layer.
      shape: its shape.
      groups: indices of the KV groups to keep, ascending.
      channels: indices of the MLP channels to keep, ascending.
    """
    kept = unit_axes(groups, channels, shape, layer.q.shape[0] // shape.heads)
    return _map_parts(lambda axes, array: array[_at(kept, axes)], layer)


def scatter(
    layer: Layer, shape: LayerShape, target: LayerShape, groups: np.ndarray, channels: np.ndarray
) -> Layer:
    """Put a layer's KV groups and channels in the given places of a larger, otherwise zero layer.

    Exact: a head whose output rows are zero adds nothing, and neither does a zero channel.

    Args:
      layer: host arrays of the layer.
      shape: its shape.
      target: the shape of the result, with the same group size.
      groups: place of each KV group in the result.
      channels: place of each channel in the result.
    """
    if shape.group_size != target.group_size:
        raise ValueError(f"group sizes differ: {shape} and {target}")
    d = layer.q.shape[0] // shape.heads
    places = unit_axes(groups, channels, shape, d)
    sizes = {"heads": target.heads * d, "groups": target.kv_heads * d, "channels": target.channels}

    def put(axes: tuple[str, ...], array: Array) -> Array:
        extents = [sizes.get(axis, size) for axis, size in zip(axes, array.shape, strict=True)]
        out = np.zeros(extents, array.dtype)
        out[_at(places, axes)] = array
        return out

    return _map_parts(put, layer)


class Bases(NamedTuple):
    """Bases of the residual stream around a layer, (D, k) each (`pruning.basis`).

    Attributes:
      attention, mlp: of the inputs of its norms.
      behind: of its output; None if that is not cut.
    """

    attention: np.ndarray
    mlp: np.ndarray
    behind: np.ndarray | None


def rotated(layer: Layer, bases: Bases, *, shortcuts: bool) -> Layer:
    """A layer in other bases of the residual stream, its norms' weights 1.

    Args:
      layer: host arrays of the layer.
      bases: the bases.
      shortcuts: add the matrices from each to the next, which are not one.

    Returns:
      Its parts in the dtypes as given.
    """
    read = {"input_norm": bases.attention, "post_norm": bases.mlp}
    made = {"o": bases.mlp, "o_bias": bases.mlp, "down": bases.behind, "down_bias": bases.behind}
    parts = {part: array for part, array in layer._asdict().items() if array is not None}
    for part, array in parts.items():
        if part in NORM_OF:
            parts[part] = in_basis(array, read[NORM_OF[part]], getattr(layer, NORM_OF[part]))
        elif part in read:
            parts[part] = np.ones(read[part].shape[1], array.dtype)
        elif (Q := made.get(part)) is not None:
            parts[part] = (Q.T @ array.astype(np.float64)).astype(array.dtype)
    if shortcuts:
        parts["o_shortcut"] = _between(bases.attention, bases.mlp).astype(layer.o.dtype)
        parts["down_shortcut"] = _between(bases.mlp, bases.behind).astype(layer.down.dtype)
    return layer._replace(**parts)


def _between(Q: np.ndarray, behind: np.ndarray | None) -> np.ndarray:
    """The matrix from a basis to the next, (k', k), float64."""
    Q = Q.astype(np.float64)
    return Q if behind is None else behind.T.astype(np.float64) @ Q


def in_basis(W: np.ndarray, Q: np.ndarray, norm: np.ndarray | None = None) -> np.ndarray:
    """W in the basis Q of its inputs, (out, k), in W's dtype.

    Args:
      W: (out, D).
      Q: (D, k).
      norm: weights of the norm of D entries whose outputs W reads; they are folded in, with √(D/k)
        for a norm of k entries. None: W reads no norm.
    """
    D, k = Q.shape
    Q = Q.astype(np.float64)
    if norm is not None:
        Q = norm.astype(np.float64)[:, None] * Q * np.sqrt(D / k)
    out = np.empty((len(W), k), W.dtype)
    for start in range(0, len(W), ROWS):  # an embedding in float64 at once would be large
        out[start : start + ROWS] = W[start : start + ROWS].astype(np.float64) @ Q
    return out


def _at(units: dict[str, np.ndarray], axes: tuple[str, ...]) -> tuple[Any, ...]:
    """The index into an array with these axes, of which at most one has units."""
    return tuple(units.get(axis, slice(None)) for axis in axes)


def _map_parts(function: Callable[[tuple[str, ...], Array], Array], layer: Layer) -> Layer:
    """Apply ``function`` to the axes and the array of every part that exists."""
    return Layer(
        **{
            part: function(PARTS[part].axes, array)
            for part, array in layer._asdict().items()
            if array is not None
        }
    )
