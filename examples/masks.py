"""Masks of q and k, and of the MLP, at 50%: attention error and perplexity of every method.

    python examples/masks.py MODEL CALIBRATION_TEXT TEST_TEXT examples/masks.csv

Calibrates on 16 and on 64 x 2048 tokens, of which the attention methods see the first 256 tokens of
8 and of 32 sequences (and as many held out); measures on 8 x 2048, beside the dense model. A row is
added to the CSV as it is done, and a row that is there is not made again. With --table it prints
the CSV as Markdown tables instead.
"""

import argparse
import json
import tempfile
from pathlib import Path

from methods import append, prunetool, read

HALF = ("--sparsity", ".5")
SEQUENCES = {8: 16, 32: 64}  # attention sequences: all calibration sequences
# Of q and k: the options of score, and which calibration. Those that learn nothing take the larger.
REFINE = ("--refine", "60")
QK = {
    "none": (None, 32),
    "wanda": (["--method", "wanda"], 32),
    "sparsegpt": (["--method", "sparsegpt"], 32),
    "attention-diag, 8": (["--method", "attention-diag"], 8),
    "attention-diag, 32": (["--method", "attention-diag"], 32),
    "attention-gd, refined, 8": (["--method", "attention-gd", *REFINE], 8),
    "attention-gd, refined, 32": (["--method", "attention-gd", "--iterations", "20", *REFINE], 32),
    "attention-gd as published, 8": (["--method", "attention-gd", "--published"], 8),
    "wanda, refined, 8": (["--method", "wanda", *REFINE], 8),
    "magnitude": (["--method", "magnitude"], 32),
    "random": (["--method", "random"], 32),
}
MLP = ("wanda", "sparsegpt")
MIXED = ("wanda", "sparsegpt", "attention-gd, refined, 8", "attention-gd, refined, 32")
# What the text needs first; all of it takes more than an hour.
ROWS = [(qk, "none") for qk in list(QK)[:7]] + [(qk, mlp) for mlp in MLP for qk in MIXED]
ROWS += [(qk, "none") for qk in list(QK)[7:]]
COLUMNS = [
    "q and k", "mlp", "perplexity", "kl", "error on dense input", "error on own input",
    "worst head on dense input",
]  # fmt: skip


def measure(stats: dict[int, Path], row: tuple[str, str], given: argparse.Namespace, out: Path):
    options, sequences = QK[row[0]]
    kept = stats[sequences]
    steps = [] if options is None else [["--target", "qk", *options]]
    if row[1] != "none":
        steps.append(["--target", "gate,up,down", "--method", row[1]])
    for number, step in enumerate(steps):
        source, kept = kept, out / f"kept-{number}.jsonl"
        prunetool("score", source, "-o", kept, *HALF, *step)
    if not steps:
        model = given.model
    else:
        model = out / "model"
        if "sparsegpt" in row:
            source, kept = kept, out / "refitted.jsonl"
            prunetool("compensate", source, "-o", kept)
        prunetool("export", model, kept)
    beside = ["--against", given.model] if row[1] == "none" else []
    return json.loads(prunetool("evaluate", model, "--text", given.test, "--samples", 8, *beside))


def cells(result: dict) -> list[str]:
    numbers = [result["perplexity"]]
    if "against" in result:
        against = result["against"]
        dense, own = (against["attention_error"][name] for name in ("same_input", "own"))
        numbers += [against["kl"], dense["mean"], own["mean"], dense["worst"]]
    return [f"{number:.4f}" for number in numbers]


def print_tables(path: Path) -> None:
    rows = read(path, keys=2)
    print("| q and k at 50% | dense input | worst head | own input | KL | perplexity |")
    print("|---|---:|---:|---:|---:|---:|")
    for qk in QK:
        if (qk, "none") in rows:
            perplexity, kl, dense, own, worst = rows[qk, "none"][2:]
            print(f"| {qk} | {dense} | {worst} | {own} | {kl} | {float(perplexity):.2f} |")
    print(
        "\n| q and k at 50% | MLP dense | MLP wanda 50% | MLP sparsegpt 50% |\n|---|---:|---:|---:|"
    )
    for qk in MIXED:
        found = [rows.get((qk, mlp)) for mlp in ("none", *MLP)]
        line = ["–" if row is None else f"{float(row[2]):.2f}" for row in found]
        print(f"| {' | '.join([qk, *line])} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "calibration", "test", "csv"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        return print_tables(given.csv)
    done = read(given.csv, keys=2)
    todo = [row for row in ROWS if row not in done]
    stats = {}
    for sequences, samples in SEQUENCES.items() if todo else ():
        base = given.csv.with_suffix(f".{sequences}.prunetool")
        stats[sequences] = given.csv.with_suffix(f".{sequences}.jsonl")
        prunetool(
            "calibrate", given.model, "--text", given.calibration, "--samples", samples,
            "--stats", "all", "--attention-samples", sequences, "--attention-length", 256,
            "--gradients", 0, "--work", base, "-o", stats[sequences],
        )  # fmt: skip
    for row in todo:
        with tempfile.TemporaryDirectory() as directory:
            result = measure(stats, row, given, Path(directory))
        append(given.csv, COLUMNS, [*row, *cells(result)])
        print(*row, *cells(result), flush=True)


if __name__ == "__main__":
    main()
