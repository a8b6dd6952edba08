"""Read config.json of a Llama model, or of a closely related family.

Any setting that changes the result and is not computed here is refused by name. A null counts as
an absent key, but does not take its family's default.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from prunetool.errors import ConfigError, shown

MAX_LAYERS = 10_000  # the deepest published Llama models have fewer than 200
REQUIRED = object()


class Value(NamedTuple):
    """Allowed values of a key: a whole number (int), a number (float), or true or false (bool)."""

    kind: type
    low: float = 0
    high: float = 1
    default: Any = REQUIRED

    def holds(self, value: object) -> bool:
        """Whether a value has this type (true is not 1) and is in this range."""
        kinds = (int, float) if self.kind is float else (self.kind,)
        return type(value) in kinds and self.low <= value <= self.high  # type: ignore[operator]

    def __str__(self) -> str:
        """The phrase after "it must be"."""
        if self.kind is bool:
            return "true or false"
        name = "a whole number" if self.kind is int else "a number"
        return f"{name} from {self.low:.15g} to {self.high:.15g}"


COUNT = Value(int, 1, 2**31 - 1)
OPTIONAL_COUNT = COUNT._replace(default=None)
FACTOR = Value(float, 1e-6, 1e6)
OPTIONAL_SCALE = Value(float, 0, 1e6, None)
FLAG = Value(bool, default=False)

# The defaults are those of transformers' LlamaConfig, which has defaults for the required keys too.
# Those of other families are in `FAMILIES`.
KEYS = {
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": Value(int, 1, MAX_LAYERS),
    "num_attention_heads": COUNT,
    "num_key_value_heads": OPTIONAL_COUNT,  # num_attention_heads
    "head_dim": Value(int, 2, 2**31 - 1, None),  # hidden_size / num_attention_heads
    "max_position_embeddings": COUNT._replace(default=2048),
    "original_max_position_embeddings": OPTIONAL_COUNT,
    "rms_norm_eps": Value(float, 0, 0.1, 1e-6),
    "rope_theta": Value(float, 2, 1e15, None),  # DEFAULT_ROPE_THETA
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
}
LAYER_KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class Family(NamedTuple):
    """How the models of a ``model_type`` differ from a plain Llama.

    Attributes:
      defaults: defaults of its config class in transformers that are not Llama's, for absent
        keys only. With ``sliding_window`` it may have a window; with ``max_window_layers`` too,
        only if ``use_sliding_window`` is true.
      always: the `SETTINGS` that all its models have.
      stated: the ones that config.json may turn on; its class knows no others.
      pictures: it writes the codes of a picture, given its class (`LlamaConfig.classes`).
    """

    defaults: Mapping[str, Any] = {}
    always: tuple[str, ...] = ()
    stated: tuple[str, ...] = ()
    pictures: bool = False


PICTURES = "llamagen"  # class-conditional (arXiv 2406.06525); this config.json is prunetool's own
SETTINGS = ("attention_bias", "mlp_bias", "qkv_bias", "qk_norm")  # fields of `LlamaConfig`
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": Family(stated=("attention_bias", "mlp_bias")),
    "mistral": Family(
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
    ),
    "qwen2": Family(_QWEN, always=("qkv_bias",)),
    "qwen3": Family({**_QWEN, "head_dim": 128}, always=("qk_norm",), stated=("attention_bias",)),
    PICTURES: Family({"rms_norm_eps": 1e-5}, pictures=True),
}
PRUNED = "pruned_llama"  # layers of unequal sizes, of the family that the key ``family`` names

DEFAULT_ROPE_THETA = 10000.0
GRID_ROPE = "llamagen_2d"  # rows and columns of a picture's codes
ROPE_KEYS: dict[str, dict[str, Value]] = {
    "default": {},
    "linear": {"factor": FACTOR},
    "dynamic": {"factor": FACTOR},
    "llama3": {
        "factor": FACTOR,
        "low_freq_factor": FACTOR,
        "high_freq_factor": FACTOR,
        "original_max_position_embeddings": COUNT,
    },
    "yarn": {
        "factor": FACTOR,
        "original_max_position_embeddings": COUNT,
        "beta_fast": FACTOR._replace(default=32.0),
        "beta_slow": FACTOR._replace(default=1.0),
        "truncate": Value(bool, default=True),
        "attention_factor": OPTIONAL_SCALE,
        "mscale": OPTIONAL_SCALE,
        "mscale_all_dim": OPTIONAL_SCALE,
    },
    GRID_ROPE: {"grid": Value(int, 1, 1024)},
}

# Keys by which some program changes the computation, with the values that leave a plain Llama.
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names for one function
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "rotary_pct": (None, 1, 1.0),
    "rope_traditional": (None, False),
    "quantization_config": (None,),
    "quantization": (None,),
    "compression_config": (None,),
    "transformers_weights": (None,),  # weights from another file
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "n_routed_experts": (None, 0, 1),
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
    "bias": (None, False),
    "qkv_bias": (None, False),
    "no_rope_layers": (None,),
    "layer_types": (None,),
    "mlp_layer_types": (None,),
    "attention_chunk_size": (None,),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
# The same, inside rope_scaling and rope_parameters.
PLAIN_ROPE_VALUES: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "alpha": (None,),
    "attn_factor": (None, 1, 1.0),
    "extrapolation_factor": (None, 1, 1.0),
    "apply_yarn_scaling": (None, True),
    "llama_4_scaling_beta": (None,),
}


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a decoder layer: query heads, KV heads (one per KV group), MLP channels.

    ``output`` is the size of the residual stream behind it, if that is not the model's: of the last
    layer where ``shortcuts``.
    """

    heads: int
    kv_heads: int
    channels: int
    output: int | None = None

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    def keeping(self, groups: int, channels: int) -> "LayerShape":
        """The shape with this many KV groups and channels."""
        return LayerShape(groups * self.group_size, groups, channels, self.output)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: type, base, and the type's own parameters."""

    type: str = "default"
    theta: float = DEFAULT_ROPE_THETA
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama model's sizes; layers may differ in `LayerShape` (a pruned model).

    Attributes:
      attention_bias: biases of q, k, v and o.
      mlp_bias: biases of gate, up and down.
      qkv_bias: biases of q, k and v, but not o.
      qk_norm: norms of the heads' queries and keys.
      window: how many positions, itself included, a position attends to; None for all.
      raw: config.json as read, for writing a new one.
      classes: of a model of pictures, the rows of its class embedding: the classes, and last the
        null class of classifier-free guidance. Class c has the id ``vocab_size`` + c and begins a
        sequence; the codes follow. 0 for a model of text.
      shortcuts: the residual stream has a basis of its own before each norm, and a matrix between
        any two (`pruning.basis`); the last layer's output has the size of the dense model's.
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
    qkv_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    window: int | None
    raw: Mapping[str, Any]
    classes: int = 0
    shortcuts: bool = False

    @property
    def final_eps(self) -> float:
        """ε of the final norm, whose input may have another size than the other norms'."""
        return self.rms_norm_eps * self.hidden_size / self.size_before(self.layers)

    def size_before(self, layer: int) -> int:
        """The size of the residual stream before a layer, or after the last if as many."""
        return (self.layer_shapes[layer - 1].output if layer else None) or self.hidden_size

    @property
    def ids(self) -> int:
        """Number of ids: tokens, or codes and classes."""
        return self.vocab_size + self.classes

    @property
    def codes(self) -> int:
        """Codes of a picture, G² for a grid of G x G; 0 for a model of text."""
        return int(self.rope.parameters["grid"]) ** 2 if self.classes else 0

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_shapes)

    @property
    def widest(self) -> LayerShape:
        """The maximum of each count over the layers, to which all can be padded."""
        shapes = self.layer_shapes
        kv_heads = max(shape.kv_heads for shape in shapes)
        group_size = max(shape.group_size for shape in shapes)
        return LayerShape(kv_heads * group_size, kv_heads, max(shape.channels for shape in shapes))

    def with_shapes(self, shapes: tuple[LayerShape, ...]) -> "LlamaConfig":
        """The same model with other layer shapes."""
        return replace(self, layer_shapes=shapes)

    def with_biases(self) -> "LlamaConfig":
        """The model with biases in all seven matrices."""
        return replace(self, attention_bias=True, mlp_bias=True, qkv_bias=False)

    def with_hidden_size(self, size: int) -> "LlamaConfig":
        """The model cut to ``size`` directions of its stream (`pruning.basis`), its head untied.

        Norms of queries and keys share ε and so get the new one: next to their mean square, 1e-6 or
        less makes no difference.
        """
        eps = self.rms_norm_eps * self.hidden_size / size
        return replace(self, hidden_size=size, rms_norm_eps=eps, tied=False)

    def with_bases(self, size: int) -> "LlamaConfig":
        """The model with a basis of its own for each norm's input, cut to ``size`` directions."""
        cut, (*before, last) = self.with_hidden_size(size), self.layer_shapes
        shapes = (*before, replace(last, output=self.hidden_size))
        return replace(cut, layer_shapes=shapes, shortcuts=True)

    def identity(self) -> dict[str, Any]:
        """Everything that changes the result, as JSON values; equal for equal models.

        Independent of config.json's spelling: defaults are filled in, and ``raw`` is left out.
        """
        values = asdict(replace(self, raw={}))
        del values["raw"]
        # Stated only for models that have them.
        for key in ("qkv_bias", "qk_norm", "classes", "shortcuts"):
            if not values[key]:
                del values[key]
        values["layer_shapes"] = [
            [size for size in shape.values() if size is not None]
            for shape in values["layer_shapes"]
        ]
        return values


