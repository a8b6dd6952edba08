"""Parity of calibrate, recover and evaluate on a GPU with the CPU, and speed of those and others.

    python examples/gpu_check.py MODEL TEXT [--samples 8] [--device gpu]

Runs the pipe on both, in float32, and prints a row for each step as it is done: seconds, and how
far the results differ.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from methods import prunetool
from safetensors.numpy import load_file

MOST = 1e-3  # relative difference that passes
LENGTH = 512
HOW = ("--sparsity", 0.2, "--method", "wanda-sp", "--allocation", "uniform")


def timed(*words: object) -> tuple[float, str]:
    began = time.perf_counter()
    said = prunetool(*words)
    return time.perf_counter() - began, said


def stats(work: Path, kind: str) -> np.ndarray:
    """All sums of a kind of stats, in one array."""
    files = sorted(work.glob(f"stats/*.{kind}.safetensors"))
    arrays = [load_file(file) for file in files]
    return np.concatenate([x.ravel() for of in arrays for n, x in of.items() if n.endswith("gram")])


def kl(work: Path) -> np.ndarray:
    """The held-out KL each time that recover measured it."""
    (progress,) = work.glob("recover-*/progress.json")
    return np.array([loss for _, loss in json.loads(progress.read_text())["kl"]])


def steps(model: Path, text: Path, samples: int, device: str, out: Path) -> dict[str, tuple]:
    """The command of each step on a device, and what reads the numbers that it is compared by."""
    where = ("--device", device, "--dtype", "float32")
    tokens = ("--text", text, "--samples", samples, "--sequence-length", LENGTH)
    stream = [out / f"{step}.jsonl" for step in ("calibrate", "score", "compensate", "recover")]
    work = out / "work"
    return {
        "calibrate": (
            ("calibrate", model, *tokens, *where, "--work", work, "-o", stream[0]),
            lambda _: [stats(work, "stats"), stats(work, "gradients")],
        ),
        # The same count in every layer: recover then compiles one size.
        "score": (("score", stream[0], *HOW, "-o", stream[1]), None),
        "compensate": (("compensate", stream[1], "-o", stream[2]), None),
        "recover": (
            ("recover", stream[2], "--samples", 4, *where, "-o", stream[3]),
            lambda _: [kl(work)],
        ),
        "evaluate": (
            ("evaluate", model, *tokens, *where, "--allow-calibrated"),
            lambda said: [np.array(json.loads(said)["loss"])],
        ),
    }


def compare(cpu: dict[str, tuple], gpu: dict[str, tuple], device: str) -> None:
    """Run step by step and print a row each; exits if results differ by more than `MOST`."""
    print(f"| step | cpu, s | {device}, s | times as fast | difference |")
    print("|---|---:|---:|---:|---:|", flush=True)
    worst = 0.0
    for name, (command, numbers) in cpu.items():
        seconds, said = timed(*command)
        other, other_said = timed(*gpu[name][0])
        shown = "–"
        if numbers is not None:
            pairs = zip(numbers(said), gpu[name][1](other_said), strict=True)
            difference = max(
                float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
                for expected, result in pairs
            )
            worst, shown = max(worst, difference), f"{difference:.1e}"
        row = f"| {name} | {seconds:.1f} | {other:.1f} | {seconds / other:.1f} | {shown} |"
        print(row, flush=True)
    if worst > MOST:
        raise SystemExit(f"the results differ by up to {worst:.1e}, more than {MOST:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        compare(
            steps(given.model, given.text, given.samples, "cpu", Path(a)),
            steps(given.model, given.text, given.samples, given.device, Path(b)),
            given.device,
        )


if __name__ == "__main__":
    main()
