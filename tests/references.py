"""Every equation again, in plain float64 NumPy with loops: what the tests hold the package to."""

import itertools

import numpy as np


def rms_norm(h, weight, eps):  # (N, D)
    return h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + eps) * weight


def rope(x, inverse, scale=1.0):  # (N, d)
    angle = np.arange(len(x))[:, None] * np.concatenate([inverse, inverse])
    half = x.shape[1] // 2
    turned = np.concatenate([-x[:, half:], x[:, :half]], axis=1)
    return (x * np.cos(angle) + turned * np.sin(angle)) * scale


def softmax(row):
    e = np.exp(row - row.max())
    return e / e.sum()


def silu(x):
    return x / (1 + np.exp(-x))


def decoder_layer(h, w, heads, kv_heads, head_dim, inverse, eps):
    """One sequence, (N, D) -> (N, D), and the inputs of o_proj and down_proj."""
    w = {k: None if v is None else np.asarray(v, np.float64) for k, v in w.items()}

    def linear(x, name):
        out = x @ w[name].T
        return out if w.get(f"{name}_bias") is None else out + w[f"{name}_bias"]

    x = rms_norm(h, w["input_norm"], eps)
    q, k, v = linear(x, "q"), linear(x, "k"), linear(x, "v")
    a = np.zeros((len(h), heads * head_dim))
    for head in range(heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        group = head // (heads // kv_heads)
        shared = slice(group * head_dim, (group + 1) * head_dim)
        Q, K = rope(q[:, own], inverse), rope(k[:, shared], inverse)
        for i in range(len(h)):
            p = softmax(Q[i] @ K[: i + 1].T / np.sqrt(head_dim))
            a[i, own] = p @ v[: i + 1, shared]
    after = h + linear(a, "o")
    y = rms_norm(after, w["post_norm"], eps)
    z = silu(linear(y, "gate")) * linear(y, "up")
    return after + linear(z, "down"), a, z, after


def objective(K, y, s, lam):
    return 0.5 * y @ K @ y + 0.5 * lam * (s - y.sum()) ** 2


def best_blocks(K, remove):
    """The set of units whose joint removal costs least, by trying all."""
    D = len(K)
    return min(
        itertools.combinations(range(D), remove),
        key=lambda p: K[np.ix_(p, p)].sum(),
    )


def refit(X, W, kept, damping):
    """argmin ‖X_k V − X W‖² + ridge ‖V − W_k‖², by least squares on stacked rows."""
    ridge = damping * np.mean(np.diagonal(X.T @ X))
    k = int(kept.sum())
    left = np.concatenate([X[:, kept], np.sqrt(ridge) * np.eye(k)])
    right = np.concatenate([X @ W, np.sqrt(ridge) * W[kept]])
    return np.linalg.lstsq(left, right, rcond=None)[0]
