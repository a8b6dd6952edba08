"""Perplexity of every method at several sparsities, from one calibration.

    python examples/methods.py MODEL CALIBRATION_TEXT TEST_TEXT examples/methods.csv

Calibrates on 32 x 2048 tokens, refits, and measures on 8 x 2048. A row a method and sparsity is
added to the CSV as it is done, and a row that is there is not made again. With --table it prints
the CSV as a Markdown table instead.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from prunetool.methods import UNITS

BY = "0.2"  # the sparsity that the table is sorted by
SPARSITIES = ("0.1", "0.2", "0.3", "0.5")
# (method, allocation, weighting)
SETTINGS = [
    *((name, "global", "none") for name, method in UNITS.items() if not method.needs_slopes),
    *((method, "global", "token") for method in ("newton", "obs", "wanda-sp")),
    ("newton", "uniform", "none"),
]
COLUMNS = ["method", "allocation", "weighting", "sparsity", "perplexity", "parameters"]


def prunetool(*words: object) -> str:
    command = [sys.executable, "-m", "prunetool", "-q", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(stats: Path, setting: tuple[str, str, str], sparsity: str, test: Path, out: Path):
    method, allocation, weighting = setting
    kept, refitted = out / "kept.jsonl", out / "refitted.jsonl"
    prunetool(
        "score", stats, "-o", kept, "--method", method, "--allocation", allocation,
        "--weighting", weighting, "--sparsity", sparsity,
    )  # fmt: skip
    prunetool("compensate", kept, "-o", refitted)
    prunetool("export", out / "model", refitted, "--overwrite")
    return json.loads(prunetool("evaluate", out / "model", "--text", test, "--samples", 8))


def read(path: Path, keys: int = 4) -> dict[tuple[str, ...], list[str]]:
    """The rows of a CSV by their first columns."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {tuple(row[:keys]): row for row in rows}


def append(path: Path, columns: list[str], row: list[object]) -> None:
    """Add a row to a CSV, under its columns where it is the first."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([columns, row] if new else [row])


def print_table(path: Path) -> None:
    rows = read(path)
    fractions = " | ".join(f"{float(sparsity):.0%}" for sparsity in SPARSITIES)
    print(f"| method | allocation | weighting | {fractions} |")
    print(f"|---|---|---|{'---:|' * len(SPARSITIES)}")
    measured = [setting for setting in SETTINGS if (*setting, BY) in rows]
    for setting in sorted(measured, key=lambda setting: float(rows[*setting, BY][4])):
        found = [rows.get((*setting, sparsity)) for sparsity in SPARSITIES]
        cells = ["–" if row is None else f"{float(row[4]):.2f}" for row in found]
        print(f"| {' | '.join([*setting, *cells])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "calibration", "test", "csv"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        return print_table(given.csv)
    work = given.csv.with_suffix(".prunetool")
    stats = given.csv.with_suffix(".jsonl")
    prunetool(
        "calibrate", given.model, "--text", given.calibration, "--samples", 32, "--first-tokens", 0,
        "--work", work, "-o", stats,
    )  # fmt: skip
    for sparsity in SPARSITIES:
        for setting in SETTINGS:
            if (*setting, sparsity) in read(given.csv):
                continue
            with tempfile.TemporaryDirectory() as directory:
                result = measure(stats, setting, sparsity, given.test, Path(directory))
            row = [*setting, sparsity, f"{result['perplexity']:.4f}", result["parameters"]]
            append(given.csv, COLUMNS, row)
            print(*setting, sparsity, f"{result['perplexity']:.3f}", flush=True)


if __name__ == "__main__":
    main()
