"""How much of a text a model was calibrated on, from a small sketch of the calibration.

A shingle is `SHINGLE` consecutive tokens of one sequence, wherever the sequence begins. The sketch
is the smallest hashes of all shingles (a bottom-k sketch: Broder, *On the resemblance and
containment of documents*, 1997): a sample of them that any other text can be held against.
"""

import base64
from collections.abc import Iterable

import numpy as np

SHINGLE = 16  # tokens
KEPT = 256  # hashes of 32 bits
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, with bits as if drawn at random


def sketch(tokens: np.ndarray) -> str:
    """The sketch of sequences, in base64.

    Args:
      tokens: (samples, N), whole numbers; without a shingle if N is below `SHINGLE`.
    """
    return base64.b64encode(_hashes(tokens)[:KEPT].astype("<u4").tobytes()).decode()


def share(tokens: np.ndarray, sketches: Iterable[str]) -> float:
    """Estimate the fraction of the shingles in ``tokens`` that a sketched text has too.

    Args:
      tokens: (samples, N), whole numbers.
      sketches: of several texts; the largest fraction counts.

    Raises:
      ValueError: if a sketch is damaged.
    """
    hashes, largest = _hashes(tokens), 0.0
    for text in sketches:
        known = np.frombuffer(base64.b64decode(text, validate=True), "<u4")
        # Above the largest hash kept, nothing is known.
        comparable = hashes if len(known) < KEPT else hashes[hashes <= known[-1]]
        if len(comparable):
            largest = max(largest, float(np.isin(comparable, known).mean()))
    return largest


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """The different hashes of all shingles, ascending, uint32."""
    ids = tokens.astype(np.uint64)
    count = max(ids.shape[1] - SHINGLE + 1, 0)
    total = np.zeros((len(ids), count), np.uint64)
    for place in range(SHINGLE if count else 0):
        total = (total + ids[:, place : place + count] + np.uint64(1)) * FACTOR
        total ^= total >> np.uint64(29)
    return np.unique((total >> np.uint64(32)).astype(np.uint32))
