"""What the BOS token does to a model that was trained with one.

    python examples/bos.py TRAIN MEASURE [--seeds 3] [--steps 300]

Trains byte-level Llamas of 0.9 million parameters on windows of TRAIN that begin with BOS, one per
seed, and gives the perplexity of MEASURE by `prunetool evaluate --bos never|always|auto`, mean and
standard deviation over the seeds. Needs the test extra (torch, transformers).
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

from prunetool.cli import group

BOS = 256
LENGTH = 256  # of a window in training, BOS in it
BATCH = 16


def byte_tokenizer() -> Tokenizer:
    """Every byte a token, and BOS before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def train(text: str, steps: int, seed: int) -> LlamaForCausalLM:
    """A model of ``steps`` batches of windows that begin with BOS."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=BOS + 1, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=BOS, eos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    tokenizer, random = byte_tokenizer(), np.random.default_rng(seed)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    for _ in range(steps):
        starts = random.integers(0, len(ids) - LENGTH, BATCH)
        batch = np.stack([[BOS, *ids[start : start + LENGTH - 1]] for start in starts])
        batch = torch.tensor(batch)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def perplexity(model: Path, text: Path, bos: str, length: int) -> float:
    """As `prunetool evaluate` gives it, on 8,192 tokens."""
    done = CliRunner().invoke(group, [
        "evaluate", str(model), "--text", str(text), "--bos", bos, "--dtype", "float32",
        "--samples", str(8192 // length), "--sequence-length", str(length),
    ], catch_exceptions=False)  # fmt: skip
    return float(json.loads(done.stdout)["perplexity"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("measure", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    found: dict[tuple[int, str], list[float]] = {}
    for seed in range(given.seeds):
        with tempfile.TemporaryDirectory() as directory:
            train(given.train.read_text(), given.steps, seed).save_pretrained(directory)
            byte_tokenizer().save(f"{directory}/tokenizer.json")
            for length in (32, LENGTH):
                for bos in ("never", "always", "auto"):
                    value = perplexity(Path(directory), given.measure, bos, length)
                    found.setdefault((length, bos), []).append(value)
    for (length, bos), values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{length} tokens, --bos {bos}: {statistics.mean(values):.4f} ± {spread:.4f}")


if __name__ == "__main__":
    main()
