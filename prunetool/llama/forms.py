"""The architecture as which a pruned model is written, so that other programs can load it.

| layer sizes | form | loads in |
|---|---|---|
| equal, hidden size a multiple of the heads, no window | ``llama`` | all that loads Llama |
| equal, otherwise, no biases | ``mistral`` with the window, or none | the same; it does not check |
| equal, of Qwen2 or Qwen3 | ``qwen2``, ``qwen3`` | the same; MLX-LM's qwen2 knows no head_dim |
| unequal | ``pruned_llama`` with its own loader files | transformers, vLLM, MLX-LM |
| a basis of the stream before each norm | ``pruned_llama`` | transformers, MLX-LM |
| a model of pictures | ``llamagen`` with its own loader file | LlamaGen |
"""

from dataclasses import replace
from importlib import resources
from typing import Any

from prunetool.llama.config import (
    FAMILIES,
    PICTURES,
    PRUNED,
    SETTINGS,
    Family,
    LayerShape,
    LlamaConfig,
)

WIDTH_MULTIPLE = 32  # loaders of unequal layers need MLP widths in these steps, and at least one
OLDEST_TRANSFORMERS = "5.0.0"  # stated in config.json; older values cause needless warnings
LOADERS = {  # by form, what is put beside the weights, and for which programs
    PRUNED: {
        "configuration_pruned_llama.py": "transformers, vLLM",
        "modeling_pruned_llama.py": "transformers, vLLM",
        "mlx_pruned_llama.py": "MLX-LM",
    },
    PICTURES: {"llamagen_pruned.py": "LlamaGen"},
}
LOADER_FILES = [name for names in LOADERS.values() for name in names]

AUTO_MAP = {  # where transformers finds the classes
    "AutoConfig": "configuration_pruned_llama.PrunedLlamaConfig",
    "AutoModel": "modeling_pruned_llama.PrunedLlamaModel",
    "AutoModelForCausalLM": "modeling_pruned_llama.PrunedLlamaForCausalLM",
}

# Keys of the source that a pruned model must not inherit.
DROPPED = (
    # These make programs run code from this or another repository.
    "auto_map", "custom_pipelines", "model_file", "trust_remote_code",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
    # These name other weights.
    "_name_or_path", "name_or_path", "speculators_config",
    # These are written anew, or in one place only.
    "per_layer_config", "rope_parameters", "original_max_position_embeddings", "sliding_window",
    "use_sliding_window", "max_window_layers", "family", "sliced_from",
    # These say that all layers are of one kind; they make transformers take mistral for ministral.
    "layer_types", "mlp_layer_types",
)  # fmt: skip


def loader_files(form: str) -> dict[str, bytes]:
    """The files with which other programs load a form, by name; none for a stock architecture."""
    where = resources.files("prunetool.loaders")
    return {name: where.joinpath(name).read_bytes() for name in LOADERS.get(form, {})}


def choose_form(config: LlamaConfig) -> str:
    """The form for these layer shapes: one of `FAMILIES`, or ``pruned_llama``."""
    if config.classes:
        return PICTURES
    if len(set(config.layer_shapes)) > 1 or config.shortcuts:
        return PRUNED
    divides = config.hidden_size % config.layer_shapes[0].heads == 0  # or Llama's class refuses it
    return next((name for name in families(config) if name != "llama" or divides), PRUNED)


def families(config: LlamaConfig) -> list[str]:
    """The families whose classes can compute this model, in the order of `FAMILIES`."""
    has = {setting for setting in SETTINGS if getattr(config, setting)}
    return [
        name
        for name, family in FAMILIES.items()
        if set(family.always) <= has <= {*family.always, *family.stated}
        and (config.window is None or "sliding_window" in family.defaults)
        and family.pictures == bool(config.classes)
    ]


def normalised(config: LlamaConfig) -> LlamaConfig:
    """The model with its layers zero-padded, if its form has a loader (exact, and loadable)."""
    if choose_form(config) not in LOADERS:
        return config

    def widened(shape: LayerShape) -> LayerShape:
        channels = max(-(-shape.channels // WIDTH_MULTIPLE), 1) * WIDTH_MULTIPLE
        return replace(shape, channels=channels)

    return config.with_shapes(tuple(map(widened, config.layer_shapes)))


def config_json(config: LlamaConfig, form: str) -> dict[str, Any]:
    """The config.json of a model of these layer shapes in a form.

    Everything else is copied from the source. The rotary embedding is written once, as
    ``rope_theta`` and ``rope_scaling``, which every program reads: transformers 4 and MLX-LM use
    theta 10000 if only ``rope_parameters`` is present, and a later edit might change only one.
    """
    raw = {key: value for key, value in config.raw.items() if key not in DROPPED}
    widest, rope = config.widest, config.rope
    scaling = None if rope.type == "default" else {"rope_type": rope.type, **rope.parameters}
    theta = int(rope.theta) if rope.theta.is_integer() else rope.theta
    raw |= {  # defaults too: the other forms have other defaults
        "attention_bias": config.attention_bias,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": config.mlp_bias,
        "num_attention_heads": widest.heads,
        "num_key_value_heads": widest.kv_heads,
        "intermediate_size": widest.channels,
        "num_hidden_layers": config.layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied,
        "transformers_version": OLDEST_TRANSFORMERS,
    }
    name = form.replace("_", " ").title().replace(" ", "")
    raw |= {"model_type": form, "architectures": [f"{name}ForCausalLM"]}
    family = FAMILIES.get(form, Family())
    if "sliding_window" in family.defaults:
        raw["sliding_window"] = config.window  # absent means 4096
    if "max_window_layers" in family.defaults:
        raw |= {"use_sliding_window": config.window is not None, "max_window_layers": 0}
    if "qkv_bias" in family.always:
        del raw["attention_bias"]  # it would give o a bias, too
    if form == PICTURES:  # transformers does not know it
        del raw["architectures"], raw["transformers_version"]
        return raw | (_per_layer(config) if len(set(config.layer_shapes)) > 1 else {})
    return raw | _pruned_keys(config) if form == PRUNED else raw


def _pruned_keys(config: LlamaConfig) -> dict[str, Any]:
    """What the config.json of unequal layers has besides: family, loader files, every layer."""
    raw: dict[str, Any] = {}
    family = families(config)[0]
    for key in ("bos_token_id", "eos_token_id"):  # or the loader's class takes Llama's
        if key in FAMILIES[family].defaults:
            raw[key] = config.raw.get(key)
    if family != "llama":
        raw["family"] = family
    if config.window is not None:
        raw["sliding_window"] = config.window
    if config.shortcuts:
        raw["sliced_from"] = config.size_before(config.layers)
    raw["auto_map"] = AUTO_MAP
    raw["model_file"] = "mlx_pruned_llama.py"
    return raw | _per_layer(config)


def _per_layer(config: LlamaConfig) -> dict[str, Any]:
    """The sizes of every layer."""
    sizes = {
        str(layer): {
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "intermediate_size": shape.channels,
        }
        for layer, shape in enumerate(config.layer_shapes)
    }
    return {"per_layer_config": sizes}
