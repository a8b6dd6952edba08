"""How near the steps come to what this machine can do, and how their cost grows.

    python examples/bench_speed.py [--tokens 8192] [--directory DIR]

On a random checkpoint of three layers of Llama-2-7B's shape: arithmetic per second of calibrate
(start and compilation left out), score and compensate over the machine's own matrix products, which
are measured between the layers or right before and after. Then the paper's Algorithm 1 against its
closed form, checksums, and the growth of calibrate with tokens, layers and width on small shapes.
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from methods import prunetool
from synthetic import SHAPES, make_checkpoint

from prunetool import console, devices, plan, streaming
from prunetool.model import Model, open_model
from prunetool.profiling import Profile
from prunetool.pruning import newton
from prunetool.steps.calibrate import AttentionSamples, Calibration, Precision

LENGTH = 2048
SPARSITY, DAMPING = 0.2, 0.1


def best(work: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of the best of some rounds, after one to warm up."""
    work()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def bfloat16_peak(size: int = 4096) -> float:
    """Operations a second of a square product of jnp's, bfloat16 in and float32 out."""
    A = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda A: jnp.matmul(A, A, preferred_element_type=jnp.float32))
    return 2 * size**3 / best(lambda: product(A).block_until_ready())


def float64_peak(size: int = 4096) -> float:
    """The same of NumPy in float64."""
    A = np.ones((size, size))
    return 2 * size**3 / best(lambda: A @ A, 2)


def seconds_a_layer(
    layers: Iterable[object], between: Callable[[], object] = lambda: None
) -> list[float]:
    """Wall seconds of each layer but the first, which compiles.

    Args:
      layers: what does a layer's work when it gives the layer.
      between: is called after each layer, out of its time.
    """
    seconds, started = [], time.perf_counter()
    for _ in layers:
        seconds.append(time.perf_counter() - started)
        between()
        started = time.perf_counter()
    return seconds[1:]


def calibration(model: Model, samples: int, length: int, work: Path) -> Calibration:
    """A calibration in an empty work directory."""
    tokens = np.random.default_rng(0).integers(
        0, model.config.vocab_size, (samples, length), np.int32
    )
    work.mkdir()
    return Calibration(
        model, tokens, samples // 4, "structural", Precision("bfloat16", "float32", "bfloat16"),
        work, AttentionSamples(0, 0), tokens[:0], streaming.batch_size(length), 0,
        devices.start("auto"), Profile(None), {}, "model",
    )  # fmt: skip


