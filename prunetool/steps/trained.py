"""Weights that are trained, with Adam's moments, in files of a step's directory.

A file has one part of one layer after some number of updates: w, and once it was updated m and v,
float32, then their checksum. Files are never changed: an update writes new ones, and those before
go when the layer has all of its new ones. So a killed run has every layer after some number of
updates, and the page cache keeps the files in memory where there is memory.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from prunetool.checkpoint.writer import atomic
from prunetool.llama import forward
from prunetool.streaming import SUM_BYTES, read_into

DECAY, SQUARES_DECAY, EPSILON = 0.9, 0.95, 1e-8  # β₁, β₂ and ε of Adam
NAME = re.compile(r"state-(\d{5})\.(\w+)\.(\d+)")


class Trained:
    """The weights of all layers.

    Args:
      directory: where the files are.
      shapes: for each layer, the shape of every part.
      trained: which parts are updated.
    """

    def __init__(
        self, directory: Path, shapes: Sequence[dict[str, tuple[int, ...]]], trained: set[str]
    ) -> None:
        self.shapes = shapes
        self._directory = directory
        self._trained = trained

    def trained(self, layer: int) -> list[str]:
        """The parts of a layer that are updated."""
        return [part for part in self.shapes[layer] if part in self._trained]

    def start(self, layer: int, weights: dict[str, np.ndarray]) -> None:
        """Write the weights before the first update."""
        for part, array in weights.items():
            self._write(layer, part, 0, [array])

    def updates(self, layer: int) -> int | None:
        """How many updates a layer has had; None if files are missing or damaged."""
        counts = [self._counts(layer, part) for part in self.trained(layer)]
        fixed = [part for part in self.shapes[layer] if part not in self._trained]
        common = set.intersection(*counts) if counts else {0}
        if not common or not all(0 in self._counts(layer, part) for part in fixed):
            return None
        return max(common)

    def keep_only(self, layer: int, count: int) -> None:
        """Delete the files of a layer's trained parts after any other number of updates."""
        for part in self.trained(layer):
            for path in self._directory.glob(f"state-{layer:05d}.{part}.*"):
                if path != self._path(layer, part, count):
                    path.unlink()

    def forget(self) -> None:
        """Delete all files."""
        for path in self._directory.glob("state-*"):
            if NAME.fullmatch(path.name):
                path.unlink()

    def weights(self, layer: int, count: int) -> dict[str, np.ndarray]:
        """All parts of a layer after ``count`` updates, float32."""
        return {part: self._read(layer, part, count)[0] for part in self.shapes[layer]}

    def update(self, layer: int, part: str, count: int, gradient: "Gradient", rate: float) -> None:
        """Make update number ``count`` of a part (Adam, arXiv 1412.6980).

        Args:
          layer, part: which.
          count: from 0.
          gradient: of the loss.
          rate: learning rate.
        """
        w, *moments = self._read(layer, part, count, moments=True)
        m, v = moments or (np.zeros_like(w), np.zeros_like(w))
        scale = [1 - beta ** (count + 1) for beta in (DECAY, SQUARES_DECAY)]
        numbers = [jnp.float32(number) for number in (rate, *scale)]
        made = _adam(*map(jnp.asarray, (w, m, v)), gradient, *numbers)
        self._write(layer, part, count + 1, [np.asarray(array) for array in made])

    def _path(self, layer: int, part: str, count: int) -> Path:
        return self._directory / f"state-{layer:05d}.{part}.{count if part in self._trained else 0}"

    def _counts(self, layer: int, part: str) -> set[int]:
        """After how many updates a part is there, intact."""
        counts = set()
        for path in self._directory.glob(f"state-{layer:05d}.{part}.*"):
            name = NAME.fullmatch(path.name)
            data = path.read_bytes() if name else b""
            if (
                name
                and xxhash.xxh3_128(memoryview(data)[:-SUM_BYTES]).digest() == data[-SUM_BYTES:]
            ):
                counts.add(int(name[3]))
        return counts

    def _read(
        self, layer: int, part: str, count: int, *, moments: bool = False
    ) -> list[np.ndarray]:
        """w, and with ``moments`` m and v if the part has any yet."""
        path, shape = self._path(layer, part, count), self.shapes[layer][part]
        found: list[np.ndarray] = []
        size = 4 * int(np.prod(shape))
        with path.open("rb", buffering=0) as file:
            for _ in range((path.stat().st_size - SUM_BYTES) // size if moments else 1):
                found.append(np.empty(shape, np.float32))
                read_into(found[-1], file, path)
        return found

    def _write(self, layer: int, part: str, count: int, arrays: Sequence[np.ndarray]) -> None:
        total = xxhash.xxh3_128()
        path = self._path(layer, part, count)
        with atomic(path, durable=False) as partial, partial.open("wb") as file:
            for array in arrays:
                data = np.ascontiguousarray(array, np.float32).view(np.uint8).reshape(-1).data
                total.update(data)
                file.write(data)
            file.write(total.digest())


class Gradient(NamedTuple):
    """The gradient of a part: of a matrix, Σ_t g_t x_tᵀ of its outputs and inputs.

    Attributes:
      outputs: g, (O, B, N), float32; or the gradient itself, if there are no inputs.
      inputs: x, (I, B, N), in the dtype of the products.
    """

    outputs: jax.Array
    inputs: jax.Array | None = None


@jax.jit
def _adam(
    w: jax.Array,
    m: jax.Array,
    v: jax.Array,
    gradient: Gradient,
    rate: jax.Array,
    m_scale: jax.Array,
    v_scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    g, x = gradient
    if x is not None:
        g, x = g.reshape(len(g), -1), x.reshape(len(x), -1)
        # A weight of zero was removed, or pads the matrix: it stays.
        g = jnp.where(w != 0, forward.dot(g.astype(x.dtype), x, (1, 1)), jnp.float32(0))
    m = DECAY * m + (1 - DECAY) * g
    v = SQUARES_DECAY * v + (1 - SQUARES_DECAY) * jnp.square(g)
    step = rate * (m / m_scale) / (jnp.sqrt(v / v_scale) + EPSILON)
    return w - step, m, v
