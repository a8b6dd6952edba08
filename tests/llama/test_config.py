import pytest

from prunetool.errors import ConfigError
from prunetool.llama.config import LayerShape, parse_config
from tests.conftest import tiny_config

REFUSED = {
    "model type": ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "mistral's default window": ({"model_type": "mistral"}, "sliding_window = 4096"),
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
    "no multiple": ({"num_attention_heads": 5, "head_dim": "absent"}, "no multiple of 5 heads"),
    "eps": ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
    "skipped": ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, "per_layer_config of layer 1"),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED)
def test_what_would_change_the_result_is_refused_by_name(changes, says):
    with pytest.raises(ConfigError, match=r"^somewhere: ") as caught:
        parse_config(tiny_config(**changes), "somewhere")
    assert says in str(caught.value)


def test_unknown_keys_that_change_nothing_are_let_through():
    config = parse_config(tiny_config(unsloth_version="1", layer_types=["full_attention"] * 3), "")
    assert config.layers == 3


def test_layers_may_differ():
    own = {"1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}}
    config = parse_config(tiny_config(model_type="pruned_llama", per_layer_config=own), "")
    assert config.layer_shapes[1] == LayerShape(2, 1, 32)
    assert config.layer_shapes[0] == config.widest == LayerShape(4, 2, 96)
