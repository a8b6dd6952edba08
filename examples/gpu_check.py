"""Parity and speed of every step that computes on a GPU, against the same step on the CPU.

    python examples/gpu_check.py MODEL TEXT [--samples 8] [--device gpu]

Runs the pipe on both, in float32, and prints a table: seconds, and how far the results differ.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from methods import prunetool
from safetensors.numpy import load_file

MOST = 1e-3  # relative difference that passes
LENGTH = 512


def timed(*words: object) -> tuple[float, str]:
    began = time.perf_counter()
    said = prunetool(*words)
    return time.perf_counter() - began, said


def stats(work: Path, kind: str) -> np.ndarray:
    """All sums of a kind of stats, in one array."""
    files = sorted(work.glob(f"stats/*.{kind}.safetensors"))
    arrays = [load_file(file) for file in files]
    return np.concatenate([x.ravel() for of in arrays for n, x in of.items() if n.endswith("gram")])


def kl(records: Path) -> np.ndarray:
    """Held-out KL before and after, of recover's records."""
    said = json.loads(records.read_text().splitlines()[1])["values"]["recover"]
    return np.array([said["kl_before"], said["kl_after"]])


def steps(model: Path, text: Path, samples: int, device: str, out: Path) -> dict:
    """Seconds of each step, and the numbers by which it is compared."""
    where = ("--device", device, "--dtype", "float32")
    tokens = ("--text", text, "--samples", samples, "--sequence-length", LENGTH)
    work, made = out / "work", {}
    results: dict[str, Callable[[str], np.ndarray]] = {
        "calibrate": lambda _: stats(work, "stats"),
        "gradients": lambda _: stats(work, "gradients"),
        "recover": lambda _: kl(out / "r.jsonl"),
        "evaluate": lambda said: np.array(json.loads(said)["loss"]),
    }
    calls = {
        "calibrate": ("calibrate", model, *tokens, *where, "--work", work, "-o", out / "a.jsonl"),
        "score": ("score", out / "a.jsonl", "--sparsity", 0.2, "-o", out / "b.jsonl"),
        "compensate": ("compensate", out / "b.jsonl", "-o", out / "c.jsonl"),
        "recover": ("recover", out / "c.jsonl", *where, "-o", out / "r.jsonl"),
        "export": ("export", out / "model", out / "r.jsonl"),
        "evaluate": ("evaluate", model, *tokens, *where),
    }
    for name, words in calls.items():
        seconds, said = timed(*words)
        made[name] = (seconds, results[name](said) if name in results else None)
    made["gradients"] = (float("nan"), results["gradients"](""))  # in calibrate's time
    return made


def compare(cpu: dict, gpu: dict, device: str) -> None:
    """Print the table; ends the program if results differ by more than `MOST`."""
    print(f"| step | cpu, s | {device}, s | times as fast | difference |")
    print("|---|---:|---:|---:|---:|")
    worst = 0.0
    for name, (seconds, expected) in cpu.items():
        other, result = gpu[name]
        shown = "–"
        if expected is not None:
            difference = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
            worst, shown = max(worst, difference), f"{difference:.1e}"
        print(f"| {name} | {seconds:.1f} | {other:.1f} | {seconds / other:.1f} | {shown} |")
    if worst > MOST:
        raise SystemExit(f"the results differ by up to {worst:.1e}, more than {MOST:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    given = parser.parse_args()
    found = []
    for device in ("cpu", given.device):
        with tempfile.TemporaryDirectory() as directory:
            found.append(steps(given.model, given.text, given.samples, device, Path(directory)))
    compare(*found, given.device)


if __name__ == "__main__":
    main()
