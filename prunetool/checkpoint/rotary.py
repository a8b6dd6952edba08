"""Two orders of the rows of q and k, whose pairs the rotary embedding turns.

Hugging Face has the first elements of all pairs, then the second ones; GGUF's llama and LlamaGen
have the pairs side by side.
"""

import numpy as np


def half_split(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k, or their bias, whose rotary pairs become halves, as in Hugging Face."""
    pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def interleaved(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of q or k, or their bias, whose rotary halves become neighbours."""
    halves = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
