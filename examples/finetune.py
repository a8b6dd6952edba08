"""Fine-tune a model, pruned or not, by LoRA; merge, and save what prunetool and others load.

    pip install prunetool[test] peft
    python examples/finetune.py MODEL TEXT OUT [--steps 200] [--rank 16]

Adapters on the seven matrices of every layer are trained on windows of TEXT in float32, merged, and
saved in the dtype that MODEL has, with its tokenizer's files. OUT is measured and pruned again like
any checkpoint:

    prunetool evaluate OUT --text wiki.test.raw
    examples/pipe.sh OUT wiki.valid.raw OUT-pruned 0.1
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Copied: transformers 5 saves a tokenizer in a form that version 4 refuses, and no file for MLX-LM.
ALONG = ("*token*.json", "*.model", "vocab.json", "merges.txt", "*.jinja", "mlx_*.py", "LICENSE*")


def windows(tokenizer: Tokenizer, text: str, length: int) -> torch.Tensor:
    """The text's tokens, cut into windows, (n, length)."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    return ids[: len(ids) // length * length].view(-1, length)


def train(model: torch.nn.Module, data: torch.Tensor, args: argparse.Namespace) -> None:
    """AdamW, the rate falling linearly to 0, on batches in random order."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    random, losses = np.random.default_rng(args.seed), []
    for step in range(args.steps):
        batch = data[random.choice(len(data), args.batch)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        falling.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {np.mean(losses[-10:]):.4f}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype="auto")
    stored = model.dtype
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    data = windows(tokenizer, args.text.read_text(encoding="utf-8"), args.length)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=2 * args.rank, target_modules=MATRICES
    )
    adapted = get_peft_model(model.float(), lora)
    train(adapted, data, args)

    adapted.merge_and_unload().to(stored).save_pretrained(args.out)
    for pattern in ALONG:
        for path in args.model.glob(pattern):
            shutil.copy(path, args.out)


if __name__ == "__main__":
    main()
