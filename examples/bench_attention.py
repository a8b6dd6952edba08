"""Time and memory of a step on a layer's attention mask, against the same loss in torch autograd.

    python examples/bench_attention.py MODEL [--layer 10] [--sequences 2] [--lengths 256,…,2048]

Both descend on masks of W_q and W_k under the layer's own attention (causal, rotary, grouped), in
float32, on the same Gaussian inputs. Each side and length is a process of its own; the two take
turns. Memory is the peak above what the process held before its first step.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

STEPS = 5  # timed, behind one to warm up
COMMON = """
import json, resource, sys, time
import numpy as np
from prunetool.model import open_model
directory, layer, sequences, length, steps = sys.argv[1], *map(int, sys.argv[2:])
model = open_model(directory)
weights = [model.part(layer, part).astype(np.float32) for part in "qk"]
x = np.random.default_rng(0).standard_normal((model.config.hidden_size, sequences, length))
x *= model.part(layer, "input_norm").astype(np.float32)[:, None, None]  # as the norm leaves it
x, d = x.astype(np.float32), model.config.head_dim
def report(run):
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    before = peak()
    loss = run(1)
    started = time.monotonic()
    loss = run(steps)
    seconds = (time.monotonic() - started) / steps
    print(json.dumps({"seconds": seconds, "mb": peak() - before, "loss": loss}))
"""
OURS = """
import jax, jax.numpy as jnp
from prunetool.pruning import attention_loss as al
from prunetool.steps.attention import turn_of
turn, w = turn_of(model, length), tuple(map(jnp.asarray, weights))
inputs = al.AttentionInputs(jnp.asarray(x), None, None)
dense = al.queries_keys(turn, w, inputs)
M = tuple(0.9 * jnp.ones_like(W) for W in w)
one = lambda M: al.descend_mask(turn, M, w, inputs, dense, jnp.float32(0), jnp.float32(1), steps=1)
def run(count):
    global M
    for _ in range(count):
        M, losses = one(M)
    return float(losses[-1])
report(run)
"""
THEIRS = """
import torch
torch.set_flush_denormal(True)  # as XLA does
from prunetool.streaming import rotation
c, s = (torch.tensor(np.asarray(part)) for part in rotation(model, length))
W = [torch.tensor(part) for part in weights]
X = torch.tensor(x)
seen = torch.ones(length, length, dtype=torch.bool).tril()
def rotate(z):
    a, b = z.reshape(-1, 2, d // 2, sequences, length).unbind(1)
    c_, s_ = c[None, :, None], s[None, :, None]
    return torch.cat([a * c_ - b * s_, b * c_ + a * s_], 1)
def attention(M):
    q, k = (rotate(torch.einsum("od,dbn->obn", m * w, X)) for m, w in zip(M, W))
    k = k.repeat_interleave(len(q) // len(k), 0)
    S = torch.einsum("hdbn,hdbm->bhnm", q * d**-0.5, k)
    return S.masked_fill(~seen, -torch.inf).softmax(-1)
with torch.no_grad():
    P = attention([torch.ones_like(w) for w in W])
M = [(0.9 * torch.ones_like(w)).requires_grad_() for w in W]
def run(count):
    for _ in range(count):
        loss = 0.5 * (attention(M) - P).square().sum() / (P.numel() / length)
        for m, g in zip(M, torch.autograd.grad(loss, M)):
            m.data -= g
    return float(loss.detach())
report(run)
"""


def side(script: str, *words: object) -> dict[str, float]:
    command = [sys.executable, "-c", COMMON + script, *map(str, words)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    return json.loads(done.stdout)


def exponent(lengths: list[int], values: list[float]) -> float:
    """Slope between the first and the last, both logarithmic."""
    return math.log(values[-1] / values[0]) / math.log(lengths[-1] / lengths[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--layer", type=int, default=10)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--lengths", default="256,512,1024,2048")
    given = parser.parse_args()
    lengths = [int(length) for length in given.lengths.split(",")]
    found = []
    print(
        f"attention mask, layer {given.layer}, {given.sequences} sequences: a step and its memory"
    )
    for length in lengths:
        words = (given.model, given.layer, given.sequences, length, STEPS)
        ours, theirs = side(OURS, *words), side(THEIRS, *words)
        if not math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-3):
            raise SystemExit(f"the losses differ: {ours['loss']} and {theirs['loss']}")
        found.append((ours, theirs))
        print(
            f"N {length:5}: prunetool {ours['seconds'] * 1e3:7.0f} ms {ours['mb']:6.0f} MB; torch "
            f"{theirs['seconds'] * 1e3:7.0f} ms {theirs['mb']:6.0f} MB; ratio: time "
            f"{ours['seconds'] / theirs['seconds']:.2f}, memory {ours['mb'] / theirs['mb']:.2f}",
            flush=True,
        )
    for name, one in (("prunetool", 0), ("torch", 1)):
        time, memory = (
            exponent(lengths, [pair[one][key] for pair in found]) for key in ("seconds", "mb")
        )
        print(f"{name}: time grows as N^{time:.2f}, memory as N^{memory:.2f}")


if __name__ == "__main__":
    main()
