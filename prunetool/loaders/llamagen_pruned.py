"""LlamaGen's model with the weights of a checkpoint of prunetool's, dense or pruned.

For use in a checkout of github.com/FoundationVision/LlamaGen:

    from llamagen_pruned import load
    model = load("PRUNED")

and, if all layers are alike and have all their heads, for LlamaGen's own programs:

    python PRUNED/llamagen_pruned.py PRUNED --to-pt FILE.pt

No forward of LlamaGen's is replaced: its layers get other sizes. Written by prunetool; Apache-2.0.
"""

import argparse
import json
from pathlib import Path
from types import MethodType

import torch
from safetensors.torch import load_file
from torch import nn

LAYER_NAMES = {
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
GLOBAL_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "cls_embedding.embedding_table.weight": "model.class_embedding.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def read_config(directory):
    """config.json, and each layer's (heads, MLP channels)."""
    config = json.loads((Path(directory) / "config.json").read_text())
    own = config.get("per_layer_config", {})
    shapes = []
    for layer in range(config["num_hidden_layers"]):
        sizes = {**config, **own.get(str(layer), {})}
        shapes.append((sizes["num_attention_heads"], sizes["intermediate_size"]))
    return config, shapes


def state_dict(directory):
    """The weights by LlamaGen's names: q, k and v in one, rotary pairs side by side."""
    config, _ = read_config(directory)
    index = json.loads((Path(directory) / "model.safetensors.index.json").read_text())
    found = {}
    for shard in sorted(set(index["weight_map"].values())):
        found |= load_file(Path(directory) / shard)
    out = {ours: found[theirs] for ours, theirs in GLOBAL_NAMES.items()}
    half = config["head_dim"] // 2
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        q, k, v = (found[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv")
        q, k = (x.reshape(-1, 2, half, x.shape[1]).transpose(1, 2).reshape(x.shape) for x in (q, k))
        out[f"{ours}attention.wqkv.weight"] = torch.cat([q, k, v])
        out |= {ours + a: found[theirs + b] for a, b in LAYER_NAMES.items()}
    return out


def ffn_arguments(config, channels):
    """The two arguments of LlamaGen's ModelArgs that give its layers this MLP width."""
    return {
        "ffn_dim_multiplier": channels / int(8 * config["hidden_size"] / 3),
        "multiple_of": 32,
    }


def load(directory):
    """LlamaGen's Transformer with the checkpoint's sizes and weights, in their dtype."""
    from autoregressive.models import gpt

    config, shapes = read_config(directory)
    d, weights = config["head_dim"], state_dict(directory)
    model = gpt.Transformer(
        gpt.ModelArgs(
            dim=config["hidden_size"],
            n_layer=len(shapes),
            n_head=config["hidden_size"] // d,
            vocab_size=config["vocab_size"],
            num_classes=config["num_classes"],
            block_size=config["rope_scaling"]["grid"] ** 2,
            norm_eps=config["rms_norm_eps"],
            rope_base=config["rope_theta"],
            **ffn_arguments(config, config["intermediate_size"]),
        )
    )
    for block, (heads, channels) in zip(model.layers, shapes):
        resize(block, config["hidden_size"], heads, channels, d)
    whole = model.setup_caches

    def setup_caches(self, max_batch_size, max_seq_length, dtype):
        whole(max_batch_size, max_seq_length, dtype)
        for block, (heads, _) in zip(self.layers, shapes):
            block.attention.kv_cache = gpt.KVCache(
                max_batch_size, self.max_seq_length, heads, d, dtype
            )

    model.setup_caches = MethodType(setup_caches, model)
    model.to(weights["output.weight"].dtype).load_state_dict(weights, strict=True)
    return model.eval()


def resize(block, features, heads, channels, head_dim):
    """Give a layer another number of heads and another MLP width."""

    def linear(inputs, outputs):
        return nn.Linear(inputs, outputs, bias=False)

    attention, mlp = block.attention, block.feed_forward
    attention.n_head = attention.n_kv_head = heads
    attention.dim = heads * head_dim  # only cuts wqkv's outputs, and shapes wo's input
    attention.wqkv = linear(features, 3 * heads * head_dim)
    attention.wo = linear(heads * head_dim, features)
    mlp.w1, mlp.w3 = linear(features, channels), linear(features, channels)
    mlp.w2 = linear(channels, features)


def main():
    parser = argparse.ArgumentParser(description="Write LlamaGen's weights of a checkpoint.")
    parser.add_argument("directory")
    parser.add_argument("--to-pt", required=True, metavar="FILE")
    given = parser.parse_args()
    config, shapes = read_config(given.directory)
    if len(set(shapes)) > 1 or shapes[0][0] * config["head_dim"] != config["hidden_size"]:
        parser.exit(
            1,
            f"{given.directory}: layers have other sizes than LlamaGen's; use load() of this "
            "file\n",
        )
    arguments = ffn_arguments(config, shapes[0][1])
    if shapes[0][1] % arguments["multiple_of"]:
        parser.exit(1, f"{given.directory}: {shapes[0][1]} channels are no multiple of 32\n")
    weights = state_dict(given.directory)
    # LlamaGen reads the one or the other, and says nothing if it finds neither.
    torch.save({**weights, "model": weights}, given.to_pt)
    print(f"ModelArgs({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")


if __name__ == "__main__":
    main()
