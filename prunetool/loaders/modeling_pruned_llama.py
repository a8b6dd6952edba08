"""Llama whose decoder layers differ in attention heads and MLP width, and related families.

Loaded by transformers (4.48 and later; 4.51 for Qwen3, 4.53 for a sliding window, 4.54 for a basis
before each norm) with ``trust_remote_code=True``, and but for such bases by vLLM's Transformers
backend. Written by prunetool; Apache-2.0.
"""

from functools import cache, wraps
from importlib import import_module

from torch import nn
from transformers import __version__
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mistral.modeling_mistral import MistralModel

from .configuration_pruned_llama import (
    PrunedLlamaConfig,
    config_of_layer,
    size_behind,
    window_of,
)

version = tuple(map(int, __version__.split(".")[:2]))
FAMILIES = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


class PrunedLayer:
    """Mixin that gives a transformers decoder layer the sizes of its own index."""

    def __init__(self, config, layer_idx):
        super().__init__(config_of_layer(config, layer_idx), layer_idx)
        self.self_attn.config = config  # shared, so that set_attn_implementation reaches it
        self.sliced = bool(getattr(config, "sliced_from", None))
        if self.sliced:
            if version < (4, 54):  # whose layers return tuples
                raise ImportError("a basis before each norm needs transformers 4.54 or later")
            size, behind = config.hidden_size, size_behind(config, layer_idx)
            self.self_attn.shortcut = nn.Linear(size, size, bias=False)
            self.mlp.shortcut = nn.Linear(size, behind, bias=False)
            down = self.mlp.down_proj
            self.mlp.down_proj = nn.Linear(down.in_features, behind, bias=down.bias is not None)

    def forward(self, hidden_states, *args, **kwargs):
        if not self.sliced:
            return super().forward(hidden_states, *args, **kwargs)
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normed, *args, **kwargs)
        hidden_states = self.self_attn.shortcut(hidden_states) + attended
        changed = self.mlp(self.post_attention_layernorm(hidden_states))
        return self.mlp.shortcut(hidden_states) + changed


class PrunedLlamaDecoderLayer(PrunedLayer, LlamaDecoderLayer):
    pass


@cache
def layer_class(family):
    """The transformers decoder layer of a family."""
    if family == "llama":
        return PrunedLlamaDecoderLayer
    name = f"{FAMILIES[family]}DecoderLayer"
    base = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)
    return type(f"Pruned{name}", (PrunedLayer, base), {})


def final_norm(config):
    """The norm behind the last layer, whose size may differ from the other norms'."""
    size = size_behind(config, config.num_hidden_layers - 1)
    return LlamaRMSNorm(size, eps=config.rms_norm_eps * config.hidden_size / size)


class PrunedLlamaPreTrainedModel(LlamaPreTrainedModel):
    config_class = PrunedLlamaConfig
    config: PrunedLlamaConfig
    _no_split_modules = [f"Pruned{name}DecoderLayer" for name in ("Llama", *FAMILIES.values())]
    _can_record_outputs = {
        **(getattr(LlamaPreTrainedModel, "_can_record_outputs", None) or {}),
        "hidden_states": PrunedLayer,
    }


class PrunedLlamaModel(PrunedLlamaPreTrainedModel, LlamaModel):
    def __init__(self, config):
        if window_of(config) is not None and hasattr(LlamaModel, "_update_causal_mask"):
            raise ImportError("a sliding window needs transformers 4.53 or later")
        # Not LlamaModel.__init__, which would build layers of one size.
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layer = layer_class(getattr(config, "family", "llama"))
        self.layers = nn.ModuleList(
            layer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = final_norm(config)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @wraps(LlamaModel.forward)
    def forward(self, *args, **kwargs):
        # Mistral's is Llama's with a sliding-window mask.
        body = LlamaModel if window_of(self.config) is None else MistralModel
        return body.forward(self, *args, **kwargs)


class PrunedLlamaForCausalLM(PrunedLlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        behind = size_behind(config, config.num_hidden_layers - 1)
        self.lm_head = nn.Linear(behind, config.vocab_size, bias=False)
        self.post_init()
