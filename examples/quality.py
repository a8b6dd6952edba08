"""Perplexity on two texts at several sparsities, from several parts of the calibration text.

    python examples/quality.py MODEL CALIBRATION_TEXT TEST_TEXT OTHER_TEXT examples/quality.csv

Calibrates on 64 x 1024 tokens at random places of the text (and 8 x 1024 held out) for each seed,
and measures on the first 8 x 2048 tokens (--windows) of TEST_TEXT, of the same kind, and of
OTHER_TEXT, of another kind; all but recover in float32, which is faster on CPUs without
instructions for bfloat16. A row is added to the CSV as it is done, and a row that is there is not
made again; --jobs makes several rows at a time. Seconds and peak memory are those of the steps
between calibrate and export, of the run that made them. With --table NAME it prints one of the
tables as Markdown: means over the seeds ± half their range; --plot FILE.svg draws it.
"""

import argparse
import itertools
import json
import math
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from methods import SPARSITIES, append, prunetool, read

from prunetool.methods import UNITS
from prunetool.steps import picture
from prunetool.steps.report import COSTS

SEEDS = ("0", "1", "2")
SAMPLES, HELD_OUT, LENGTH = 72, 8, 1024
OWN = "self"  # --text of calibrate: the model's own
OTHER = Path("demo/topics.calibrate.txt")  # of OTHER_TEXT's kind, from `make demo`

MASKED = ["--target", "weights"]
NO_REFIT = ", no refit"


class Setting(NamedTuple):
    """What is done in a row: options of each step; None leaves compensate or recover out."""

    score: Sequence[object] = ()
    compensate: Sequence[object] | None = ()
    recover: Sequence[object] | None = None
    calibrate: tuple[object, ...] = ()
    refit_on: tuple[object, ...] | None = None  # options of another calibration, for compensate
    text: str | Path | None = None  # to calibrate on, if not CALIBRATION_TEXT
    sparsities: Sequence[str] = SPARSITIES


def plain(rows: dict[str, Setting]) -> dict[str, Setting]:
    """The settings, and each without compensate."""
    return rows | {name + NO_REFIT: how._replace(compensate=None) for name, how in rows.items()}


def both(name: str, setting: Setting) -> dict[str, Setting]:
    """A setting with and without recover."""
    return {name: setting, f"{name}, recover": setting._replace(recover=())}


def without_first_tokens(rows: dict[str, Setting]) -> dict[str, Setting]:
    """The settings with refits on the samples alone, as the papers have them."""
    return {name: how._replace(calibrate=(*how.calibrate, *NO_FIRST)) for name, how in rows.items()}


