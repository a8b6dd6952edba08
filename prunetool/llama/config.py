"""What config.json says of a Llama model.

Anything in it that changes the result and is not computed here is refused by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prunetool.errors import ConfigError

MODEL_TYPES = ("llama", "mistral", "pruned_llama")
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DEFAULT_ROPE_THETA = 10000.0  # transformers' LlamaConfig

# Keys of relatives of Llama that change the forward, with the values that leave it a plain Llama.
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
    "num_local_experts": (None, 0, 1),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "no_rope_layers": (None,),
    "layer_types": (None,),
    "attention_chunk_size": (None,),
    "is_encoder_decoder": (None, False),
}


@dataclass(frozen=True)
class LayerShape:
    """What a decoder layer holds: query heads, KV heads (one a KV group), MLP channels."""

    heads: int
    kv_heads: int
    channels: int

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: type, base, and the type's own parameters."""

    type: str = "default"
    theta: float = DEFAULT_ROPE_THETA
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama model's sizes; layers may differ in `LayerShape` (a pruned model).

    ``raw`` is config.json as read, for whoever writes a new one.
    """

    vocab_size: int
    hidden_size: int
    head_dim: int
    layer_shapes: tuple[LayerShape, ...]
    rms_norm_eps: float
    rope: Rope
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    raw: Mapping[str, Any]

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_shapes)

    @property
    def widest(self) -> LayerShape:
        """The largest of each count over the layers: what all layers can be padded to."""
        shapes = self.layer_shapes
        kv_heads = max(shape.kv_heads for shape in shapes)
        group_size = max(shape.group_size for shape in shapes)
        return LayerShape(kv_heads * group_size, kv_heads, max(shape.channels for shape in shapes))

    def with_shapes(self, shapes: tuple[LayerShape, ...]) -> "LlamaConfig":
        """The same model with other layer shapes."""
        return replace(self, layer_shapes=shapes)


def parse_config(raw: Mapping[str, Any], where: object) -> LlamaConfig:
    """Read a config.json that transformers' LlamaForCausalLM (or the pruned form) would load.

    Raises:
      ConfigError: another architecture, a setting that changes the result and is not computed
        here, or a count that is missing or impossible.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(where, f"model_type {model_type!r}", "prunetool reads Llama models only")
    for key, plain in PLAIN_VALUES.items():
        # Mistral's own default is a sliding window; the others' default is none.
        absent = 4096 if (model_type, key) == ("mistral", "sliding_window") else plain[0]
        value = raw.get(key, absent)
        if value not in plain and not _is_full_attention(key, value):
            raise ConfigError(
                where, f"{key} = {value!r} is not computed here", f"known: {key} = {plain[0]!r}"
            )

    def count(key: str, source: Mapping[str, Any] = raw, default: Any = None) -> int:
        value = source.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ConfigError(where, f"{key} = {value!r}", "it must be a positive whole number")
        return value

    heads = count("num_attention_heads")
    hidden_size = count("hidden_size")
    if raw.get("head_dim") is None and hidden_size % heads:
        raise ConfigError(
            where, f"hidden_size {hidden_size} is no multiple of {heads} heads", "give head_dim"
        )
    head_dim = count("head_dim", default=hidden_size // heads)
    if head_dim % 2:
        raise ConfigError(where, f"head_dim = {head_dim}", "rotary embedding needs an even number")

    overrides = raw.get("per_layer_config") or {}
    if not isinstance(overrides, dict):
        raise ConfigError(where, "per_layer_config is no object", "get config.json again")
    shapes = []
    for layer in range(min(count("num_hidden_layers"), 100_000)):
        own = overrides.get(str(layer), {})
        if not isinstance(own, dict) or own.get("skip"):
            raise ConfigError(where, f"per_layer_config of layer {layer}", "not a form we read")
        merged = {**raw, **own}
        layer_heads = count("num_attention_heads", merged)
        shape = LayerShape(
            layer_heads,
            count("num_key_value_heads", merged, default=layer_heads),
            count("intermediate_size", merged),
        )
        if shape.heads % shape.kv_heads:
            raise ConfigError(
                where, f"{shape.heads} heads over {shape.kv_heads} KV heads", "must be a multiple"
            )
        shapes.append(shape)

    eps = raw.get("rms_norm_eps", 1e-6)
    if not isinstance(eps, float | int) or not 0 <= eps < 1:
        raise ConfigError(where, f"rms_norm_eps = {eps!r}", "it must be a small number")
    max_positions = count("max_position_embeddings", default=2048)
    return LlamaConfig(
        vocab_size=count("vocab_size"),
        hidden_size=hidden_size,
        head_dim=head_dim,
        layer_shapes=tuple(shapes),
        rms_norm_eps=float(eps),
        rope=_parse_rope(raw, max_positions, where),
        tied=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        max_position_embeddings=max_positions,
        raw=raw,
    )


def _is_full_attention(key: str, value: Any) -> bool:
    """Newer configs spell "every layer attends to everything" out as a list of layer_types."""
    return key == "layer_types" and isinstance(value, list) and set(value) <= {"full_attention"}


def _parse_rope(raw: Mapping[str, Any], max_positions: int, where: object) -> Rope:
    """``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling`` (4)."""
    stated = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(stated, dict):
        raise ConfigError(where, "the rope parameters are no object", "get config.json again")
    parameters = dict(stated)
    legacy_type = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", legacy_type)
    theta = parameters.pop("rope_theta", None) or raw.get("rope_theta") or DEFAULT_ROPE_THETA
    if kind not in ROPE_TYPES:
        raise ConfigError(where, f"rope type {kind!r}", f"known types: {', '.join(ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(where, "partial_rotary_factor is not computed here", "it must be 1")
    required = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if kind in ("llama3", "yarn"):
        parameters.setdefault(
            "original_max_position_embeddings",
            raw.get("original_max_position_embeddings") or max_positions,
        )
    for key in required.get(kind, ("factor",)):
        if key not in parameters:
            raise ConfigError(where, f"rope type {kind} without {key}", "get config.json again")
    for key, value in {"rope_theta": theta, **parameters}.items():
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            raise ConfigError(where, f"rope {key} = {value!r}", "it must be a positive number")
    return Rope(kind, float(theta), parameters)
