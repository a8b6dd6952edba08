"""LlamaGen, class-conditional, as its paper (arXiv 2406.06525) and its files have it.

Twice: the logits in float64 NumPy, and a PyTorch module with the names, the constructor and the
attributes that its own code has, which the loader file works on.
"""

import sys
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import nn
from torch.nn import functional


def table(grid, d, base=10000.0):
    """Cosines and sines, (1 + grid², d / 2): zeros, then each code's row and column."""
    c, s = np.zeros((1 + grid**2, d // 2)), np.zeros((1 + grid**2, d // 2))
    for p in range(grid**2):
        for m in range(d // 4):
            for pair, place in ((m, p // grid), (d // 4 + m, p % grid)):
                c[1 + p, pair] = np.cos(place * base ** (-4 * m / d))
                s[1 + p, pair] = np.sin(place * base ** (-4 * m / d))
    return c, s


def rms(x, weight, eps=1e-5):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def turn(x, c, s):
    """Neighbours 2 j and 2 j + 1 of each head, (N, heads, d)."""
    out = np.empty_like(x)
    a, b = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = a * c[:, None] - b * s[:, None]
    out[..., 1::2] = b * c[:, None] + a * s[:, None]
    return out


def logits(state, chosen, codes, grid, d):
    """Of one sequence, a class and n codes: (1 + n, V). ``state`` has LlamaGen's names."""
    w = {name: np.asarray(array, np.float64) for name, array in state.items()}
    rows = [w["cls_embedding.embedding_table.weight"][chosen]]
    h = np.array([*rows, *w["tok_embeddings.weight"][np.asarray(codes, int)]])
    N = len(h)
    c, s = (angles[:N] for angles in table(grid, d))
    layer = 0
    while f"layers.{layer}.attention.wqkv.weight" in w:
        own = f"layers.{layer}."
        x = rms(h, w[f"{own}attention_norm.weight"])
        q, k, v = np.split(x @ w[f"{own}attention.wqkv.weight"].T, 3, axis=1)
        q, k, v = (each.reshape(N, -1, d) for each in (q, k, v))
        q, k = turn(q, c, s), turn(k, c, s)
        a = np.zeros_like(v)
        for head in range(v.shape[1]):
            for i in range(N):
                scores = k[: i + 1, head] @ q[i, head] / np.sqrt(d)
                p = np.exp(scores - scores.max())
                a[i, head] = p @ v[: i + 1, head] / p.sum()
        h = h + a.reshape(N, -1) @ w[f"{own}attention.wo.weight"].T
        y = rms(h, w[f"{own}ffn_norm.weight"])
        gate = y @ w[f"{own}feed_forward.w1.weight"].T
        z = gate / (1 + np.exp(-gate)) * (y @ w[f"{own}feed_forward.w3.weight"].T)
        h = h + z @ w[f"{own}feed_forward.w2.weight"].T
        layer += 1
    return rms(h, w["norm.weight"]) @ w["output.weight"].T


def greedy(state, chosen, steps, grid, d, scale):
    """The likeliest codes of the guided mixture, the whole sequence again for each."""
    null = len(state["cls_embedding.embedding_table.weight"]) - 1
    codes = []
    for _ in range(steps):
        own, without = (logits(state, which, codes, grid, d)[-1] for which in (chosen, null))
        codes.append(int(np.argmax(without + scale * (own - without))))
    return codes


# The module, as far as the loader and the tests use it.


@dataclass
class ModelArgs:
    dim: int = 4096
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10000
    norm_eps: float = 1e-5
    num_classes: int = 1000
    vocab_size: int = 16384
    block_size: int = 256


class KVCache(nn.Module):
    def __init__(self, max_batch_size, max_seq_length, n_head, head_dim, dtype):
        super().__init__()
        for name in ("k_cache", "v_cache"):
            zeros = torch.zeros(max_batch_size, n_head, max_seq_length, head_dim, dtype=dtype)
            self.register_buffer(name, zeros)

    def update(self, input_pos, k, v):
        self.k_cache[:, :, input_pos], self.v_cache[:, :, input_pos] = k, v
        return self.k_cache, self.v_cache


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(size))

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return h.type_as(x) * self.weight


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dim, self.head_dim = config.dim, config.dim // config.n_head
        self.n_head = self.n_kv_head = config.n_head
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.kv_cache = None

    def forward(self, x, freqs_cis, input_pos, mask):
        B, N, _ = x.shape
        kv = self.n_kv_head * self.head_dim
        parts = self.wqkv(x).split([self.dim, kv, kv], dim=-1)
        q, k, v = (part.view(B, N, -1, self.head_dim) for part in parts)
        q, k, v = (x.transpose(1, 2) for x in (self.turn(q, freqs_cis), self.turn(k, freqs_cis), v))
        if self.kv_cache is not None:
            k, v = self.kv_cache.update(input_pos, k, v)
        out = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.wo(out.transpose(1, 2).reshape(B, N, self.dim))

    @staticmethod
    def turn(x, freqs_cis):
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        c, s = (part[None, :, None] for part in freqs_cis.unbind(-1))
        return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2).type_as(x)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = int(8 * config.dim / 3)
        if config.ffn_dim_multiplier is not None:
            width = int(config.ffn_dim_multiplier * width)
        width = -(-width // config.multiple_of) * config.multiple_of
        self.w1, self.w3 = (nn.Linear(config.dim, width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(width, config.dim, bias=False)

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm = Norm(config.dim, config.norm_eps)
        self.ffn_norm = Norm(config.dim, config.norm_eps)

    def forward(self, h, freqs_cis, input_pos, mask):
        h = h + self.attention(self.attention_norm(h), freqs_cis, input_pos, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Classes(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = Classes(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = Norm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        grid = round(config.block_size**0.5)
        found = table(grid, config.dim // config.n_head, config.rope_base)
        self.freqs_cis = torch.tensor(np.stack(found, -1), dtype=torch.float32)

    def setup_caches(self, max_batch_size, max_seq_length, dtype):
        self.max_seq_length = -(-max_seq_length // 8) * 8
        d = self.config.dim // self.config.n_head
        for block in self.layers:
            block.attention.kv_cache = KVCache(
                max_batch_size, self.max_seq_length, self.config.n_head, d, dtype
            )
        mask = torch.tril(torch.ones(self.max_seq_length, self.max_seq_length, dtype=torch.bool))
        self.causal_mask = mask[None].repeat(max_batch_size, 1, 1)

    def forward(self, idx, cond_idx, input_pos):
        parts, mask = [], None
        if cond_idx is not None:
            parts.append(self.cls_embedding.embedding_table(cond_idx)[:, None])
        if idx is not None:
            parts.append(self.tok_embeddings(idx))
        h = torch.cat(parts, 1)
        if len(parts) == 1:  # it generates, with a cache
            mask = self.causal_mask[: len(h), None, input_pos]
        for block in self.layers:
            h = block(h, self.freqs_cis[input_pos], input_pos, mask)
        return self.output(self.norm(h)).float(), None


def install(monkeypatch):
    """Make this module importable by the names of LlamaGen's repository."""
    for name in ("autoregressive", "autoregressive.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    gpt = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "autoregressive.models.gpt", gpt)
    sys.modules["autoregressive.models"].gpt = gpt
    return gpt


def random_model(gpt, seed=0, **changes):
    """A small model with activations of ordinary size; LlamaGen's own head is zero at first."""
    sizes = {
        "dim": 96, "n_layer": 3, "n_head": 4, "vocab_size": 200, "num_classes": 10,
        "block_size": 36, "multiple_of": 32, **changes,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = gpt.Transformer(gpt.ModelArgs(**sizes)).eval()
    for parameter in model.parameters():
        flat = parameter.ndim == 1
        parameter.data = torch.randn_like(parameter) * (0.2 if flat else 0.15) + float(flat)
    return model
