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
    return min(itertools.combinations(range(D), remove), key=lambda p: K[np.ix_(p, p)].sum())


def refit(X, W, kept, damping):
    """argmin ‖X_k V − X W‖² + ridge ‖V − W_k‖², by least squares on stacked rows."""
    ridge = damping * np.mean(np.diagonal(X.T @ X))
    k = int(kept.sum())
    left = np.concatenate([X[:, kept], np.sqrt(ridge) * np.eye(k)])
    right = np.concatenate([X @ W, np.sqrt(ridge) * W[kept]])
    return np.linalg.lstsq(left, right, rcond=None)[0]


def weight_loss(W, A, g2, tokens, damping, i, j):
    """Nats a token that removing w_ij costs, by refitting the rest of its row explicitly."""
    A = A / tokens + damping * np.diagonal(A).mean() / tokens * np.eye(len(A))
    others = np.arange(len(A)) != j
    V = np.zeros(len(A))
    V[others] = np.linalg.solve(A[np.ix_(others, others)], A[others] @ W[i])
    return 0.5 * g2[i] * (W[i] - V) @ A @ (W[i] - V)


def sparsegpt(W, A, damping, sparsity, pattern, block, outputs=None):
    """SparseGPT by its idea: each column in turn is removed by OBS from those not yet frozen.

    The inverse of the Hessian of the columns left is made anew for every column; no factorisation
    is shared between columns, and the score is OBS's w²/[H⁻¹]_jj of that inverse,
    times its row's factor in ``outputs``; with these, 2:4 removes two weights at once.
    """
    W, D = W.copy(), W.shape[1]
    H = A + damping * np.diagonal(A).mean() * np.eye(D)
    kept = np.ones(W.shape, bool)
    size = 4 if pattern == "2:4" else block
    inverses = [np.linalg.inv(H[j:, j:]) for j in range(D)]
    for start in range(0, D, size):
        stop = min(start + size, D)
        scores = np.stack([W[:, j] ** 2 / inverses[j][0, 0] for j in range(start, stop)], axis=1)
        if outputs is not None:
            scores *= outputs[:, None]
        if pattern == "unstructured":
            lost = round(round(sparsity * W.size) * stop / D) - round(
                round(sparsity * W.size) * start / D
            )
            flat = np.argsort(scores.ravel(), kind="stable")[:lost]
            kept[:, start:stop][np.unravel_index(flat, scores.shape)] = False
        else:
            lost = round(round(sparsity * D) * stop / D) - round(round(sparsity * D) * start / D)
            for row in range(len(W)):
                order = np.argsort(scores[row], kind="stable")[: 2 if size == 4 else lost]
                kept[row, start + order] = False
        if pattern == "2:4" and outputs is not None:  # two at once
            kept[:, start:stop] = True
            for row, w in enumerate(W[:, start:]):
                losses = {}
                for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
                    left, losses[pair] = w.copy(), 0.0
                    for j in pair:
                        inverse = inverses[start + j]
                        losses[pair] += left[j] ** 2 / inverse[0, 0]
                        left[j:] -= left[j] * inverse[0] / inverse[0, 0]
                kept[row, np.add(start, min(losses, key=losses.get))] = False
        for j in range(start, stop):
            inverse = inverses[j]
            gone = ~kept[:, j]
            W[gone, j:] -= np.outer(W[gone, j], inverse[0] / inverse[0, 0])
    return kept, np.where(kept, W, 0.0)


def fused_attention(x, W, causal):
    """Rows of softmax(x W xᵀ), one sequence."""
    S = x @ W @ x.T
    P = np.zeros_like(S)
    for i, row in enumerate(S):
        stop = i + 1 if causal else len(S)
        P[i, :stop] = softmax(row[:stop])
    return P


def attention_loss(M, X, W, lam, causal):
    """[AM]'s loss, averaged over sequences and rows."""
    total = 0.0
    for x in X:
        error = fused_attention(x, M * W, causal) - fused_attention(x, W, causal)
        total += 0.5 * (error**2).sum() / len(x)
    return total / len(X) + 0.5 * lam * (M**2).sum()


def layer_attention(
    x, W_q, W_k, b_q, b_k, heads, kv_heads, inverse, norms=(), eps=0.0, window=None
):
    """P of every query head of one sequence, (heads, N, N)."""
    d = len(W_q) // heads
    q, k = x @ W_q.T + b_q, x @ W_k.T + b_k
    out = np.zeros((heads, len(x), len(x)))
    for head in range(heads):
        group = head // (heads // kv_heads)
        Q, K = q[:, head * d : (head + 1) * d], k[:, group * d : (group + 1) * d]
        if len(norms):
            Q, K = rms_norm(Q, norms[0], eps), rms_norm(K, norms[1], eps)
        Q, K = rope(Q, inverse), rope(K, inverse)
        for i in range(len(x)):
            first = 0 if window is None else max(0, i - window + 1)
            out[head, i, first : i + 1] = softmax(Q[i] @ K[first : i + 1].T / np.sqrt(d))
    return out
