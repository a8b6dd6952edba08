"""Names and axes of the tensors of a checkpoint, from which all shapes and selections derive."""

from typing import NamedTuple

EMBEDDING = "model.embed_tokens.weight"
CLASS_EMBEDDING = "model.class_embedding.weight"  # of a model of pictures
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


class Part(NamedTuple):
    """A tensor of a decoder layer.

    Attributes:
      name: its name in the checkpoint, relative to its layer.
      axes: what each of its axes counts (`axis_sizes`); a matrix is (out, in).
      needs: settings of `LlamaConfig`, any of which adds this part; empty: always present.
    """

    name: str
    axes: tuple[str, ...]
    needs: tuple[str, ...] = ()


PARTS = {
    "input_norm": Part("input_layernorm.weight", ("hidden",)),
    "q": Part("self_attn.q_proj.weight", ("heads", "hidden")),
    "k": Part("self_attn.k_proj.weight", ("groups", "hidden")),
    "v": Part("self_attn.v_proj.weight", ("groups", "hidden")),
    "o": Part("self_attn.o_proj.weight", ("hidden", "heads")),
    "post_norm": Part("post_attention_layernorm.weight", ("hidden",)),
    "gate": Part("mlp.gate_proj.weight", ("channels", "hidden")),
    "up": Part("mlp.up_proj.weight", ("channels", "hidden")),
    "down": Part("mlp.down_proj.weight", ("output", "channels")),
    "q_bias": Part("self_attn.q_proj.bias", ("heads",), ("attention_bias", "qkv_bias")),
    "k_bias": Part("self_attn.k_proj.bias", ("groups",), ("attention_bias", "qkv_bias")),
    "v_bias": Part("self_attn.v_proj.bias", ("groups",), ("attention_bias", "qkv_bias")),
    "o_bias": Part("self_attn.o_proj.bias", ("hidden",), ("attention_bias",)),
    "gate_bias": Part("mlp.gate_proj.bias", ("channels",), ("mlp_bias",)),
    "up_bias": Part("mlp.up_proj.bias", ("channels",), ("mlp_bias",)),
    "down_bias": Part("mlp.down_proj.bias", ("output",), ("mlp_bias",)),
    "q_norm": Part("self_attn.q_norm.weight", ("head",), ("qk_norm",)),
    "k_norm": Part("self_attn.k_norm.weight", ("head",), ("qk_norm",)),
    "o_shortcut": Part("self_attn.shortcut.weight", ("hidden", "hidden"), ("shortcuts",)),
    "down_shortcut": Part("mlp.shortcut.weight", ("output", "hidden"), ("shortcuts",)),
}
# The norm whose outputs each of the matrices reads that read one.
NORM_OF = {
    **dict.fromkeys(("q", "k", "v"), "input_norm"),
    **dict.fromkeys(("gate", "up"), "post_norm"),
}
# The seven over which sparsity is counted, and the two whose inputs the units produce.
MATRICES = tuple(part for part, (_, axes, needs) in PARTS.items() if len(axes) == 2 and not needs)
UNIT_MATRICES = tuple(part for part in MATRICES if PARTS[part].axes[1] != "hidden")
# Beside these two, what takes the residual stream into the basis behind them.
SHORTCUTS = tuple(f"{part}_shortcut" for part in UNIT_MATRICES)
