"""Configuration of a Llama whose decoder layers differ in attention heads and MLP width.

Needs transformers (4.48 and later) but not torch, which is not needed to read config.json or the
tokenizer. The sizes of each layer are under ``per_layer_config``, a key that transformers 5.14 and
later define themselves; earlier versions use the raw dictionary. ``family`` names the model whose
layers these are, if not Llama; ``sliding_window`` applies to all layers. ``sliced_from`` is the
hidden size behind the last layer of a model whose norms read a basis each, of ``hidden_size``
directions, with a matrix from each basis to the next.
Written by prunetool; Apache-2.0.
"""

import copy

from transformers.models.llama.configuration_llama import LlamaConfig


def window_of(config):
    """How many positions each one attends to; None for all."""
    return getattr(config, "sliding_window", None)


def size_behind(config, index):
    """The hidden size behind a layer."""
    sliced = getattr(config, "sliced_from", None)
    return sliced if sliced and index == config.num_hidden_layers - 1 else config.hidden_size


def config_of_layer(config, index):
    """The config of one layer, in the form of its family's class, for every transformers."""
    if getattr(config, "is_heterogeneous", False):
        own = copy.copy(config.per_layer_config[index])
    else:
        own = copy.copy(config)
        stated = config.__dict__.get("per_layer_config") or {}
        for layer, sizes in stated.items():
            if int(layer) == index:
                for name, value in sizes.items():
                    setattr(own, name, value)
    if getattr(config, "family", "llama") != "llama":
        own.sliding_window = window_of(config)
        kind = "full_attention" if own.sliding_window is None else "sliding_attention"
        own.layer_types = [kind] * config.num_hidden_layers
    return own


class PrunedLlamaConfig(LlamaConfig):
    model_type = "pruned_llama"
    use_sliding_window = False  # asked before transformers 4.53, which computes no window here

    def validate_architecture(self):
        """Replaces Llama's check that hidden_size is a multiple of the heads: head_dim is given."""
        if getattr(self, "head_dim", None) is None:
            raise ValueError("pruned_llama needs head_dim in config.json")
        for index in range(self.num_hidden_layers):
            own = config_of_layer(self, index)
            if own.num_attention_heads % own.num_key_value_heads:
                raise ValueError(f"layer {index}: heads are not a multiple of key-value heads")


if hasattr(LlamaConfig, "__class_validators__"):
    # Since transformers 5.4 configs are strict dataclasses, which collect their checks once.
    from huggingface_hub.dataclasses import strict

    PrunedLlamaConfig = strict(PrunedLlamaConfig)
