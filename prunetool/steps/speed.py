"""Measure this machine's speed at the steps' work, for a second or two each."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import cho_factor

from prunetool.llama import forward

ROUNDS = 3
TOKENS = 1024
SYSTEM = 2048  # rows of the float64 system
DISK_BYTES = 1 << 27


class Speed(NamedTuple):
    """Operations and bytes per second, the best of several rounds."""

    products: float  # W x in the dtype of the forward, summed in float32
    solves: float  # float64 products and Cholesky factors
    disk: float  # written and flushed


def measure(shape: tuple[int, int], dtype: str, directory: Path) -> Speed:
    """Measure this machine.

    Args:
      shape: shape of the matrix in the products, (out, in).
      dtype: dtype of the products.
      directory: where to write.
    """
    out, size = shape
    W = jnp.ones(shape, jnp.dtype(dtype))
    x = jnp.ones((size, TOKENS), jnp.dtype(dtype))
    product = jax.jit(forward.product)
    products = 2 * out * size * TOKENS / _best(lambda: product(W, x).block_until_ready())

    A = np.random.default_rng(0).standard_normal((SYSTEM, SYSTEM))
    G = A @ A.T + SYSTEM * np.eye(SYSTEM)
    arithmetic = 2 * SYSTEM**3 + SYSTEM**3 / 3
    solves = arithmetic / _best(lambda: (A @ A.T, cho_factor(G, check_finite=False)))

    data = os.urandom(DISK_BYTES)

    def write() -> None:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return Speed(products, solves, DISK_BYTES / _best(write))


def _best(work: Callable[[], object]) -> float:
    """Seconds of the best round; the first one is a warm-up."""
    seconds = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
