"""What transformers saves again is read again, here and there, as the same model."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

# Fails where torch is imported, as it does where there is none.
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from transformers import AutoConfig, AutoTokenizer
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(config).__name__, tokenizer("a").input_ids)
"""


def load(directory):
    return AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32
    )


def loss_of(model, token_ids):
    ids = torch.tensor(token_ids, dtype=torch.long)
    with torch.no_grad():
        return model(ids, labels=ids).loss.item()


@pytest.mark.parametrize("size", ["50GB", "40KB"], ids=["one file", "shards"])
def test_a_model_that_is_saved_again_and_again_stays_the_same(
    unequal, loss, token_ids, tmp_path, size
):
    expected, saved = loss(unequal), unequal
    for turn in range(2):
        model = load(saved)
        assert loss_of(model, token_ids) == pytest.approx(expected, abs=1e-5)
        saved = tmp_path / f"saved-{turn}"
        model.save_pretrained(saved, max_shard_size=size)
        assert {path.name for path in saved.glob("*.py")} == {
            "configuration_pruned_llama.py",
            "modeling_pruned_llama.py",
        }
        config = json.loads((saved / "config.json").read_text())
        assert "07" in config["per_layer_config"]
        assert config["auto_map"]["AutoModel"] == "modeling_pruned_llama.PrunedLlamaModel"
        assert loss(saved) == pytest.approx(expected, abs=1e-6)
    assert loss_of(load(saved), token_ids) == pytest.approx(expected, abs=1e-5)


def test_the_configuration_and_the_tokenizer_need_no_torch(unequal, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, unequal],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "PrunedLlamaConfig [64]"


def assert_a_cache_changes_no_text(directory, token_ids):
    model, prompt = load(directory), torch.tensor(token_ids, dtype=torch.long)[:2, :30]
    cached, whole = (
        model.generate(prompt, max_new_tokens=16, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    )
    assert cached.tolist() == whole.tolist()


def test_a_text_goes_on_with_a_cache_as_without(unequal, token_ids):
    assert_a_cache_changes_no_text(unequal, token_ids)
