"""Llama whose decoder layers differ in attention heads and MLP width, and related families.

Loaded by transformers (4.48 and later; 4.51 for Qwen3, 4.53 for a sliding window) with
``trust_remote_code=True``, and by vLLM's Transformers backend. Written by prunetool; Apache-2.0.
"""

from functools import cache, wraps
from importlib import import_module

from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mistral.modeling_mistral import MistralModel

from .configuration_pruned_llama import PrunedLlamaConfig, config_of_layer, window_of

FAMILIES = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


class PrunedLayer:
    """Mixin that gives a transformers decoder layer the sizes of its own index."""

    def __init__(self, config, layer_idx):
        super().__init__(config_of_layer(config, layer_idx), layer_idx)
        self.self_attn.config = config  # shared, so that set_attn_implementation reaches it


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
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
