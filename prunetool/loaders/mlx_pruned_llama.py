"""Llama, or a related family, with layers that differ in heads and MLP width, for MLX-LM.

``mlx_lm.generate --model DIR --trust-remote-code`` finds this file through config.json's
``model_file``. Written by prunetool; Apache-2.0.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Dict

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache


@dataclass
class ModelArgs(llama.ModelArgs):
    per_layer_config: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    family: str = "llama"
    sliced_from: int = 0

    @classmethod
    def from_dict(cls, params):
        """A config.json resaved by transformers has the rotary embedding in ``rope_parameters``."""
        rope = params.get("rope_parameters") or {}
        if rope:
            theta = rope.get("rope_theta", params.get("rope_theta", 10000.0))
            scaling = {key: value for key, value in rope.items() if value is not None}
            params = {**params, "rope_theta": theta, "rope_scaling": scaling}
        return super().from_dict(params)

    def size_behind(self, index):
        """The hidden size behind a layer."""
        last = index == self.num_hidden_layers - 1
        return self.sliced_from if self.sliced_from and last else self.hidden_size

    def of_layer(self, index):
        """The sizes of one layer; its number may be zero-padded, as in ``"07"``."""
        sizes = {int(layer): own for layer, own in self.per_layer_config.items()}
        return replace(self, per_layer_config={}, **sizes.get(index, {}))


def attention(args):
    """The attention of the family."""
    if args.family == "qwen3":
        from mlx_lm.models import qwen3

        return qwen3.Attention(args)
    if args.family != "qwen2":
        return llama.Attention(args)
    own = llama.Attention(replace(args, attention_bias=True))
    own.o_proj = nn.Linear(own.n_heads * own.head_dim, args.hidden_size, bias=False)
    return own


class PrunedBlock(nn.Module):
    def __init__(self, args, index):
        super().__init__()
        args = args.of_layer(index)
        self.self_attn = attention(args)
        self.mlp = llama.MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.sliced = bool(args.sliced_from)
        if self.sliced:
            size, behind = args.hidden_size, args.size_behind(index)
            self.self_attn.shortcut = nn.Linear(size, size, bias=False)
            self.mlp.shortcut = nn.Linear(size, behind, bias=False)
            biased = "bias" in self.mlp.down_proj
            self.mlp.down_proj = nn.Linear(args.intermediate_size, behind, bias=biased)

    def __call__(self, x, mask, cache):
        attended = self.self_attn(self.input_layernorm(x), mask, cache)
        x = (self.self_attn.shortcut(x) if self.sliced else x) + attended
        changed = self.mlp(self.post_attention_layernorm(x))
        return (self.mlp.shortcut(x) if self.sliced else x) + changed


class PrunedBody(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [PrunedBlock(args, i) for i in range(args.num_hidden_layers)]
        size = args.size_behind(args.num_hidden_layers - 1)
        self.norm = nn.RMSNorm(size, eps=args.rms_norm_eps * args.hidden_size / size)
        self.window = args.sliding_window

    def __call__(self, tokens, cache=None):
        h = self.embed_tokens(tokens)
        cache = cache or [None] * len(self.layers)
        mask = create_attention_mask(h, cache[0], window_size=self.window)
        for block, own in zip(self.layers, cache):
            h = block(h, mask, own)
        return self.norm(h)


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = PrunedBody(args)
        if not args.tie_word_embeddings:
            size = args.size_behind(args.num_hidden_layers - 1)
            self.lm_head = nn.Linear(size, args.vocab_size, bias=False)

    def __call__(self, tokens, cache=None):
        h = self.model(tokens, cache)
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(h)
        return self.lm_head(h)

    def sanitize(self, weights):
        if self.args.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        return weights

    @property
    def layers(self):
        return self.model.layers

    def make_cache(self):
        window = self.args.sliding_window
        return [KVCache() if window is None else RotatingKVCache(window) for _ in self.layers]