def achieved(directory: Path, tokens: int) -> None:
    """Arithmetic a second of the steps over the machine's own."""
    make_checkpoint(
        directory / "wide", {**SHAPES["llama-2-7b"], "num_hidden_layers": 3, "vocab_size": 1024}
    )
    model = open_model(str(directory / "wide"))
    work, layers = directory / "work", model.layers
    job = calibration(model, tokens // LENGTH, LENGTH, work)

    def line(step: str, arithmetic: float, seconds: list[float], *peaks: list[float]) -> None:
        rate = arithmetic / layers / statistics.mean(seconds)
        shares = (
            f"{rate / statistics.mean(peak):.0%} of {statistics.mean(peak) / 1e9:.0f}"
            for peak in peaks
        )
        print(
            f"{step:11}{arithmetic / layers / 1e12:7.2f} TFLOP a layer in "
            f"{statistics.mean(seconds):.1f} s: {rate / 1e9:.0f} GFLOP/s, {', '.join(shares)}",
            flush=True,
        )

    print(
        "products, bfloat16 (GFLOP/s):",
        ", ".join(f"{size}: {bfloat16_peak(size) / 1e9:.0f}" for size in (1024, 2048, 4096)),
        flush=True,
    )
    wide, narrow = [], []

    def measure_peaks() -> None:
        wide.append(bfloat16_peak())
        narrow.append(bfloat16_peak(2048))

    seconds = seconds_a_layer(job.layers(), measure_peaks)
    need = plan.calibrate(model, tokens // LENGTH, LENGTH, job.batch, "structural", "float32")
    line("calibrate", need.products, seconds, wide, narrow)  # as wide as the model, the fastest

    # The other steps cost the same whatever the tokens, and compile nothing: as a user runs them.
    stats, kept, refitted = (directory / f"{name}.jsonl" for name in ("stats", "kept", "refitted"))
    few = np.random.default_rng(1).integers(0, model.config.vocab_size, (3, 256), np.int32)
    np.save(directory / "few.npy", few)
    prunetool(
        "calibrate", model.directory, "--tokens", directory / "few.npy", "--samples", 3,
        "--held-out", 1, "--sequence-length", 256, "--work", directory / "few.prunetool",
        "-o", stats,
    )  # fmt: skip
    for step, arithmetic, words in (
        ("score", plan.score(model, "float32").solves, [stats, "-o", kept, "--sparsity", SPARSITY]),
        (
            "compensate",
            plan.compensate(model, SPARSITY, 1).solves,
            [kept, "-o", refitted, "--damping", DAMPING],
        ),
    ):
        before, started = float64_peak(), time.perf_counter()
        prunetool(step, *words)
        seconds = [(time.perf_counter() - started) / layers]
        line(step, arithmetic, seconds, [before, float64_peak()])


def closed_form(size: int = 4096) -> None:
    """Newton's Algorithm 1, 50 steps, against the closed form: time and result."""
    X = np.random.default_rng(0).standard_normal((2 * size, size))
    W = np.random.default_rng(1).standard_normal((size, 256))
    K = newton.contribution_gram(W, X.T @ X, newton.spectral_norm(X.T @ X))
    K = np.tril(K) + np.tril(K, -1).T
    given = {"lam": 1.0, "damping": 1e-4}

    def timed(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
        started = time.perf_counter()
        z = work()
        return time.perf_counter() - started, z

    closed, z = min(
        (timed(lambda: newton.newton(K, 0.2 * size, **given)) for _ in range(3)),
        key=lambda found: found[0],
    )
    iterated, other = timed(lambda: newton.newton_iterated(K, 0.2 * size, steps=50, **given))
    print(
        f"Algorithm 1, 50 steps, D = {size}: {iterated:.1f} s; closed form {closed:.2f} s: "
        f"{iterated / closed:.0f} times faster, largest difference {np.abs(z - other).max():.1e}",
        flush=True,
    )


def hashing(size_bytes: int = 200_000_000) -> None:
    """The checksum that tensors have against the usual one."""
    data = np.random.default_rng(0).bytes(size_bytes)
    xxh3 = size_bytes / best(lambda: xxhash.xxh3_128(data)) / 1e9
    sha256 = size_bytes / best(lambda: hashlib.sha256(data)) / 1e9
    print(f"checksums: XXH3-128 {xxh3:.1f} GB/s, SHA-256 {sha256:.1f} GB/s", flush=True)


def growth(directory: Path) -> None:
    """Exponents of calibrate's time against tokens, layers and width."""

    def shape(width: int, layers: int) -> dict[str, object]:
        return {
            "hidden_size": width, "intermediate_size": 11 * width // 4, "vocab_size": 512,
            "num_attention_heads": width // 64, "num_key_value_heads": width // 64,
            "num_hidden_layers": layers, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
        }  # fmt: skip

    def seconds(name: str, width: int, layers: int, samples: int) -> float:
        make_checkpoint(directory / name, shape(width, layers))
        job = calibration(
            open_model(str(directory / name)), samples, 512, directory / f"{name}.work"
        )
        return sum(seconds_a_layer(job.layers()))

    sweeps = {
        "tokens": ([4, 8, 16, 32], lambda v: seconds(f"t{v}", 512, 5, v * 4)),
        "layers": ([3, 5, 9, 17], lambda v: seconds(f"l{v}", 512, v, 16)),
        "width": ([512, 1024, 2048], lambda v: seconds(f"w{v}", v, 3, 16)),
    }
    for name, (values, cost) in sweeps.items():
        times = [cost(value) for value in values]
        counted = np.array(values) - (name == "layers")  # the first layer is not timed
        exponent = np.polyfit(np.log(counted), np.log(times), 1)[0]
        shown = ", ".join(f"{v}: {t:.2f} s" for v, t in zip(values, times, strict=True))
        print(f"calibrate grows with {name}^{exponent:.2f} ({shown})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--directory", type=Path, help="for the checkpoints, 4 GB")
    given = parser.parse_args()
    console.setup_logging(-1)
    with tempfile.TemporaryDirectory(dir=given.directory) as directory:
        achieved(Path(directory), given.tokens)
        closed_form()
        hashing()
        growth(Path(directory))


if __name__ == "__main__":
    main()
