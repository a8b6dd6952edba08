import json

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from transformers import AutoConfig, LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from prunetool.errors import LONGEST, ConfigError
from prunetool.llama.config import (
    FAMILIES,
    KEYS,
    MAX_LAYERS,
    PLAIN_ROPE_VALUES,
    PLAIN_VALUES,
    PRUNED,
    ROPE_KEYS,
    LayerShape,
    parse_config,
)
from prunetool.llama.forms import config_json
from tests.conftest import tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "factor": 4.0}
COUNTS = "a whole number from 1 to 2147483647"


def scaled(base, **changes):
    return {"rope_scaling": {**base, **changes}}


def own(**changes):
    return {"per_layer_config": {"1": changes}}


REFUSED = {
    "model type": (
        {"model_type": "gpt2"}, "model_type 'gpt2'; prunetool reads llama, mistral, qwen2, qwen3"
    ),
    "a pruned family": ({"model_type": "pruned_llama", "family": "gpt2"}, "family 'gpt2'; prunet"),
    "a pruned family in a list": ({"model_type": "pruned_llama", "family": []}, "family []; prune"),
    "a window of a pruned llama": (
        {"model_type": "pruned_llama", "sliding_window": 64}, "sliding_window = 64 is not supported"
    ),
    "biases of o of qwen2": (
        {"model_type": "qwen2", "attention_bias": True}, "attention_bias = True is not supported"
    ),
    "mlp biases of qwen3": (
        {"model_type": "qwen3", "mlp_bias": True}, "mlp_bias = True is not supported"
    ),
    "a window of some layers of qwen2": (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
        "max_window_layers = 2 of 3 layers is not supported; the window must be on all "
        "layers (0) or on none (3)",
    ),
    "windows of some layers of qwen3": (
        {
            "model_type": "qwen3", "use_sliding_window": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "layer_types = ['full_attention', 'sliding_attention', 'full_attention'] is not supported",
    ),
    "windows of layers that are off": (
        {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, "layer_types = ['slid"
    ),
    "windows on by text": (
        {"model_type": "qwen2", "use_sliding_window": "yes"}, "use_sliding_window = 'yes'; it must"
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "a window of llama": ({"sliding_window": 4096}, "sliding_window = 4096"),
    "a window of mistral": (
        {"model_type": "mistral", "sliding_window": 0}, f"sliding_window = 0; it must be {COUNTS}"
    ),
    "a window of mistral that is said to be off": (
        {"model_type": "mistral", "sliding_window": True, "use_sliding_window": False},
        "sliding_window = True; it must be",
    ),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "experts": ({"num_local_experts": 8}, "num_local_experts = 8"),
    "granite": ({"residual_multiplier": 0.2}, "residual_multiplier = 0.2"),
    "sliding layers": ({"layer_types": ["sliding_attention"]}, "layer_types"),
    "rope type": ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "'longrope'"),
    "rope factor": ({"rope_scaling": {"rope_type": "linear"}}, "linear without factor"),
    "rope nan": ({"rope_theta": float("nan")}, "rope_theta = nan"),
    "heads": ({"num_attention_heads": 0}, "num_attention_heads = 0"),
    "true is no number": ({"hidden_size": True}, "hidden_size = True"),
    "text": ({"vocab_size": "many"}, "vocab_size = 'many'"),
    "odd head": ({"head_dim": 7}, "head_dim = 7"),
    "groups": ({"num_key_value_heads": 3}, "4 heads over 3 KV heads"),
    "no multiple": ({"num_attention_heads": 5, "head_dim": "absent"}, "not a multiple of 5 heads"),
    "eps": ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
    "skipped": ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, "per_layer_config of layer 1"),
    # Types and ranges.
    "true and false as text": (
        {"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false'; it must be true or false"
    ),
    "a 1 for true": ({"attention_bias": 1}, "attention_bias = 1; it must be true or false"),
    "a 0 for false": ({"mlp_bias": 0}, "mlp_bias = 0; it must be true or false"),
    "a 1 for true, elsewhere": ({"use_qk_norm": 0}, "use_qk_norm = 0 is not supported"),
    "true for a 1": ({"num_local_experts": True}, "num_local_experts = True is not supported"),
    "a list": ({"logit_scale": [1.0]}, "logit_scale = [1.0] is not supported"),
    "an object": ({"hidden_act": {"a": 1}}, "hidden_act = {'a': 1} is not supported"),
    "a model type that is a list": ({"model_type": ["llama"]}, "model_type ['llama']"),
    "an absent count": ({"vocab_size": "absent"}, "model without vocab_size; download config.json"),
    "a null count": ({"hidden_size": None}, "model without hidden_size; download config.json"),
    "a fraction": ({"num_attention_heads": 4.0}, f"num_attention_heads = 4.0; it must be {COUNTS}"),
    "negative": ({"intermediate_size": -1}, f"intermediate_size = -1; it must be {COUNTS}"),
    "2^40": ({"vocab_size": 2**40}, f"vocab_size = 1099511627776; it must be {COUNTS}"),
    "a list of counts": ({"intermediate_size": [96] * 3}, "intermediate_size = [96, 96, 96]; it"),
    "KV heads": ({"num_key_value_heads": 0}, f"num_key_value_heads = 0; it must be {COUNTS}"),
    "positions": (
        {"max_position_embeddings": 0}, f"max_position_embeddings = 0; it must be {COUNTS}"
    ),
    "positions as text": (
        {"max_position_embeddings": "2k"}, f"max_position_embeddings = '2k'; it must be {COUNTS}"
    ),
    "no head": ({"head_dim": 0}, "head_dim = 0; it must be a whole number from 2 to 2147483647"),
    "a head that is text": ({"head_dim": "64"}, "head_dim = '64'; it must be a whole number"),
    "layers": (
        {"num_hidden_layers": 2**31 - 1},
        "num_hidden_layers = 2147483647; it must be a whole number from 1 to 10000",
    ),
    "a layer beyond the bound": ({"num_hidden_layers": 10_001}, "num_hidden_layers = 10001; it"),
    "true for eps": ({"rms_norm_eps": True}, "rms_norm_eps = True; it must be a number from 0 to"),
    "negative eps": ({"rms_norm_eps": -1e-6}, "rms_norm_eps = -1e-06; it must be a number from 0"),
    "large eps": ({"rms_norm_eps": 1}, "rms_norm_eps = 1; it must be a number from 0 to 0.1"),
    "eps nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan; it must be a number from 0"),
    "theta 0": ({"rope_theta": 0}, "rope_theta = 0; it must be a number from 2 to 1e+15"),
    "theta true": ({"rope_theta": True}, "rope_theta = True; it must be a number from 2"),
    "theta as text": ({"rope_theta": "10000"}, "rope_theta = '10000'; it must be a number from 2"),
    "theta infinite": (
        {"rope_theta": float("inf")}, "rope_theta = inf; it must be a number from 2"
    ),
    "theta beyond floats": ({"rope_theta": 10**400}, "it must be a number from 2 to 1e+15"),
    "biases of mistral": (
        {"model_type": "mistral", "sliding_window": None, "attention_bias": True},
        "attention_bias = True is not supported",
    ),
    "KV heads of mistral": (
        {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": "absent"},
        "layer 0: 4 heads over 8 KV heads",
    ),
    "both directions": ({"is_causal": False}, "is_causal = False is not supported"),
    "other weights": ({"transformers_weights": "a.safetensors"}, "transformers_weights = 'a.safe"),
    # Layers.
    "too few layer types": (
        {"layer_types": ["full_attention"]}, "layer_types = ['full_attention']"
    ),
    "layer types as text": ({"layer_types": "full_attention"}, "layer_types = 'full_attention' is"),
    "layer types as object": ({"layer_types": {}}, "layer_types = {} is not supported"),
    "layer types in lists": ({"layer_types": [["a"], {}, 1]}, "layer_types = [['a'], {}, 1] is"),
    "sparse layers": ({"mlp_layer_types": ["sparse"] * 3}, "mlp_layer_types = ['sparse', 'sp"),
    "layers as list": ({"per_layer_config": []}, "per_layer_config = []; it must be an object"),
    "layers as text": ({"per_layer_config": "x"}, "per_layer_config = 'x'; it must be an object"),
    "a layer null": (
        {"per_layer_config": {"1": None}},
        "per_layer_config of layer 1 = None; it must be an object",
    ),
    "a layer too many": (
        {"per_layer_config": {"3": {}}},
        "per_layer_config of layer 3; each layer, from 0 to 2, may appear once",
    ),
    "a layer twice": (
        {"per_layer_config": {"1": {}, "01": {}}}, "per_layer_config of layer 01; each"
    ),
    "no layer": ({"per_layer_config": {"²": {}}}, "per_layer_config of layer ²; each layer"),
    "negative layer": (
        {"per_layer_config": {"-1": {}}}, "per_layer_config of layer -1; each layer"
    ),
    "eps of a layer": (
        own(rms_norm_eps=1e-3), "per_layer_config of layer 1: rms_norm_eps = 0.001 is not supported"
    ),
    "head_dim of a layer": (own(head_dim=8), "per_layer_config of layer 1: head_dim = 8 is not"),
    "null of a layer": (own(intermediate_size=None), "layer 1 without intermediate_size; download"),
    "count of a layer": (own(intermediate_size=True), "layer 1: intermediate_size = True; it must"),
    "KV heads of a layer": (
        own(num_key_value_heads=0), "layer 1: num_key_value_heads = 0; it must"
    ),
    "KV heads of the others": (own(num_attention_heads=1), "layer 1: 1 heads over 2 KV heads"),
    # Rotary embedding.
    "rope a list": ({"rope_scaling": []}, "rope_scaling = []; it must be an object"),
    "rope false": ({"rope_parameters": False}, "rope_parameters = False; it must be an object"),
    "rope type a list": ({"rope_scaling": {"type": ["linear"]}}, "rope type ['linear']; supported"),
    "rope of each layer type": (
        {"rope_parameters": {"full_attention": LINEAR}, "layer_types": ["full_attention"] * 3},
        "rope_parameters: full_attention = {'factor': 4.0, 'rope_type': 'linear'} is not supported",
    ),
    "rope list": (
        scaled(LINEAR, factor=[4.0]), "rope_scaling: factor = [4.0] is not supported"
    ),
    "rope part": (
        scaled(LINEAR, partial_rotary_factor=0.5), "rope_scaling: partial_rotary_factor = 0.5 is"
    ),
    "rope alpha": (
        scaled(LINEAR, rope_type="dynamic", alpha=1000.0), "rope_scaling: alpha = 1000.0"
    ),
    "rope text": (
        scaled(LINEAR, factor="4"), "rope type linear: factor = '4'; it must be a number"
    ),
    "rope true": (scaled(LINEAR, factor=True), "rope type linear: factor = True; it must be a nu"),
    "rope zero": (
        scaled(LINEAR, factor=0), "factor = 0; it must be a number from 1e-06 to 1000000"
    ),
    "dynamic": (
        scaled(LINEAR, rope_type="dynamic", factor=None), "rope type dynamic without factor"
    ),
    "dynamic of two": (
        {**scaled(LINEAR, rope_type="dynamic"), "head_dim": 2},
        "rope type dynamic with head_dim = 2",
    ),
    "llama3": (scaled(LLAMA3, low_freq_factor=None), "rope type llama3 without low_freq_factor"),
    "llama3 order": (
        scaled(LLAMA3, low_freq_factor=4),
        "rope type llama3: low_freq_factor = 4.0; it must be less than high_freq_factor = 4.0",
    ),
    "llama3 positions": (
        scaled(LLAMA3, original_max_position_embeddings=64.5),
        f"original_max_position_embeddings = 64.5; it must be {COUNTS}",
    ),
    "yarn": ({"rope_scaling": {"rope_type": "yarn"}}, "rope type yarn without factor"),
    "yarn fast": (scaled(YARN, beta_fast=0), "beta_fast = 0; it must be a number from 1e-06"),
    "yarn slow": (scaled(YARN, beta_slow="1"), "beta_slow = '1'; it must be a number"),
    "yarn mscale": (scaled(YARN, mscale=True), "mscale = True; it must be a number from 0"),
    "yarn mscale of all": (scaled(YARN, mscale_all_dim=-1), "mscale_all_dim = -1; it must be a"),
    "yarn scale": (scaled(YARN, attention_factor=float("nan")), "attention_factor = nan; it must"),
    "yarn truncate": (scaled(YARN, truncate=1), "truncate = 1; it must be true or false"),
    # Two keys for one thing.
    "two ropes": (
        {**scaled(LINEAR), "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "rope_scaling = {'factor': 4.0, 'rope_type': 'linear'}, but rope_parameters = {",
    ),
    "two factors": (
        {**scaled(LINEAR), "rope_parameters": {**LINEAR, "factor": 2}}, "rope_scaling ="
    ),
    "two thetas": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "rope_theta = 10000.0, but 500.0 in rope_parameters; delete the wrong one",
    ),
    "a theta that only one rope has": (
        {
            **scaled(LINEAR), "rope_theta": "absent",
            "rope_parameters": {**LINEAR, "rope_theta": 500.0},
        },
        "rope_scaling = {'factor': 4.0, 'rope_type': 'linear'}, but rope_parameters = {",
    ),
    "two types": (
        scaled(LINEAR, type="dynamic"), "rope_scaling: rope_type = 'linear', but type = 'dynamic'"
    ),
    "two originals": (
        {**scaled(YARN), "original_max_position_embeddings": 16},
        "original_max_position_embeddings = 16, but 32 in rope_scaling; delete the wrong one",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_result_is_refused_by_name(changes, says):
    with pytest.raises(ConfigError, match=r"^somewhere: ") as caught:
        parse_config(tiny_config(**changes), "somewhere")
    assert says in str(caught.value)


def test_unknown_keys_that_change_nothing_are_let_through():
    config = parse_config(tiny_config(unsloth_version="1", layer_types=["full_attention"] * 3), "")
    assert config.layers == 3


@pytest.mark.parametrize(
    ("said", "window"),
    [
        ({}, 4096),
        ({"sliding_window": None}, None),
        ({"sliding_window": 64}, 64),
        ({"sliding_window": 64, "use_sliding_window": False}, 64),
    ],
)
def test_a_mistral_has_the_window_that_transformers_gives_it(said, window):
    raw = tiny_config(model_type="mistral", **said)
    assert parse_config(raw, "").window == MistralConfig(**raw).sliding_window == window
    assert parse_config(raw, "").identity()["window"] == window


ON = {"use_sliding_window": True, "sliding_window": 64}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("said", "window"),
    [
        ({}, None),
        ({"sliding_window": 64}, None),
        (ON, None),
        ({**ON, "max_window_layers": 3}, None),
        ({**ON, "max_window_layers": 0}, 64),
        ({**ON, "layer_types": ["sliding_attention"] * 3}, 64),
        ({**ON, "layer_types": ["full_attention"] * 3}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
    ],
)
def test_a_qwen_has_the_window_that_transformers_gives_it(model_type, said, window):
    raw = tiny_config(model_type=model_type, **said)
    theirs = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    kind = "full_attention" if window is None else "sliding_attention"
    assert theirs.layer_types == [kind] * 3
    assert window is None or theirs.sliding_window == window
    config = parse_config(raw, "")
    assert config.window == window
    written = config_json(config, model_type)
    assert AutoConfig.for_model(**written).layer_types == [kind] * 3
    assert parse_config(written, "").identity() == config.identity()


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if not FAMILIES[name].pictures])
def test_what_a_config_leaves_out_is_the_default_of_its_family(model_type):
    sizes = dict.fromkeys(
        [
            "head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
            "rope_theta", "tie_word_embeddings", "attention_bias", "mlp_bias",
        ],
        "absent",
    )  # fmt: skip
    raw = tiny_config(model_type=model_type, num_attention_heads=32, **sizes)
    config, theirs = parse_config(raw, ""), AutoConfig.for_model(**raw)
    assert config.layer_shapes[0].kv_heads == theirs.num_key_value_heads
    assert config.head_dim == getattr(theirs, "head_dim", 64 // 32)
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope.theta == theirs.rope_parameters["rope_theta"]
    assert config.tied == theirs.tie_word_embeddings
    assert config.attention_bias == getattr(theirs, "attention_bias", False)
    assert config.window == getattr(theirs, "sliding_window", None)


LIKE_PLAIN = {
    "a window that is off": {"sliding_window": 4096, "use_sliding_window": False},
    "another name": {"hidden_act": "swish"},
    "rotary in all layers": {"no_rope_layers": [1, 1, 1]},
    "rotary in all layers, said by none": {"no_rope_layers": []},
    "of training and of the cache": {
        "attention_dropout": 0.1,
        "pretraining_tp": 2,
        "use_cache": False,
        "initializer_range": 1,
    },
}


@pytest.mark.parametrize("changes", LIKE_PLAIN.values(), ids=LIKE_PLAIN)
def test_what_computes_the_same_is_the_same_model(changes):
    config = parse_config(tiny_config(**changes), "")
    assert config.identity() == parse_config(tiny_config(), "").identity()
    for form in ("llama", "mistral", "pruned_llama"):
        written = config_json(config, form)
        assert parse_config(written, "").identity() == config.identity()
        assert written["hidden_act"] == "silu"


def test_layers_may_differ():
    own = {"1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}}
    config = parse_config(tiny_config(model_type="pruned_llama", per_layer_config=own), "")
    assert config.layer_shapes[1] == LayerShape(2, 1, 32)
    assert config.layer_shapes[0] == config.widest == LayerShape(4, 2, 96)


def test_padded_layer_numbers_are_layer_numbers():
    twelve = {"num_hidden_layers": 12, "per_layer_config": {"07": {"intermediate_size": 64}}}
    shapes = parse_config(tiny_config(**twelve), "").layer_shapes
    assert [shape.channels for shape in shapes] == [96] * 7 + [64] + [96] * 4


def test_a_layer_may_repeat_what_the_model_says():
    changes = own(rms_norm_eps=1e-5, skip=[], intermediate_size=64)
    assert parse_config(tiny_config(**changes), "").layer_shapes[1].channels == 64


def test_as_many_layers_as_the_bound_are_read():
    assert parse_config(tiny_config(num_hidden_layers=MAX_LAYERS), "").layers == MAX_LAYERS


@pytest.mark.parametrize("spelling", ["absent", None])
def test_what_is_not_said_is_transformers_default(spelling):
    optional = {
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta",
    }  # fmt: skip
    config = parse_config(tiny_config(**dict.fromkeys(optional, spelling)), "")
    theirs = LlamaConfig(**tiny_config(**dict.fromkeys(optional, "absent")))
    assert config.layer_shapes[0].kv_heads == theirs.num_key_value_heads == 4
    assert config.head_dim == theirs.head_dim == 16
    assert config.max_position_embeddings == theirs.max_position_embeddings == 2048
    assert config.rms_norm_eps == theirs.rms_norm_eps == 1e-6
    assert config.rope.theta == theirs.rope_parameters["rope_theta"] == 10000
    assert (config.tied, config.attention_bias, config.mlp_bias) == (False, False, False)


def test_what_a_mistral_config_leaves_out_is_mistrals_default():
    raw = tiny_config(
        model_type="mistral",
        sliding_window=None,
        num_attention_heads=8,
        head_dim=8,
        num_key_value_heads="absent",
        max_position_embeddings="absent",
    )
    config, theirs = parse_config(raw, ""), MistralConfig(**raw)
    assert config.layer_shapes[0].kv_heads == theirs.num_key_value_heads == 8
    assert config.max_position_embeddings == theirs.max_position_embeddings == 131072
    pruned = config_json(config, "llama")  # where an absent key would mean 2048
    assert LlamaConfig(**pruned).max_position_embeddings == 131072


ROPES = {
    "nothing": {},
    "whole theta": {"rope_theta": 500000},
    "null": {"rope_scaling": None, "rope_parameters": None},
    "empty": {"rope_scaling": {}, "rope_parameters": {}},
    "null beside rope_parameters": {
        "rope_scaling": None, "rope_theta": "absent",
        "rope_parameters": {**LLAMA3, "rope_theta": 500000.0},
    },
    "theta in rope_scaling": {**scaled(LINEAR, rope_theta=500.0), "rope_theta": "absent"},
    "theta beside rope_parameters": {"rope_parameters": LINEAR, "rope_theta": 500.0},
    "theta null beside one inside": {
        "rope_parameters": {**LINEAR, "rope_theta": 500.0}, "rope_theta": None,
    },
    "both": {**scaled(LINEAR), "rope_parameters": {**LINEAR, "rope_theta": 10000.0}},
    "both, spelled differently": {
        "rope_scaling": {"type": "linear", "factor": 4},
        "rope_parameters": {**LINEAR, "type": "linear", "rope_theta": 10000},
    },
    "old type": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic, with original": scaled(
        LINEAR, rope_type="dynamic", original_max_position_embeddings=16
    ),
    "default with a factor": scaled(LINEAR, rope_type="default"),
    "llama3": scaled(LLAMA3),
    "llama3, original beside": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")},
        "original_max_position_embeddings": 16,
    },
    "llama3, original absent": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")},
    },
    "yarn": scaled(YARN),
    "yarn, original in both": {**scaled(YARN), "original_max_position_embeddings": 32},
    "yarn, original absent": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, factor null": scaled(YARN, factor=None, original_max_position_embeddings=16),
    "yarn, truncate null": scaled(YARN, truncate=None),
    "yarn, truncate false": scaled(YARN, truncate=False),
    "yarn, nulls": scaled(
        YARN, beta_fast=None, beta_slow=None, attention_factor=None, mscale=None,
        mscale_all_dim=None,
    ),
    "yarn, betas": scaled(YARN, beta_fast=16, beta_slow=2.5),
    "yarn, attention_factor and mscale": scaled(
        YARN, attention_factor=0.7, mscale=0.5, mscale_all_dim=0.9
    ),
    "yarn, mscale": scaled(YARN, mscale=0.5, mscale_all_dim=0.9),
    "yarn, mscale alone": scaled(YARN, mscale=0.5),
    "yarn, mscale of nothing": scaled(YARN, mscale=0.5, mscale_all_dim=0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES)
def test_the_rotary_embedding_is_the_one_that_transformers_takes(changes):
    raw = json.dumps(tiny_config(**changes))  # transformers writes into what it is given
    rope = parse_config(json.loads(raw), "").rope
    original = LlamaConfig(**json.loads(raw))
    expected = LlamaRotaryEmbedding(original)  # which fills in the parameters
    theirs = {key: value for key, value in original.rope_parameters.items() if value is not None}
    assert (rope.type, rope.theta) == (theirs["rope_type"], theirs["rope_theta"])
    dropped = {"mscale", "mscale_all_dim"} if "mscale" not in rope.parameters else set()
    for key in theirs.keys() & ROPE_KEYS[rope.type].keys() - dropped:
        assert rope.parameters[key] == theirs[key], key

    restated = LlamaConfig(**config_json(parse_config(json.loads(raw), ""), "llama"))
    ours = LlamaRotaryEmbedding(restated)
    torch.testing.assert_close(ours.inv_freq, expected.inv_freq, rtol=0, atol=0)
    assert ours.attention_scaling == expected.attention_scaling


EQUAL = {
    "theta": ({"rope_theta": 10000}, {"rope_theta": 10000.0}),
    "theta absent": ({"rope_theta": "absent"}, {"rope_theta": 10000.0}),
    "rope_parameters": (
        {"rope_parameters": {**LINEAR, "rope_theta": 10000}, "rope_theta": "absent"},
        {"rope_scaling": {"type": "linear", "factor": 4}},
    ),
    "keys of other types": (scaled(LINEAR, low_freq_factor=1.0), scaled(LINEAR)),
    "yarn's defaults": (
        scaled(YARN, beta_fast=32, beta_slow=1, truncate=True, mscale=1.0),
        scaled(YARN),
    ),
    "original": (
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4},
            "original_max_position_embeddings": 32,
        },
        scaled(YARN),
    ),
    "defaults": (
        {"attention_bias": "absent", "mlp_bias": None, "tie_word_embeddings": "absent"},
        {},
    ),
    "head_dim": ({"head_dim": None}, {"head_dim": 16}),
    "layers": (own(intermediate_size=96), {}),
    "what changes nothing": ({"pretraining_tp": 2, "mlp_layer_types": ["dense"] * 3}, {}),
}


@pytest.mark.parametrize(("one", "other"), EQUAL.values(), ids=EQUAL)
def test_equal_models_have_one_identity(one, other):
    one, other = (parse_config(tiny_config(**changes), "").identity() for changes in (one, other))
    assert json.dumps(one) == json.dumps(other)


def test_an_identity_is_json_and_every_change_of_the_result_changes_it():
    changes = [
        {}, {"vocab_size": 261}, {"hidden_size": 128}, {"head_dim": 8}, {"num_hidden_layers": 4},
        {"num_attention_heads": 8}, {"num_key_value_heads": 4}, {"intermediate_size": 64},
        {"rms_norm_eps": 1e-6}, {"rope_theta": 500.0}, {"tie_word_embeddings": True},
        {"attention_bias": True}, {"mlp_bias": True}, {"max_position_embeddings": 64},
        own(intermediate_size=64), scaled(LINEAR), scaled(LINEAR, factor=2),
        {"model_type": "mistral"}, scaled(LINEAR, rope_type="dynamic"), scaled(LLAMA3),
        scaled(YARN), scaled(YARN, truncate=False), scaled(YARN, beta_slow=2),
        scaled(YARN, attention_factor=1), {"model_type": "qwen2"}, {"model_type": "qwen3"},
        {"model_type": "qwen3", "attention_bias": True},
    ]  # fmt: skip
    identities = [parse_config(tiny_config(**one), "").identity() for one in changes]
    assert [json.loads(json.dumps(one)) for one in identities] == identities
    assert len({json.dumps(one) for one in identities}) == len(changes)
    assert identities[14]["layer_shapes"] == [[4, 2, 96], [4, 2, 64], [4, 2, 96]]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
NAMES = sorted(
    {
        *KEYS,
        *PLAIN_VALUES,
        "model_type",
        "rope_scaling",
        "rope_parameters",
        "per_layer_config",
        "family",
        "max_window_layers",
    }
)
ROPE_NAMES = sorted(
    {*PLAIN_ROPE_VALUES, *ROPE_KEYS["yarn"], *ROPE_KEYS["llama3"], "type", "rope_theta"}
)


@given(
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=2),
    st.dictionaries(st.sampled_from(ROPE_NAMES), VALUES, max_size=2),
    st.sampled_from([*ROPE_KEYS, None]),
    st.sampled_from([*FAMILIES, PRUNED]),
)
@example({"rope_theta": 10**400}, {}, None, "llama")
def test_any_config_is_read_or_refused_in_one_line(changes, rope, kind, model_type):
    said = "somewhere: read"
    try:
        identity = parse_config(
            tiny_config(
                **{"model_type": model_type, "rope_scaling": {"rope_type": kind, **rope}, **changes}
            ),
            "somewhere",
        ).identity()
        assert json.loads(json.dumps(identity)) == identity
    except ConfigError as error:
        said = str(error)
    assert said.startswith("somewhere: ")
    assert len(said.splitlines()) == 1
    assert len(said) <= LONGEST


def test_a_mistral_whose_layers_are_all_full_is_refused_if_it_has_a_window():
    """Transformers 5 computes no window then; by the keys alone others compute one."""
    full, sliding = "full_attention", "sliding_attention"
    for types, window, refused in ((full, 16, True), (full, None, False), (sliding, 16, False)):
        raw = tiny_config(
            model_type="mistral", sliding_window=window, layer_types=3 * [types],
            attention_bias="absent", mlp_bias="absent",
        )  # fmt: skip
        if refused:
            with pytest.raises(ConfigError, match="layer_types"):
                parse_config(raw, "config.json")
        else:
            assert parse_config(raw, "config.json").window == window


def test_no_window_layers_need_be_stated_without_a_window():
    raw = tiny_config(model_type="qwen2", max_window_layers=None, attention_bias="absent",
                      mlp_bias="absent")  # fmt: skip
    assert parse_config(raw, "config.json").window is None
