"""The loader for MLX-LM computes what is computed here."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

mx = pytest.importorskip("mlx.core", reason="mlx is not here")
utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not here")
make_prompt_cache = pytest.importorskip("mlx_lm.models.cache").make_prompt_cache


def loss_in_mlx(directory, token_ids):
    model, _ = utils.load_model(directory, trust_remote_code=True)
    logits = np.array(model(mx.array(token_ids)).astype(mx.float32)).astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(likely[:, :-1], token_ids[:, 1:, None], -1).mean()


def test_a_model_of_unequal_layers_is_the_same_in_mlx(unequal, loss, token_ids):
    assert loss_in_mlx(unequal, token_ids) == pytest.approx(loss(unequal), abs=1e-5)


def test_a_model_that_transformers_saved_again_is_the_same_in_mlx(
    unequal, loss, token_ids, tmp_path
):
    model = AutoModelForCausalLM.from_pretrained(
        unequal, trust_remote_code=True, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "saved")
    shutil.copy(unequal / "mlx_pruned_llama.py", tmp_path / "saved")  # which is not torch's
    assert loss_in_mlx(tmp_path / "saved", token_ids) == pytest.approx(loss(unequal), abs=1e-5)


def assert_a_cache_changes_nothing(directory, token_ids):
    model, _ = utils.load_model(directory, trust_remote_code=True)
    ids = mx.array(token_ids[:2])
    cache = make_prompt_cache(model)
    parts = [model(ids[:, :30], cache), *(model(ids[:, i : i + 1], cache) for i in range(30, 48))]
    np.testing.assert_allclose(
        np.array(mx.concatenate(parts, axis=1)), np.array(model(ids)), atol=1e-4
    )


def test_a_text_goes_on_with_a_cache_as_without(unequal, token_ids):
    assert_a_cache_changes_nothing(unequal, token_ids)