NO_FIRST = ("--first-tokens", 0)
FORWARD = ("--gradients", 0, *NO_FIRST)
DEFAULT = "default (greedy, by loss)"
TENTHS = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7")
# 128 windows to score and refit on, and 2 more that only choose the damping (WikiText-2's
# validation split has 130); no gradients.
PUBLISHED = ("--samples", 130, "--held-out", 2, "--sequence-length", 2048, *FORWARD)
FLAP = ["--method", "flap", "--allocation", "global"]
LLM_PRUNER = ("--labels", "text", "--held-out", 0)
OWN_BASES = ["--target", "hidden", "--basis", "layer"]
RESIDUAL = ("--stats", "residual")
FEW = ("0.2", "0.5")
TABLES = {
    "methods": {
        "the paper (newton, global)": Setting(["--published"], calibrate=NO_FIRST),
        "wanda-sp, weighted tokens": Setting(
            ["--method", "wanda-sp", "--allocation", "global", "--weighting", "token"]
        ),
        "wanda-sp, by loss": Setting(["--method", "wanda-sp"]),
        "newton, by loss": Setting(["--method", "newton"]),
        "obs, by loss": Setting(["--method", "obs"]),
        DEFAULT: Setting(),
        "default, recover --what norms": Setting(recover=["--what", "norms", "--samples", 16]),
        "default, recover": Setting(recover=()),
        "default, recover --epochs 2": Setting(recover=["--epochs", 2], sparsities=FEW),
    },
    # Every method at its own setting of the split between layers, or as published.
    "every method": without_first_tokens(
        plain(
            {name: Setting(["--method", name]) for name in UNITS if not UNITS[name].needs_slopes}
            | {
                "newton, published": Setting(["--published"]),
                "flap, global": Setting(FLAP),
                # As published it removes less than is asked where KV groups are few.
                "taylor second, uniform": Setting(
                    ["--method", "taylor", "--taylor", "second", "--allocation", "uniform"],
                    calibrate=("--labels", "text"),
                ),
            }
        )
        | {
            "flap, its own bias": Setting(FLAP, ["--bias", "mean"]),
            "greedy, refit with a bias": Setting(compensate=["--bias", "refit"]),
            "pca": Setting(["--target", "hidden"], compensate=None),
            "pca, a basis for each norm": Setting(
                OWN_BASES, None, calibrate=(*RESIDUAL, "--gradients", 0)
            ),
        }
    ),
    # arXiv 2412.12441: tables 1, 4 to 7 and 10, and figure 2.
    "published": {
        "newton, 128 x 2048": Setting(["--published"], calibrate=PUBLISHED, sparsities=TENTHS),
        "flap, 128 x 2048": Setting(
            FLAP, ["--bias", "mean"], calibrate=PUBLISHED, sparsities=TENTHS
        ),
        "SliceGPT, 128 x 2048": Setting(
            OWN_BASES, None, calibrate=(*PUBLISHED, *RESIDUAL), sparsities=TENTHS
        ),
    }
    | {
        f"LLM-Pruner {which}, {samples} x {length}": Setting(
            ["--method", "taylor", "--published", "--taylor", which],
            None,
            calibrate=(*LLM_PRUNER, "--samples", samples, "--sequence-length", length),
            sparsities=TENTHS,
        )
        for which in ("vector", "first", "second")
        for samples, length in ((10, 64), (128, 2048))
    },
    "masks": both("weights", Setting(MASKED, sparsities=["0.5"]))
    | both("weights, 2:4", Setting([*MASKED, "--pattern", "2:4"], sparsities=["0.5"])),
    "texts": both("the model's own text", Setting(text=OWN, sparsities=FEW))
    | both("language reference", Setting(text=OTHER, calibrate=("--samples", 48), sparsities=FEW)),
    # What arXiv 2412.12441 shows in figure 4: only the refit has more or fewer tokens.
    "samples": {
        f"refitted on {count} x 1024 tokens": Setting(
            ["--published"],
            calibrate=NO_FIRST,
            refit_on=("--samples", count * 9 // 8, "--held-out", count // 8, *FORWARD),
        )
        for count in (8, 16, 32, 64, 128)
    },
    "gradients": {
        f"{count} run backward": Setting(calibrate=("--gradients", count), sparsities=FEW)
        for count in (8, 16, 64)
    },
}
SETTINGS = {name: setting for rows in TABLES.values() for name, setting in rows.items()}
COLUMNS = [
    "setting", "seed", "sparsity", "test", "other", "predicted", "seconds", "peak MB",
    "test by 128",
]  # fmt: skip
SECONDS, PEAK = COLUMNS.index("seconds"), COLUMNS.index("peak MB")
SHORT = ("--samples", 128, "--sequence-length", 128)
# Of the lines of a plot, in turn; a setting has one colour with and without a refit.
COLOURS = (
    "#3070b0", "#c05020", "#308050", "#8040a0", "#a08020", "#c03070", "#208090", "#707070",
    "#6060e0", "#e09060", "#80b050", "#604020", "#d060d0", "#202020", "#60c8d8", "#d0c040",
)  # fmt: skip
MOST = 2.5  # nats of the highest point of a plot
DENSE = "dense"  # its row has the windows for a seed
DTYPE = ("--dtype", "float32")


def perplexity(model: Path, text: Path, windows: Sequence[object]) -> str:
    said = prunetool("evaluate", model, "--text", text, *windows, *DTYPE)
    return f"{json.loads(said)['perplexity']:.4f}"


def cost(made: Path) -> list[str]:
    """Seconds of the steps behind calibrate, and their peak memory in MB."""
    page = json.loads(prunetool("report", made, "--format", "json", "-o", "-"))
    (steps,) = (table for table in page["tables"] if table["caption"] == COSTS)
    _, seconds, peaks = zip(*steps["rows"][1:], strict=True)
    return [f"{sum(seconds):.0f}", f"{max(peaks):.0f}"]


def predicted(path: Path) -> str:
    """The predicted loss in nats, from the records of score."""
    layers = [json.loads(line) for line in path.read_text().splitlines()[1:-1]]
    nats = [sum(layer["values"].get("nats", {}).values()) for layer in layers]
    return f"{sum(nats):.4f}" if any(nats) else ""


class Rows:
    """The CSV."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.lock = given, threading.Lock()
        self.lock_of: dict[object, threading.Lock] = defaultdict(threading.Lock)
        self.done = read(given.csv, keys=3)
        self.dense = (DENSE, "{}x{}".format(*given.windows), "0")
        if {key for key in self.done if key[0] == DENSE} - {self.dense}:
            raise SystemExit(f"{given.csv} was measured on other --windows: name another")

    def calibrated(self, setting: Setting, seed: str) -> Path:
        """The records of a seed's calibration."""
        given, text = self.given, setting.text or self.given.calibration
        words = [Path(text).stem, *map(str, setting.calibrate), seed]
        stats = given.csv.with_name(".".join([given.csv.stem, *words, "jsonl"]))
        prunetool(
            "calibrate", given.model, "--text", text, "--shuffle", seed, "--samples", SAMPLES,
            "--held-out", HELD_OUT, "--sequence-length", LENGTH, "--stats", "all",
            *setting.calibrate, *DTYPE, "--work", stats.with_suffix(".prunetool"), "-o", stats,
        )  # fmt: skip
        return stats

    def make(self, row: tuple[str, str, str], needed: Sequence[Future[Path]]) -> None:
        """Make a row of the CSV from its calibration, and that of the refit if it is another."""
        name, _, sparsity = row
        how, (stats, *other) = SETTINGS[name], [each.result() for each in needed]
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory)
            kept, made = out / "kept.jsonl", out / "made.jsonl"
            refit_on = [word for path in other for word in ("--refit-on", path)]
            with self.lock_of[stats, sparsity, *how.score]:  # rows that share it find it made
                prunetool("score", stats, "-o", kept, "--sparsity", sparsity, *how.score)
                if how.compensate is not None:
                    prunetool("compensate", kept, "-o", made, *how.compensate, *refit_on)
                else:
                    made = kept
            if how.recover is not None:
                source, made = made, out / "recovered.jsonl"
                prunetool("recover", source, "-o", made, *how.recover)
            prunetool("export", out / "model", made)
            cells = [*self.measured(out / "model"), predicted(kept), *cost(made)]
            if name in TABLES["published"]:
                cells.append(perplexity(out / "model", self.given.test, SHORT))
        self.write([*row, *cells])

    def measured(self, model: Path) -> list[str]:
        given = self.given
        windows = ("--samples", given.windows[0], "--sequence-length", given.windows[1])
        return [perplexity(model, text, windows) for text in (given.test, given.other)]

    def write(self, row: list[str]) -> None:
        with self.lock:
            append(self.given.csv, COLUMNS, row)
            print(*row, flush=True)

    def make_all(self) -> None:
        given = self.given
        if self.dense not in self.done:
            self.write([*self.dense, *self.measured(given.model), ""])
        names = [
            name
            for name in (TABLES[given.rows] if given.rows else SETTINGS)
            if name in (given.setting or SETTINGS)
        ]
        todo = [
            row
            for row in itertools.product(names, given.seed or SEEDS, given.sparsity or TENTHS)
            if row not in self.done and row[2] in SETTINGS[row[0]].sparsities
        ]
        needs: dict[tuple[str, str, str], list[tuple[Setting, str]]] = {}
        for row in todo:
            how = SETTINGS[row[0]]
            every = [options for options in (how.calibrate, how.refit_on) if options is not None]
            needs[row] = [(Setting(calibrate=each, text=how.text), row[1]) for each in every]
        with ThreadPoolExecutor(given.jobs) as pool:
            # All calibrations first: a row that waits for one would hold a job.
            unique = dict.fromkeys(itertools.chain.from_iterable(needs.values()))
            stats = {need: pool.submit(self.calibrated, *need) for need in unique}
            made = [
                pool.submit(self.make, row, [stats[need] for need in of])
                for row, of in needs.items()
            ]
        for row in made:
            row.result()