def parse_config(raw: Mapping[str, Any], where: object) -> LlamaConfig:
    """Read a config.json that transformers' class of its family (or the pruned form) would load.

    Raises:
      ConfigError: if it has another architecture, a setting that changes the result and is not
        computed here, a value of the wrong type or out of range, or contradictory keys.
    """
    family = _parse_family(raw, where)
    stated, plain = {**family.defaults, **raw}, dict(PLAIN_VALUES)
    # transformers' classes have no other biases, whatever config.json says.
    biases = ("attention_bias", "mlp_bias")
    plain |= {key: (None, False) for key in biases if key not in family.stated}
    given = {key: _read(stated, key, value, where) for key, value in KEYS.items()}
    layers, heads, hidden_size = (
        given[key] for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    plain["layer_types"] += (["full_attention"] * layers,)
    plain["mlp_layer_types"] += (["dense"] * layers,)
    plain["no_rope_layers"] += ([], [1] * layers)  # a 1 is a layer with rotary embedding
    window = _parse_window(stated, raw, family, plain, where)
    classes = 0
    if family.pictures:
        plain |= {"conditioning": ("class", None), "conditioning_tokens": (1, None)}
        classes = _read(raw, "num_classes", COUNT, where) + 1
    _refuse_others(stated, plain, where)

    if given["head_dim"] is None and hidden_size % heads:
        raise ConfigError(
            where, f"hidden_size {hidden_size} is not a multiple of {heads} heads", "give head_dim"
        )
    head_dim = given["head_dim"] or hidden_size // heads
    if head_dim % 2:
        raise ConfigError(where, f"head_dim = {head_dim}", "rotary embedding needs an even number")

    given["num_key_value_heads"] = given["num_key_value_heads"] or heads
    rope = _parse_rope(raw, given, where)
    if rope.type == "dynamic" and head_dim == 2:
        raise ConfigError(where, "rope type dynamic with head_dim = 2", "head_dim must be larger")
    if (rope.type == GRID_ROPE) != family.pictures or (family.pictures and head_dim % 4):
        raise ConfigError(
            where,
            f"rope type {rope.type} with model_type {_said(raw['model_type'])} and head_dim = "
            f"{head_dim}",
            f"{GRID_ROPE} is for {PICTURES}, which has no other and head_dim a multiple of 4",
        )
    shapes, sliced = _parse_shapes(raw, given, where), None
    if raw["model_type"] == PRUNED:
        sliced = _read(raw, "sliced_from", OPTIONAL_COUNT, where)
        if sliced and (sliced < hidden_size or given["tie_word_embeddings"] or family.pictures):
            raise ConfigError(
                where, f"sliced_from = {sliced} does not go with the other keys",
                "it is at least hidden_size, of a model of text that is not tied; export it again",
            )  # fmt: skip
        shapes = (*shapes[:-1], replace(shapes[-1], output=sliced))
    return LlamaConfig(
        vocab_size=given["vocab_size"],
        hidden_size=hidden_size,
        head_dim=head_dim,
        layer_shapes=shapes,
        rms_norm_eps=given["rms_norm_eps"],
        rope=rope,
        tied=given["tie_word_embeddings"],
        attention_bias=given["attention_bias"],
        mlp_bias=given["mlp_bias"],
        qkv_bias="qkv_bias" in family.always,
        qk_norm="qk_norm" in family.always,
        max_position_embeddings=given["max_position_embeddings"],
        window=window,
        raw=raw,
        classes=classes,
        shortcuts=sliced is not None,
    )


def _parse_shapes(
    raw: Mapping[str, Any], given: Mapping[str, Any], where: object
) -> tuple[LayerShape, ...]:
    """Counts of every layer: those of the model, and ``per_layer_config`` of the pruned form."""
    layers, shapes = given["num_hidden_layers"], []
    overrides = _parse_overrides(raw, layers, where)
    for layer in range(layers):
        own, of = {**given, **overrides.get(layer, {})}, f"layer {layer}"
        shape = LayerShape(*(_read(own, key, COUNT, where, of) for key in LAYER_KEYS))
        if shape.heads % shape.kv_heads:
            raise ConfigError(
                where,
                f"{of}: {shape.heads} heads over {shape.kv_heads} KV heads",
                "the first must be a multiple of the second",
            )
        shapes.append(shape)
    return tuple(shapes)


def _parse_family(raw: Mapping[str, Any], where: object) -> Family:
    """The model's row of `FAMILIES`; without defaults if pruned, as its config.json states all.

    Raises:
      ConfigError: if it belongs to none of them.
    """
    model_type = raw.get("model_type")
    key, name = "model_type", model_type
    if model_type == PRUNED:
        key, name = "family", "llama" if raw.get("family") is None else raw["family"]
    if name not in tuple(FAMILIES):
        raise ConfigError(where, f"{key} {_said(name)}", f"prunetool reads {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    if model_type != PRUNED:
        return family
    windowed = family.defaults.keys() & {"sliding_window"}
    return family._replace(defaults=dict.fromkeys(windowed))


def _said(value: object) -> str:
    return shown(reprlib.repr(value), 60)


def _named(key: str, of: str) -> str:
    return f"{of}: {key}" if of else key


def _read(source: Mapping[str, Any], key: str, allowed: Value, where: object, of: str = "") -> Any:
    """The checked value of a key; its default if the key is absent or null."""
    value = source.get(key)
    if value is None:
        if allowed.default is REQUIRED:
            raise ConfigError(where, f"{of or 'model'} without {key}", "download config.json again")
        return allowed.default
    if not allowed.holds(value):
        raise ConfigError(where, f"{_named(key, of)} = {_said(value)}", f"it must be {allowed}")
    return allowed.kind(value)


def _same(a: object, b: object) -> bool:
    """Equal, and true is not 1."""
    return type(a) is type(b) and a == b


def _refuse_others(
    source: Mapping[str, Any], plain: Mapping[str, tuple[Any, ...]], where: object, of: str = ""
) -> None:
    for key, values in plain.items():
        value = source.get(key, values[0])
        if not any(_same(value, known) for known in values):
            raise ConfigError(
                where,
                f"{_named(key, of)} = {_said(value)} is not supported",
                f"supported: {key} = {values[0]!r}",
            )


def _parse_window(
    stated: Mapping[str, Any],
    raw: Mapping[str, Any],
    family: Family,
    plain: dict[str, tuple[Any, ...]],
    where: object,
) -> int | None:
    """The window of all layers, or None; allows in ``plain`` the keys that it accounts for."""
    layers = stated["num_hidden_layers"]
    window = None
    if "sliding_window" in family.defaults:
        window = _read(stated, "sliding_window", OPTIONAL_COUNT, where)
    if "sliding_window" in family.defaults or raw.get("use_sliding_window") is False:
        del plain["sliding_window"]
    if "max_window_layers" in family.defaults:
        del plain["use_sliding_window"]
        if not _parse_windowed(stated, layers, where):
            window = None
        elif window is not None:
            plain["layer_types"] += (["sliding_attention"] * layers,)
    elif window is not None:  # with all layers full, transformers computes no window, others do
        plain["layer_types"] = (None, ["sliding_attention"] * layers)
    return window


def _parse_windowed(stated: Mapping[str, Any], layers: int, where: object) -> bool:
    """Whether all layers have the window, for a family that allows it in some only."""
    on = _read(stated, "use_sliding_window", FLAG, where)
    first = _read(stated, "max_window_layers", Value(int, 0, 2**31 - 1, default=0), where)
    types = stated.get("layer_types")
    if on and types is None and stated["sliding_window"] is not None and 0 < first < layers:
        raise ConfigError(
            where,
            f"max_window_layers = {first} of {layers} layers is not supported",
            f"the window must be on all layers (0) or on none ({layers})",
        )
    return bool(on) and (first == 0 if types is None else types != ["full_attention"] * layers)


def _parse_overrides(
    raw: Mapping[str, Any], layers: int, where: object
) -> dict[int, dict[str, Any]]:
    """``per_layer_config``: the layers' own values, by number ("7", or "07" if resaved)."""
    stated = raw.get("per_layer_config")
    if not isinstance(stated, dict | None):
        raise ConfigError(where, f"per_layer_config = {_said(stated)}", "it must be an object")
    overrides: dict[int, dict[str, Any]] = {}
    for name, own in (stated or {}).items():
        layer = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else layers
        of = f"per_layer_config of layer {shown(name)}"
        if layer >= layers or layer in overrides:
            raise ConfigError(where, of, f"each layer, from 0 to {layers - 1}, may appear once")
        if not isinstance(own, dict):
            raise ConfigError(where, f"{of} = {_said(own)}", "it must be an object")
        for key, value in own.items():
            harmless = _same(value, [] if key == "skip" else raw.get(key))
            if key not in LAYER_KEYS and not harmless:
                raise ConfigError(
                    where,
                    f"{of}: {key} = {_said(value)} is not supported",
                    f"layers may differ in {', '.join(LAYER_KEYS)}",
                )
        overrides[layer] = own
    return overrides


def _parse_rope(raw: Mapping[str, Any], given: Mapping[str, Any], where: object) -> Rope:
    """``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4), or both."""
    keys = [key for key in ("rope_scaling", "rope_parameters") if raw.get(key) not in (None, {})]
    ropes = [_parse_spelling(key, raw[key], given, where) for key in keys]
    if len(ropes) == 2 and ropes[0] != ropes[1]:
        first, second = (f"{key} = {_said(raw[key])}" for key in keys)
        raise ConfigError(where, f"{first}, but {second}", "delete the one that is wrong")
    return ropes[0] if ropes else Rope(theta=given["rope_theta"] or DEFAULT_ROPE_THETA)


def _parse_spelling(name: str, stated: Any, given: Mapping[str, Any], where: object) -> Rope:
    """The rotary embedding from one object, without what its type does not use."""
    if not isinstance(stated, dict):
        raise ConfigError(where, f"{name} = {_said(stated)}", "it must be an object")
    for key, value in stated.items():
        if key not in ("type", "rope_type") and isinstance(value, dict | list):
            raise ConfigError(
                where,
                f"{name}: {shown(key)} = {_said(value)} is not supported",
                "it must be a number",
            )
    _refuse_others(stated, PLAIN_ROPE_VALUES, where, name)
    said = [stated[key] for key in ("rope_type", "type") if stated.get(key) is not None]
    kinds = said or ["default"]
    for kind in kinds:
        if kind not in tuple(ROPE_KEYS):
            raise ConfigError(
                where, f"rope type {_said(kind)}", f"supported: {', '.join(ROPE_KEYS)}"
            )
    if kinds[0] != kinds[-1]:
        raise ConfigError(
            where,
            f"{name}: rope_type = {kinds[0]!r}, but type = {kinds[1]!r}",
            "delete one of them",
        )
    kind, of = kinds[0], f"rope type {kinds[0]}"

    def once(key: str) -> Any:
        """The value of a key that may be both inside and outside the object."""
        inside = _read(stated, key, KEYS[key], where, of)
        if None not in (inside, given[key]) and inside != given[key]:
            raise ConfigError(
                where, f"{key} = {given[key]}, but {inside} in {name}", "delete the wrong one"
            )
        return inside or given[key]

    theta = once("rope_theta") or DEFAULT_ROPE_THETA
    stated = dict(stated)
    if "original_max_position_embeddings" in ROPE_KEYS[kind]:
        positions = given["max_position_embeddings"]
        original = once("original_max_position_embeddings") or positions
        stated["original_max_position_embeddings"] = original
        for key, meaning in {"factor": positions / original, "truncate": False}.items():
            if kind == "yarn" and stated.get(key, meaning) is None:
                stated[key] = meaning  # how transformers reads a null
    p = {key: _read(stated, key, value, where, of) for key, value in ROPE_KEYS[kind].items()}
    if kind == "llama3" and p["low_freq_factor"] >= p["high_freq_factor"]:
        raise ConfigError(
            where,
            f"{of}: low_freq_factor = {p['low_freq_factor']}",
            f"it must be less than high_freq_factor = {p['high_freq_factor']}",
        )
    if p.get("attention_factor") is not None or not (p.get("mscale") and p.get("mscale_all_dim")):
        p["mscale"] = p["mscale_all_dim"] = None  # only both together have an effect
    return Rope(kind, theta, {key: value for key, value in p.items() if value is not None})
