"""Llama whose decoder layers differ in attention heads and MLP width.

Loaded by transformers (4.48 and later) through ``trust_remote_code=True``, and by vLLM's
Transformers backend. The sizes of each layer are in config.json under ``per_layer_config``, the
key that transformers 5.14 and later define themselves; earlier versions are served from the raw
dictionary. Written by prunetool; Apache-2.0.
"""

import copy

from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


def config_of_layer(config, index):
    """The plain Llama config of one layer, on every version of transformers."""
    if getattr(config, "is_heterogeneous", False):
        return copy.copy(config.per_layer_config[index])
    own = copy.copy(config)
    stated = config.__dict__.get("per_layer_config") or {}
    for layer, sizes in stated.items():
        if int(layer) == index:
            for name, value in sizes.items():
                setattr(own, name, value)
    return own


class PrunedLlamaConfig(LlamaConfig):
    model_type = "pruned_llama"

    def validate_architecture(self):
        """Replaces Llama's check that hidden_size is a multiple of the heads: head_dim is given."""
        if getattr(self, "head_dim", None) is None:
            raise ValueError("pruned_llama needs head_dim in config.json")
        for index in range(self.num_hidden_layers):
            own = config_of_layer(self, index)
            if own.num_attention_heads % own.num_key_value_heads:
                raise ValueError(f"layer {index}: heads are not a multiple of key-value heads")


if hasattr(LlamaConfig, "__class_validators__"):
    # From transformers 5.4 on configs are strict dataclasses, which collect their checks once.
    from huggingface_hub.dataclasses import strict

    PrunedLlamaConfig = strict(PrunedLlamaConfig)


class PrunedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config_of_layer(config, layer_idx), layer_idx)
        self.self_attn.config = config  # shared, so that set_attn_implementation reaches it


class PrunedLlamaPreTrainedModel(LlamaPreTrainedModel):
    config_class = PrunedLlamaConfig
    config: PrunedLlamaConfig
    _no_split_modules = ["PrunedLlamaDecoderLayer"]
    _can_record_outputs = {
        **(getattr(LlamaPreTrainedModel, "_can_record_outputs", None) or {}),
        "hidden_states": PrunedLlamaDecoderLayer,
    }


class PrunedLlamaModel(PrunedLlamaPreTrainedModel, LlamaModel):
    def __init__(self, config):
        # Not LlamaModel.__init__, which would build layers of one size.
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            PrunedLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class PrunedLlamaForCausalLM(PrunedLlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