Csv = dict[tuple[str, ...], list[str]]


def of_seeds(rows: Csv, setting: str, sparsity: str) -> list[list[str]]:
    """The rows of a setting and sparsity."""
    return [rows[key] for seed in SEEDS if (key := (setting, seed, sparsity)) in rows]


def dense_row(rows: Csv) -> list[str]:
    """The row of the model before pruning."""
    return next(row for key, row in rows.items() if key[0] == DENSE)


def print_table(rows: Csv, table: str) -> None:
    sparsities = [s for s in TENTHS if any(of_seeds(rows, name, s) for name in TABLES[table])]
    every = [row for name in TABLES[table] for s in sparsities for row in of_seeds(rows, name, s)]
    costs = [n for n in (SECONDS, PEAK) if any(row[n : n + 1] > [""] for row in every)]
    columns = [f"{float(sparsity):.0%}" for sparsity in sparsities] + [COLUMNS[n] for n in costs]
    print(f"| | {' | '.join(columns)} |")
    print(f"|---|{'---:|' * len(columns)}")
    for setting in TABLES[table]:
        by = [of_seeds(rows, setting, sparsity) for sparsity in sparsities]
        cells = [f"{spread(of, 3)} ({spread(of, 4)})" if of else "–" for of in by]
        if set(cells) != {"–"}:
            cells += [most([row for of in by for row in of], n) for n in costs]
            print(f"| {setting} | {' | '.join(cells)} |")


