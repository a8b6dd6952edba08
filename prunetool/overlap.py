"""How much of a text a model was calibrated on, from a small sketch of the calibration.

A shingle is `SHINGLE` consecutive tokens of one sequence, wherever the sequence begins. The sketch
is the smallest hashes of all shingles (a bottom-k sketch: Broder, *On the resemblance and
containment of documents*, 1997): a sample of them that any other text can be held against.
"""

import base64
from collections.abc import Iterable

import numpy as np

SHINGLE = 16  # tokens
KEPT = 8192  # hashes of 32 bits
FEWEST = 6  # comparable hashes that tell that nothing is shared
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, with bits as if drawn at random


def sketch(tokens: np.ndarray) -> str:
    """The sketch of sequences, in base64.

    Args:
      tokens: (samples, N), whole numbers; without a shingle if N is below `SHINGLE`.
    """
    return base64.b64encode(_hashes(tokens)[:KEPT].astype("<u4").tobytes()).decode()


def share(tokens: np.ndarray, sketches: Iterable[str]) -> float | None:
    """Estimate the fraction of the shingles in ``tokens`` that a sketched text has too.

    Args:
      tokens: (samples, N), whole numbers.
      sketches: of several texts; the largest fraction counts.

    Returns:
      The fraction; None if none was found, but ``tokens`` are too few to tell.

    Raises:
      ValueError: if a sketch is damaged.
    """
    hashes, largest, fewest = _hashes(tokens), 0.0, len(tokens) * tokens.shape[1]
    for text in sketches:
        known = np.frombuffer(base64.b64decode(text, validate=True), "<u4")
        # Above the largest hash kept, nothing is known.
        comparable = hashes if len(known) < KEPT else hashes[hashes <= known[-1]]
        fewest = min(fewest, len(comparable) if len(known) else 0)
        if len(comparable):
            largest = max(largest, float(np.isin(comparable, known).mean()))
    return largest if largest or fewest >= FEWEST else None


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """The different hashes of all shingles, ascending, uint32."""
    found = [np.zeros(0, np.uint32)]
    count = max(tokens.shape[1] - SHINGLE + 1, 0)
    for row in tokens if count else ():  # one at a time, for memory
        ids, total = row.astype(np.uint64), np.zeros(count, np.uint64)
        for place in range(SHINGLE):
            total = (total + ids[place : place + count] + np.uint64(1)) * FACTOR
            total ^= total >> np.uint64(29)
        found.append((total >> np.uint64(32)).astype(np.uint32))
    return np.unique(np.concatenate(found))
