"""Time and peak memory of calibrate against transformers with hooks, on the same tokens.

    python examples/bench.py MODEL TEXT [--samples 8] [--sequence-length 2048] [--rounds 3]

Both make the Gram matrices of the inputs of o_proj and down_proj of every layer from bfloat16
activations, as float32 products added in float64. They run in turn, each as a process of its own,
and what is printed is the median ratio of the rounds and the largest peak of each.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# The judge keeps no layer's hidden states and no logits; the sums are the only thing it keeps.
HOOKS = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).model
sums = {}
def hook(name):
    def add(module, given):
        x = given[0].reshape(-1, given[0].shape[-1]).float()
        if name not in sums:
            sums[name] = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        sums[name] += x.T @ x
    return add
for i, layer in enumerate(model.layers):
    layer.self_attn.o_proj.register_forward_pre_hook(hook((i, "o")))
    layer.mlp.down_proj.register_forward_pre_hook(hook((i, "down")))
with torch.no_grad():
    for ids in torch.tensor(numpy.load(sys.argv[2]).astype("int64")):
        model(ids[None], use_cache=False)
"""


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MB of a process."""
    started = time.monotonic()
    child = os.posix_spawn(
        command[0],
        command,
        {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        file_actions=[(os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)],
    )
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command[:4])}")
    return time.monotonic() - started, usage.ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()

    from prunetool import corpus
    from prunetool.model import open_model

    config = open_model(str(given.model)).config
    text = corpus.Text([given.text], length=given.sequence_length)
    tokens, _ = text.load(given.model, config.vocab_size, given.samples)
    with tempfile.TemporaryDirectory() as directory:
        ids, work = f"{directory}/ids.npy", f"{directory}/work"
        np.save(ids, tokens)
        ours = [
            sys.executable, "-m", "prunetool", "-q", "calibrate", str(given.model), "--tokens", ids,
            "--samples", str(given.samples), "--sequence-length", str(given.sequence_length),
            "--gradients", "0", "-o", f"{directory}/stats.jsonl", "--overwrite", "--work",
        ]  # fmt: skip
        theirs = [sys.executable, "-c", HOOKS, str(given.model), ids]
        results = [(measure([*ours, f"{work}-{n}"]), measure(theirs)) for n in range(given.rounds)]
    ratios = [a[0] / b[0] for a, b in results]
    print(f"{tokens.size:,} tokens, {given.rounds} rounds")
    for name, runs in zip(
        ("prunetool calibrate", "transformers + hooks"), zip(*results, strict=True), strict=True
    ):
        seconds, peaks = zip(*runs, strict=True)
        print(f"{name:22}{statistics.median(seconds):8.1f} s   peak {max(peaks):7.0f} MB")
    print(f"time ratio: median {statistics.median(ratios):.2f} of {sorted(ratios)}")
    memory = max(a[1] for a, _ in results) / max(b[1] for _, b in results)
    print(f"peak memory ratio: {memory:.2f}")


if __name__ == "__main__":
    main()
