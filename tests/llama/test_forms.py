import json
from importlib import resources

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from prunetool.llama.config import LayerShape, parse_config
from prunetool.llama.forms import LOADER_FILES, choose_form, config_json
from tests.conftest import tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "llama": [LayerShape(4, 2, 64)] * 3,
    "mistral": [LayerShape(3, 1, 64)] * 3,
    "pruned_llama": [LayerShape(4, 2, 64), LayerShape(2, 1, 64), LayerShape(4, 2, 32)],
}


def exported(form, raw):
    config = parse_config(raw, "").with_shapes(tuple(SHAPES[form]))
    assert choose_form(config) == form
    return config_json(config, form)


@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_every_form_loads_with_the_rotary_embedding_of_its_source(form, spelling, tmp_path):
    raw = tiny_config(rope_theta=500000.0, **{spelling: LLAMA3})
    source = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    (tmp_path / "config.json").write_text(json.dumps(exported(form, raw)))
    for name in LOADER_FILES:
        text = resources.files("prunetool.loaders").joinpath(name).read_text("utf-8")
        (tmp_path / name).write_text(text)
    loaded = AutoConfig.from_pretrained(tmp_path, trust_remote_code=form == "pruned_llama")
    assert loaded.model_type == form
    assert loaded.rope_parameters == {**LLAMA3, "rope_theta": 500000.0} == source.rope_parameters
    torch.testing.assert_close(
        LlamaRotaryEmbedding(loaded).inv_freq, LlamaRotaryEmbedding(source).inv_freq
    )


@pytest.mark.parametrize("form", SHAPES)
def test_the_rotary_embedding_is_said_once_in_the_keys_that_every_program_reads(form):
    raw = tiny_config(
        rope_theta="absent",
        rope_parameters={**LLAMA3, "rope_theta": 500000.0},
        original_max_position_embeddings=64,
    )
    written = exported(form, raw)
    assert (written["rope_theta"], written["rope_scaling"]) == (500000, LLAMA3)
    assert not {"rope_parameters", "original_max_position_embeddings"} & written.keys()

    plain = exported(form, tiny_config(rope_theta=500000.5))
    assert (plain["rope_theta"], plain["rope_scaling"]) == (500000.5, None)


@pytest.mark.parametrize("form", SHAPES)
def test_a_pruned_model_runs_no_code_of_its_source(form):
    foreign = dict.fromkeys(
        [
            "auto_map", "custom_pipelines", "model_file", "trust_remote_code",
            "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
            "experts_implementation", "_experts_implementation",
            "_experts_implementation_internal", "speculators_config", "_name_or_path",
            "name_or_path",
        ],
        "foreign",
    )  # fmt: skip
    written = exported(form, tiny_config(**foreign, eos_token_id=7))
    assert written["eos_token_id"] == 7
    assert "foreign" not in written.values()
    ours = {"auto_map", "model_file"} if form == "pruned_llama" else set()
    assert foreign.keys() & written.keys() == ours


def test_what_is_written_is_read_as_the_same_model():
    for raw in (tiny_config(), tiny_config(rms_norm_eps="absent", max_position_embeddings=None)):
        for form in SHAPES:
            config = parse_config(raw, "").with_shapes(tuple(SHAPES[form]))
            written = json.loads(json.dumps(config_json(config, form)))
            assert parse_config(written, "").identity() == config.identity()


def test_a_null_of_the_source_is_written_as_the_value_it_stands_for():
    nulls = dict.fromkeys(
        [
            "rms_norm_eps",
            "max_position_embeddings",
            "tie_word_embeddings",
            "attention_bias",
            "mlp_bias",
            "rope_theta",
        ]
    )
    written = exported("llama", tiny_config(**nulls))
    assert not [key for key in nulls if written[key] is None]
    LlamaConfig(**written)  # which takes no nulls there


@pytest.mark.parametrize("form", ["mistral", "pruned_llama"])
def test_the_window_of_a_mistral_stays(form):
    raw = tiny_config(
        model_type="mistral", sliding_window=64, layer_types=["sliding_attention"] * 3
    )
    config = parse_config(raw, "").with_shapes(tuple(SHAPES[form]))
    assert choose_form(config) == form
    assert choose_form(config.with_shapes(tuple(SHAPES["llama"]))) == "mistral"
    written = config_json(config, form)
    assert written["sliding_window"] == 64
    assert written["max_position_embeddings"] == 128
    assert "layer_types" not in written  # which would make a ministral of it
    assert parse_config(written, "").window == 64
