"""Llama whose decoder layers differ in attention heads and MLP width.

Loaded by transformers (4.48 and later) through ``trust_remote_code=True``, and by vLLM's
Transformers backend. Written by prunetool; Apache-2.0.
"""

from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_pruned_llama import PrunedLlamaConfig, config_of_layer


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
