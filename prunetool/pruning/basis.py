"""Orthogonal bases of the residual stream, cut to their first k directions.

RMSNorm commutes with an orthogonal Q: with its weights w folded into the matrices that read it, a
model is the same in the basis Q. SliceGPT (arXiv 2401.15024) takes a Q for every signal, the input
of each norm, and so needs a matrix between any two; with one Q for all of them QᵀQ = I is left and
the result is a stock model of hidden size k. Q has the eigenvectors, largest first, of

    H = Σ_signals E[u uᵀ],   u = h / ‖h‖ = x / (w √D),   x = w ∘ h / rms(h),

so that E[u uᵀ] = diag(1/w) E[x xᵀ] diag(1/w) / D from the statistics of the inputs x (ε neglected).
Its RMSNorm has k entries for D:

    h / √(Σ h²/D + ε) = √(D/k) · h / √(Σ h²/k + ε D/k).

SliceGPT's own form (``--basis layer``) has a Q for every signal, from E[h hᵀ] of the tokens as they
are, so that those of large norm count more, and Q_bᵀ Q_a, the shortcut, from a signal a to the next
b. The signal before the final norm is not cut (Q = I): the last layer's output has D entries.

| symbol | is | shape |
|---|---|---|
| h, u | residual stream, and scaled to norm 1 | (D,) |
| Q | basis | (D, k) |
"""

import numpy as np
from scipy.linalg import eigh

from prunetool.errors import ConfigError, NumericalError
from prunetool.pruning import gram


def of_unit_norm(packed: np.ndarray, norm: np.ndarray, tokens: int) -> np.ndarray:
    """E[u uᵀ] of a signal, (D, D), float64.

    Args:
      packed: Σ x xᵀ, as from `gram.pack`.
      norm: w, (D,).
      tokens: number of tokens in the sum.

    Raises:
      NumericalError: if a norm's weight is zero: what it hides is unknown.
    """
    if not norm.all():
        raise NumericalError(
            "a norm's weight", "is 0: the stream before it is unknown", "prune other targets"
        )
    inverse = 1 / norm.astype(np.float64)
    return gram.unpack(packed) * np.outer(inverse, inverse) / (tokens * len(norm))


def principal(H: np.ndarray, k: int) -> np.ndarray:
    """Q: the k eigenvectors of the largest eigenvalues of H, largest first, (D, k), float64.

    The sign of each is such that its largest entry is positive.

    Raises:
      NumericalError: if H has NaN or infinity.
    """
    if not np.isfinite(H).all():
        raise NumericalError(
            f"the {len(H)} x {len(H)} Gram matrix of the residual stream",
            "contains NaN or infinity", "calibrate in another --dtype",
        )  # fmt: skip
    vectors = eigh(H, subset_by_index=(len(H) - k, len(H) - 1))[1][:, ::-1]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(k)]
    return np.asarray(vectors * np.sign(largest))


def kept_size(size: int, sparsity: float, multiple_of: int) -> int:
    """The multiple nearest to (1 − sparsity) · ``size``, or ``size`` itself if that is as near.

    Raises:
      ConfigError: if it is 0.
    """
    ideal = (1 - sparsity) * size
    k = round(ideal / multiple_of) * multiple_of
    k = size if abs(size - ideal) <= abs(k - ideal) else k
    if not 0 < k <= size:
        raise ConfigError(
            "--sparsity", f"{sparsity:g} leaves none of {size} hidden dimensions",
            "lower it, or --multiple-of",
        )  # fmt: skip
    return k
