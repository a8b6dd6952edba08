"""Perplexity on two texts at several sparsities, from several parts of the calibration text.

    python examples/quality.py MODEL CALIBRATION_TEXT TEST_TEXT OTHER_TEXT examples/quality.csv

Calibrates on 64 x 1024 tokens at random places of the text (and 8 x 1024 held out) for each seed,
and measures on the first 8 x 2048 tokens of TEST_TEXT, of the same kind, and of OTHER_TEXT, of
another kind; all in float32, which is faster on CPUs without instructions for bfloat16. A row is
added to the CSV as it is done, and a row that is there is not made again.
With --table it prints the CSV as Markdown: the mean over the seeds ± half their range.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

from methods import SPARSITIES, append, prunetool, read

SEEDS = ("0", "1", "2")
# What score is given, and what recover is: None leaves it out.
SETTINGS = {
    "the paper (newton, global)": (["--published"], None),
    "wanda-sp, weighted tokens": (
        ["--method", "wanda-sp", "--allocation", "global", "--weighting", "token"],
        None,
    ),
    "newton, by loss": (["--method", "newton"], None),
    "default (greedy, by loss)": ([], None),
    "default, recover --what norms": ([], ["--what", "norms", "--samples", 16]),
    "default, recover": ([], []),
}
COLUMNS = ["setting", "seed", "sparsity", "test", "other", "predicted", "seconds"]
DENSE = ("dense", "-", "0")
DTYPE = ("--dtype", "float32")


def perplexity(model: Path, text: Path) -> float:
    return float(
        json.loads(prunetool("evaluate", model, "--text", text, "--samples", 8, *DTYPE))[
            "perplexity"
        ]
    )


def predicted(path: Path) -> str:
    """The predicted loss in nats, from the records of score."""
    layers = [json.loads(line) for line in path.read_text().splitlines()[1:-1]]
    nats = [sum(layer["values"].get("nats", {}).values()) for layer in layers]
    return f"{sum(nats):.4f}" if any(nats) else ""


def measure(stats: Path, setting: str, sparsity: str, texts: list[Path], out: Path) -> list[str]:
    """The cells of a row behind its keys."""
    how, recovers = SETTINGS[setting]
    kept, made = out / "kept.jsonl", out / "made.jsonl"
    began = time.monotonic()
    prunetool("score", stats, "-o", kept, "--sparsity", sparsity, *how)
    prunetool("compensate", kept, "-o", made)
    if recovers is not None:
        prunetool("recover", made, "-o", out / "recovered.jsonl", *recovers, *DTYPE)
        made = out / "recovered.jsonl"
    seconds = time.monotonic() - began
    prunetool("export", out / "model", made, "--overwrite")
    found = [f"{perplexity(out / 'model', text):.4f}" for text in texts]
    return [*found, predicted(kept), f"{seconds:.0f}"]


def print_table(path: Path) -> None:
    rows = read(path, keys=3)
    if DENSE in rows:
        print("dense: {} and {}\n".format(*(f"{float(x):.2f}" for x in rows[DENSE][3:5])))
    fractions = " | ".join(f"{float(sparsity):.0%}" for sparsity in SPARSITIES)
    print(f"| | {fractions} |")
    print(f"|---|{'---:|' * len(SPARSITIES)}")
    for setting in SETTINGS:
        cells = []
        for sparsity in SPARSITIES:
            found = [rows[key] for seed in SEEDS if (key := (setting, seed, sparsity)) in rows]
            cells.append(f"{spread(found, 3)} ({spread(found, 4)})" if found else "–")
        if set(cells) != {"–"}:
            print(f"| {setting} | {' | '.join(cells)} |")
    ratios = [
        math.log(float(row[3]) / float(rows[DENSE][3])) / float(row[5])
        for row in rows.values()
        if row[0].startswith("default (") and row[5]
    ]
    if ratios:
        print(
            f"\nMeasured loss over predicted, default: {min(ratios):.2f} to {max(ratios):.2f}, "
            f"{len(ratios)} runs."
        )


def spread(rows: list[list[str]], column: int) -> str:
    """The mean, ± half the range where there are several."""
    values = [float(row[column]) for row in rows]
    mean = f"{sum(values) / len(values):.2f}"
    return f"{mean} ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "calibration", "test", "other", "csv"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="only these")
    parser.add_argument("--sparsity", action="append", choices=SPARSITIES, help="only these")
    parser.add_argument("--seed", action="append", choices=SEEDS, help="only these")
    given = parser.parse_args()
    if given.table:
        return print_table(given.csv)
    texts = [given.test, given.other]
    if DENSE not in read(given.csv, keys=3):
        found = [f"{perplexity(given.model, text):.4f}" for text in texts]
        append(given.csv, COLUMNS, [*DENSE, *found, "", ""])
    for seed in given.seed or SEEDS:
        stats = given.csv.with_suffix(f".{seed}.jsonl")
        prunetool(
            "calibrate", given.model, "--text", given.calibration, "--shuffle", seed,
            "--samples", 72, "--held-out", 8, "--sequence-length", 1024, *DTYPE,
            "--work", given.csv.with_suffix(f".{seed}.prunetool"), "-o", stats,
        )  # fmt: skip
        for setting in given.setting or SETTINGS:
            for sparsity in given.sparsity or SPARSITIES:
                if (setting, seed, sparsity) in read(given.csv, keys=3):
                    continue
                with tempfile.TemporaryDirectory() as directory:
                    cells = measure(stats, setting, sparsity, texts, Path(directory))
                append(given.csv, COLUMNS, [setting, seed, sparsity, *cells])
                print(setting, seed, sparsity, *cells, flush=True)


if __name__ == "__main__":
    main()
