"""The architecture as which llama.cpp computes a model, and the header that describes it.

| model | architecture |
|---|---|
| layers alike, of Llama or Mistral | ``llama`` |
| the same, of Qwen2 with all its heads, of Qwen3 | ``qwen2``, ``qwen3`` |
| layers of unequal sizes, and any other Qwen2 | ``deci``, with one count a layer |

``llama`` and ``deci`` rotate neighbours instead of halves: their rows of q and k are interleaved.
Counts of each layer are read by every architecture, but only ``deci`` computes with them; all its
layers need attention and an MLP (`forms.normalised`). Keys as llama.cpp reads them
(src/llama-model.cpp).
"""

import math
from typing import Any, NamedTuple

import numpy as np

from prunetool.errors import ConfigError
from prunetool.llama.config import LlamaConfig


class Form(NamedTuple):
    """How llama.cpp is to compute a model.

    Attributes:
      architecture: its name.
      fields: keys without the architecture's name; an int, a float, a str or a list of ints each.
      rope_factors: what llama.cpp divides the frequencies by, (d/2,), float32; None if nothing.
      warning: what llama.cpp computes differently; empty if nothing.
    """

    architecture: str
    fields: dict[str, Any]
    rope_factors: np.ndarray | None
    warning: str = ""


def choose(config: LlamaConfig) -> Form:
    """The form of a model.

    Raises:
      ConfigError: if llama.cpp has none that computes it.
    """
    if config.classes:
        raise ConfigError("llama.cpp", "computes no models of pictures", "keep the checkpoint")
    if config.shortcuts:
        what = "computes no model with a basis before each norm"
        raise ConfigError("llama.cpp", what, "run score with --basis shared, and export again")
    shapes = config.layer_shapes
    rope, factors, warnings = _rope(config)
    architecture = _architecture(config, has_factors=factors is not None)
    counts = {
        "feed_forward_length": [shape.channels for shape in shapes],
        "attention.head_count": [shape.heads for shape in shapes],
        "attention.head_count_kv": [shape.kv_heads for shape in shapes],
    }
    sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    if config.window is not None and config.window < config.max_position_embeddings:
        warnings.append(f"llama.cpp computes no window: beyond {config.window} tokens it differs")
    fields = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.layers,
        **(counts if architecture == "deci" else {key: of[0] for key, of in counts.items()}),
        **dict.fromkeys(sizes, config.head_dim),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope.theta),
        **rope,
    }
    return Form(architecture, fields, factors, "; ".join(warnings))


def _architecture(config: LlamaConfig, *, has_factors: bool) -> str:
    """The architecture's name. Qwen2's and Qwen3's take no factors of the frequencies.

    Raises:
      ConfigError: if there is none.
    """
    shape, alike = config.layer_shapes[0], len(set(config.layer_shapes)) == 1
    if config.qk_norm:
        lacking = "layers of unequal sizes" * (not alike) or "biases" * config.attention_bias
        lacking = lacking or "llama3 rope scaling" * has_factors
        if lacking:
            raise ConfigError(
                "llama.cpp",
                f"has no architecture with norms of the heads and {lacking}",
                "keep the checkpoint" if alike else "score with --allocation uniform",
            )
        return "qwen3"
    if config.qkv_bias and alike and not has_factors:
        # Its q is as wide as the stream.
        return "qwen2" if shape.heads * config.head_dim == config.hidden_size else "deci"
    return "llama" if alike and not config.qkv_bias else "deci"


def _rope(config: LlamaConfig) -> tuple[dict[str, Any], np.ndarray | None, list[str]]:
    """The fields of a rotary embedding's scaling, its factors, and warnings."""
    parameters, prefix = config.rope.parameters, "rope.scaling."
    match config.rope.type:
        case "linear":
            fields = {f"{prefix}type": "linear", f"{prefix}factor": float(parameters["factor"])}
            return fields, None, []
        case "llama3":
            return {}, _llama3_factors(config), []
        case "yarn":
            return _yarn(config), None, []
        case "dynamic":
            limit = config.max_position_embeddings
            warning = f"llama.cpp has no dynamic rope scaling: beyond {limit} tokens it differs"
            return {}, None, [warning]
    return {}, None, []


def _llama3_factors(config: LlamaConfig) -> np.ndarray:
    """The divisors of the frequencies that llama3 scaling means, (d/2,), float32."""
    says = config.rope.parameters
    low, high = float(says["low_freq_factor"]), float(says["high_freq_factor"])
    inverse = config.rope.theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    turns = says["original_max_position_embeddings"] * inverse / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    factors: np.ndarray = 1 / ((1 - blend) / float(says["factor"]) + blend)
    return factors.astype(np.float32)


def _yarn(config: LlamaConfig) -> dict[str, Any]:
    """YaRN's fields; llama.cpp multiplies cosine and sine by 0.1 ln(factor) + 1 itself."""
    says = config.rope.parameters
    if says.get("mscale") or says.get("mscale_all_dim") or not says.get("truncate", True):
        raise ConfigError(
            "config.json", "has a YaRN that llama.cpp does not compute", "keep the checkpoint"
        )
    factor = float(says["factor"])
    fields: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(says["original_max_position_embeddings"]),
        "rope.scaling.yarn_beta_fast": float(says["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(says["beta_slow"]),
    }
    if says.get("attention_factor") is not None:
        own = 0.1 * math.log(max(factor, 1.0)) + 1.0
        fields["rope.scaling.attn_factor"] = float(says["attention_factor"]) / own
    return fields
