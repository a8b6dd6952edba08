"""What the precision of the statistics changes: units kept, and perplexity.

    python examples/accuracy.py MODEL CALIBRATE.txt MEASURE.txt [--samples 8] [--sparsity 0.2]

The forward's products are bfloat16 or float32; a batch's Gram matrix is summed in bfloat16, float32
or float64 (the last is slow, and only here); stats are stored in float32 or float64. Each row is
scored by newton (global), refitted, exported and evaluated in float32 on the first samples of
MEASURE.txt; units kept are compared with those of the first row.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from methods import prunetool

from prunetool import cli, console, records
from prunetool.kept import kept_units
from prunetool.model import open_model
from prunetool.pruning import gram

LENGTH = 2048
# forward, Gram matrix of a batch, as stored
ROWS = [
    ("float32", "float64", "float64"),
    ("float32", "float32", "float32"),
    ("bfloat16", "float64", "float64"),
    ("bfloat16", "float32", "float64"),
    ("bfloat16", "float32", "float32"),
    ("bfloat16", "bfloat16", "float32"),
]


def summed_in(dtype: str) -> object:
    """`gram._product` with inputs as they are, and terms summed and returned in ``dtype``."""

    def product(x: object, y: object) -> object:
        batch = tuple(range(x.ndim - 2))
        kind = jnp.promote_types(x.dtype, dtype) if dtype == "float64" else x.dtype
        dimensions = (((x.ndim - 1,), (x.ndim - 1,)), (batch, batch))
        return lax.dot_general(
            x.astype(kind),
            y.astype(kind),
            dimensions,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.dtype(dtype),
        )

    return product


def kept(model: str, stream: Path) -> list[np.ndarray]:
    """The KV groups and channels of all layers, as masks."""
    shapes = open_model(model).config.layer_shapes
    with stream.open() as file:
        header, layers = records.read(file)
        units = [kept_units(Path(header.work), r, s) for r, s in zip(layers, shapes, strict=True)]
    return [np.concatenate([layer[target] for layer in units]) for target in ("heads", "channels")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibrate", type=Path)
    parser.add_argument("measure", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.2)
    given = parser.parse_args()
    console.setup_logging(-1)

    print("| forward | Gram matrix | stored | KV groups changed | channels changed | perplexity |")
    print("|---|---|---|---:|---:|---:|", flush=True)
    first = None
    own = gram._product
    for forward, summed, stored in ROWS:
        with tempfile.TemporaryDirectory() as directory:
            place = Path(directory)
            gram._product = own if summed == "float32" else summed_in(summed)
            jax.clear_caches()  # or what was compiled for the row before stays in use
            # In this process, for the line above to hold.
            words = [
                "-q", "calibrate", given.model, "--text", given.calibrate,
                "--samples", given.samples, "--held-out", max(1, given.samples // 8),
                "--sequence-length", LENGTH, "--dtype", forward,
                "--stats-dtype", stored, "--gradients", 0, "--work", place / "work",
                "-o", place / "stats.jsonl",
            ]  # fmt: skip
            cli.group.main([str(word) for word in words], standalone_mode=False)
            score, refit = place / "kept.jsonl", place / "refit.jsonl"
            prunetool(
                "score", place / "stats.jsonl", "--method", "newton", "--allocation", "global",
                "--sparsity", given.sparsity, "-o", score,
            )  # fmt: skip
            prunetool("compensate", score, "-o", refit)
            prunetool("export", place / "out", refit)
            loss = json.loads(
                prunetool(
                    "evaluate", place / "out", "--text", given.measure,
                    "--samples", given.samples, "--sequence-length", LENGTH, "--dtype", "float32",
                )
            )  # fmt: skip
            masks = kept(given.model, score)
        first = first or masks
        changed = [
            f"{int((a & ~b).sum())} of {int(a.sum()):,}" for a, b in zip(first, masks, strict=True)
        ]
        print(
            f"| {forward} | {summed} | {stored} | {' | '.join(changed)} | "
            f"{loss['perplexity']:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
