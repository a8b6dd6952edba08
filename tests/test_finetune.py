"""A pruned model, fine-tuned by LoRA and saved by transformers, is measured and pruned again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="peft is not here; pip install peft")

SCRIPT = Path(__file__).parents[1] / "examples/finetune.py"


def prune(call, model, text, out):
    call("calibrate", model, "--text", text, "--samples", 8, "--sequence-length", 32,
         "--work", f"{out}.work", "-o", "stats.jsonl")  # fmt: skip
    call("score", "stats.jsonl", "--sparsity", ".2", "--multiple-of", 8, "-o", "kept.jsonl")
    call("export", out, "kept.jsonl")


def loss(call, model, text):
    words = ["--text", text, "--sequence-length", 64, "--dtype", "float32"]
    return json.loads(call("evaluate", "--allow-calibrated", model, *words))["loss"]


def test_a_pruned_model_is_fine_tuned_measured_and_pruned_again(checkpoint, text, call, tmp_path):
    model = checkpoint(
        num_hidden_layers=11, num_attention_heads=8, num_key_value_heads=4, head_dim=8
    )
    prune(call, model, text, tmp_path / "pruned")
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "pruned", text, tmp_path / "tuned", "--steps", "20",
         "--batch", "8", "--length", "64", "--rank", "4", "--rate", "0.01"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "tuned/config.json").read_text())
    assert (config["model_type"], "10" in config["per_layer_config"]) == ("pruned_llama", True)
    assert (tmp_path / "tuned/mlx_pruned_llama.py").exists()
    assert loss(call, tmp_path / "tuned", text) < loss(call, tmp_path / "pruned", text) - 0.5

    prune(call, tmp_path / "tuned", text, tmp_path / "again")
    parameters = [
        json.loads(call("inspect", tmp_path / name))["parameters"]
        for name in ("pruned", "tuned", "again")
    ]
    assert parameters[0] == parameters[1] > parameters[2]
