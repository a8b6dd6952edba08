"""What export writes, in every program that is here: the table of examples/formats.md.

A row is a program and what it does; a column is a format. `make loaders` also runs the rows that
need heavy packages: lm-evaluation-harness, and vLLM in an environment of its own, whose Python
PRUNETOOL_VLLM names.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from prunetool import cli
from tests.conftest import tiny_config, write_checkpoint
from tests.loaders.test_llamacpp import Judge, with_merges
from tests.loaders.test_mlx import assert_a_cache_changes_nothing, loss_in_mlx
from tests.loaders.test_transformers import assert_a_cache_changes_no_text, load, loss_of

COLUMNS = {
    "alike": ["--allocation", "uniform"],
    "unequal": ["--allocation", "global"],
    "zeros in the original shapes": ["--allocation", "global", "--format", "dense"],
}
EXAMPLES = Path(__file__).parents[2] / "examples"
IDS = np.random.default_rng(3).integers(0, 250, (4, 48), np.int32)


def prunetool(*words):
    cli.group.main([str(word) for word in words], standalone_mode=False)


def measured(directory, capsys):
    np.save(directory / "ids.npy", IDS)
    capsys.readouterr()
    prunetool("evaluate", directory, "--tokens", directory / "ids.npy", "--sequence-length", 48,
              "--dtype", "float32")  # fmt: skip
    return json.loads(capsys.readouterr().out)["loss"]


@pytest.fixture(scope="module", params=COLUMNS.values(), ids=COLUMNS)
def out(request, tmp_path_factory):
    """A directory as export wrote it."""
    here = tmp_path_factory.mktemp("loaders")
    config = tiny_config(
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
    )
    dense = with_merges(write_checkpoint(here / "dense", config))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
    }
    (dense / "tokenizer_config.json").write_text(json.dumps(named))
    words = iter(request.param)
    score = [next(words), next(words)]
    random = np.random.default_rng(1)
    np.save(here / "ids.npy", random.integers(0, 250, (8, 32), np.int32))
    prunetool("calibrate", here / "dense", "--tokens", here / "ids.npy", "--samples", 8,
              "--sequence-length", 32, "--gradients", 0, "--work", here / "w",
              "-o", here / "stats.jsonl")  # fmt: skip
    prunetool("score", here / "stats.jsonl", "--sparsity", ".3", "--method", "newton", *score,
              "--multiple-of", 8, "-o", here / "kept.jsonl")  # fmt: skip
    prunetool("export", here / "out", here / "kept.jsonl", *words)
    return here / "out"


def logits_in_transformers(out, capsys, tmp_path):
    assert loss_of(load(out), IDS) == pytest.approx(measured(out, capsys), abs=1e-5)


def greedy_with_a_cache(out, capsys, tmp_path):
    assert_a_cache_changes_no_text(out, IDS)


def left_padding(out, capsys, tmp_path):
    model, ids = load(out), torch.tensor(IDS, dtype=torch.long)
    rows = torch.stack([ids[0, :30], torch.cat([torch.zeros(10, dtype=torch.long), ids[1, :20]])])
    mask = torch.ones_like(rows)
    mask[1, :10] = 0
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    both = model.generate(rows, attention_mask=mask, **how)
    for row, alone in zip(both, (ids[:1, :30], ids[1:2, :20]), strict=True):
        assert row[-12:].tolist() == model.generate(alone, **how)[0, -12:].tolist()


def saved_and_loaded_again(out, capsys, tmp_path):
    load(out).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(out, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    assert loss_of(load(tmp_path / "saved"), IDS) == pytest.approx(loss_of(load(out), IDS))
    assert measured(tmp_path / "saved", capsys) == pytest.approx(measured(out, capsys), abs=1e-6)


def lora_trained_and_merged(out, capsys, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not here")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"])
    model = peft.get_peft_model(load(out), config)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    ids = torch.tensor(IDS, dtype=torch.long)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    assert measured(tmp_path / "tuned", capsys) < losses[0] - 0.01


def logits_in_mlx(out, capsys, tmp_path):
    assert loss_in_mlx(out, IDS) == pytest.approx(measured(out, capsys), abs=1e-5)


def a_cache_in_mlx(out, capsys, tmp_path):
    assert_a_cache_changes_nothing(out, IDS)


def logits_and_greedy_in_llama_cpp(out, capsys, tmp_path):
    prunetool("convert", out, tmp_path / "out.gguf", "--type", "f32")
    judge, model = Judge(tmp_path / "out.gguf"), load(out)
    ids = judge.continued(IDS[0, :20], 64)
    with torch.no_grad():
        ours = model(torch.tensor(ids[None])).logits[0].numpy()
    np.testing.assert_allclose(judge.logits(ids), ours, atol=2e-5 * np.abs(ours).max())
    assert (ours[19:-1].argmax(1) == ids[20:]).all()


def accuracy_in_lm_eval(out, capsys, tmp_path):
    """A task of our own, offline: the accuracy that evaluate --choices finds."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not here; make loaders")
    words = ["the", "he", "then", "them", "there", "hat", "that", "mouth", "heat", "other"]
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(words, 60)) for _ in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    script = [EXAMPLES / "cloze.py", tmp_path / "text.txt", tmp_path / "cloze.jsonl"]
    subprocess.run([sys.executable, *script, "--items", "40"], check=True)
    task = (EXAMPLES / "cloze.yaml").read_text()
    (tmp_path / "cloze.yaml").write_text(task.replace("cloze.jsonl", str(tmp_path / "cloze.jsonl")))
    done = subprocess.run(
        [Path(sys.executable).with_name("lm_eval"), "run", "--model", "hf", "--model_args",
         f"pretrained={out},trust_remote_code=True,dtype=float32", "--include_path", tmp_path,
         "--tasks", "cloze", "--device", "cpu", "--output_path", tmp_path / "found"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "found").rglob("results*.json")
    found = json.loads(file.read_text())["results"]["cloze"]["acc,none"]
    np.save(tmp_path / "ids.npy", IDS)
    capsys.readouterr()
    prunetool("evaluate", out, "--tokens", tmp_path / "ids.npy", "--sequence-length", 48,
              "--dtype", "float32", "--choices", tmp_path / "cloze.jsonl")  # fmt: skip
    ours = json.loads(capsys.readouterr().out)
    assert ours["items"] == 40
    assert found == pytest.approx(ours["accuracy"])


def greedy_in_vllm(out, capsys, tmp_path):
    python = os.environ.get("PRUNETOOL_VLLM")
    if not python:
        pytest.skip("vLLM is not here; make loaders")
    prompt = IDS[0, :20].tolist()
    script = Path(__file__).with_name("vllm_greedy.py")
    done = subprocess.run(
        [python, script, out, json.dumps(prompt), "16"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    how = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ours = load(out).generate(torch.tensor([prompt]), **how)[0, 20:]
    assert json.loads(done.stdout.splitlines()[-1]) == ours.tolist()


ROWS = {
    "transformers: logits": logits_in_transformers,
    "transformers: greedy text with a cache as without": greedy_with_a_cache,
    "transformers: left padding": left_padding,
    "transformers: saved and loaded again": saved_and_loaded_again,
    "peft: LoRA trained and merged": lora_trained_and_merged,
    "MLX-LM: logits": logits_in_mlx,
    "MLX-LM: text with a cache as without": a_cache_in_mlx,
    "llama.cpp, by `convert`: logits and 64 greedy tokens": logits_and_greedy_in_llama_cpp,
    "lm-evaluation-harness: accuracy as of `evaluate --choices`": accuracy_in_lm_eval,
    "vLLM 0.32, on a CPU: greedy text as in transformers": greedy_in_vllm,
}
HEAVY = (accuracy_in_lm_eval, greedy_in_vllm)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # in peft
@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.loaders if ROWS[row] in HEAVY else ()) for row in ROWS],
)
def test_cell(row, out, capsys, tmp_path):
    ROWS[row](out, capsys, tmp_path)


def test_the_page_has_this_table():
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    lines += [f"| {row} | {' | '.join(['yes'] * len(COLUMNS))} |" for row in ROWS]
    assert "\n".join(lines) in (EXAMPLES / "formats.md").read_text()