def most(rows: list[list[str]], column: int) -> str:
    """The largest value of a column that not all rows have."""
    known = [float(row[column]) for row in rows if row[column : column + 1] > [""]]
    return f"{max(known):.0f}" if known else "–"


def plot(rows: Csv, table: str) -> str:
    """An SVG of the loss that every setting adds to the dense model's, by what was removed.

    Without a refit a line is dashed; it ends before a loss above `MOST`.
    """
    dense = float(dense_row(rows)[3])
    lines: list[tuple[str, str, list[picture.Point]]] = []
    colour_of: dict[str, str] = {}
    for setting in TABLES[table]:
        every = ((float(s), of_seeds(rows, setting, s)) for s in TENTHS)
        points = [
            (s, sum(math.log(float(row[3]) / dense) for row in of) / len(of))
            for s, of in every
            if of
        ]
        shown = [*itertools.takewhile(lambda point: point[1] <= MOST, points)]
        if shown:
            next_one = COLOURS[len(colour_of) % len(COLOURS)]
            colour = colour_of.setdefault(setting.removesuffix(NO_REFIT), next_one)
            lines.append((setting, colour, [(0.0, 0.0), *shown]))
    caption = "Loss added on the test text, nats a token, by the fraction of the layers removed"
    dashed = [name for name in TABLES[table] if name.endswith(NO_REFIT)]
    height = picture.HEIGHT + 14 * len(lines)
    return picture.lines(lines, caption, ("removed", "nats a token"), dashed=dashed, height=height)


def print_prediction(rows: Csv) -> None:
    dense = float(dense_row(rows)[3])
    ratios = [
        math.log(float(row[3]) / dense) / float(row[5])
        for row in rows.values()
        if row[0] == DEFAULT
    ]
    print(
        f"\nMeasured loss over predicted, default: {min(ratios):.2f} to {max(ratios):.2f}, "
        f"{len(ratios)} runs."
    )


def windows(word: str) -> tuple[int, int]:
    count, length = map(int, word.split("x"))
    return count, length


def spread(rows: list[list[str]], column: int) -> str:
    """The mean, ± half the range where there are several."""
    values = [float(row[column]) for row in rows]
    mean = f"{sum(values) / len(values):.2f}"
    return f"{mean} ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "calibration", "test", "other", "csv"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--table", choices=TABLES, help="print it, of the rows that are there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the --table as SVG too")
    parser.add_argument("--rows", choices=TABLES, help="make only those of this table")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="only these")
    parser.add_argument("--sparsity", action="append", choices=TENTHS, help="only these")
    parser.add_argument("--seed", action="append", choices=SEEDS, help="only these")
    parser.add_argument(
        "--windows", type=windows, default=(8, 2048), metavar="NxTOKENS", help="to measure on"
    )
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    given = parser.parse_args()
    if not given.table:
        return Rows(given).make_all()
    rows = read(given.csv, keys=3)
    if given.table in ("methods", "every method"):
        print("dense: {} and {}\n".format(*(f"{float(x):.2f}" for x in dense_row(rows)[3:5])))
    print_table(rows, given.table)
    if given.plot:
        given.plot.write_text(plot(rows, given.table))
    if given.table == "methods" and any(row[0] == DEFAULT for row in rows.values()):
        print_prediction(rows)


if __name__ == "__main__":
    main()
