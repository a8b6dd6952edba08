"""A pruned_llama checkpoint of twelve unequal layers, as export leaves it."""

import json
from importlib import resources

import numpy as np
import pytest

from prunetool.llama.config import LayerShape, parse_config
from prunetool.llama.forms import LOADER_FILES, config_json
from tests.conftest import tiny_config, write_checkpoint

SHAPES = [LayerShape(4, 2, 96), LayerShape(2, 1, 64), LayerShape(4, 2, 32)] * 4
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "plain": {"rope_theta": 500000.0},
    "llama3 rope, tied, biased": {
        "rope_theta": 500000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True,
        "attention_bias": True, "mlp_bias": True,
    },
    "mistral, window": {"model_type": "mistral", "sliding_window": 16},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3, window": {
        "model_type": "qwen3", "head_dim": 24, "use_sliding_window": True, "sliding_window": 16,
        "max_window_layers": 0,
    },
}  # fmt: skip


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def unequal(request, tmp_path):
    config = parse_config(tiny_config(num_hidden_layers=12, **request.param), "")
    config = config.with_shapes(tuple(SHAPES))
    directory = write_checkpoint(tmp_path / "unequal", config_json(config, "pruned_llama"))
    for name in LOADER_FILES:
        (directory / name).write_bytes(
            resources.files("prunetool.loaders").joinpath(name).read_bytes()
        )
    return directory


@pytest.fixture
def token_ids(tmp_path):
    """Four sequences of 48 token ids, and the file that they are in."""
    ids = np.random.default_rng(3).integers(0, 250, (4, 48), np.int32)
    np.save(tmp_path / "ids.npy", ids)
    return ids


@pytest.fixture
def loss(call, token_ids, tmp_path):
    """What ``evaluate`` says of a directory on `token_ids`."""

    def measure(directory):
        words = ["--tokens", tmp_path / "ids.npy", "--sequence-length", 48, "--dtype", "float32"]
        return json.loads(call("evaluate", "--allow-calibrated", directory, *words))["loss"]

    return measure
