"""Run `prunetool.runtimes` on models, and show what it measured."""

import glob
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from prunetool import console
from prunetool.checkpoint.gguf import PART_NAME
from prunetool.checkpoint.index import read_json
from prunetool.checkpoint.source import ADAPTER_NAME
from prunetool.errors import PrunetoolError, RecordError, shown
from prunetool.llama import forms
from prunetool.llama.config import PICTURES, PRUNED
from prunetool.runtimes import NEEDED, runtime_of
from prunetool.steps import picture
from prunetool.steps.page import Table

COLOURS = {"transformers": "#3070b0", "llama.cpp": "#c05020"}


@dataclass(frozen=True)
class Measured:
    """A model's speed: that of every repeat, in tokens a second; and how it was measured."""

    model: str
    runtime: str
    file_bytes: int
    load_seconds: float
    peak_bytes: int
    prompt_tokens_per_second: list[float]
    generated_tokens_per_second: list[float]
    how: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check(models: Sequence[Path]) -> None:
    """Refuse what cannot be measured, before the first is.

    Raises:
      PrunetoolError: if a model is not there, or the program for it is not installed.
    """
    for model in models:
        if not (model.is_file() if model.suffix == ".gguf" else (model / "config.json").is_file()):
            raise PrunetoolError(
                shown(model), "is neither a checkpoint's directory nor a GGUF file", "check it"
            )
        config = model / "config.json"
        if config.is_file() and read_json(config).get("model_type") == PICTURES:
            todo = "measure it in LlamaGen"
            raise PrunetoolError(shown(model), "is a model of pictures", todo)
        for package in NEEDED[runtime_of(model)]:
            if find_spec(package) is None:
                what = f"needs {package}, which is not installed"
                raise PrunetoolError(runtime_of(model), what, f"pip install {package}")


def measure(model: Path, how: Mapping[str, Any]) -> Measured:
    """Measure a model in a process of its own.

    Raises:
      PrunetoolError: if the program fails; says its last line.
    """
    words = {"model": str(model), **how, "trusted": _is_ours(model)}
    done = subprocess.run(
        # -P: no module comes from the directory that the user is in.
        [sys.executable, "-P", "-m", "prunetool.runtimes", json.dumps(words)],
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        console.log.debug("%s", done.stderr.rstrip())
        why = f"{runtime_of(model)} failed ({shown(lines[-1], 120)})"
        raise PrunetoolError(shown(model), why, "-v shows all that it said")
    found = json.loads(done.stdout.splitlines()[-1])
    return Measured(model=str(model), file_bytes=_size(model), how=dict(how), **found)


def _size(model: Path) -> int:
    files = [model] if model.is_file() else list(model.glob("*.safetensors"))
    if named := PART_NAME.fullmatch(model.name):
        files = list(model.parent.glob(f"{glob.escape(named[1])}-?????-of-{named[3]}.gguf"))
    return sum(file.stat().st_size for file in files)


def _is_ours(model: Path) -> bool:
    """Whether all code of a checkpoint that could run is this tool's loader."""
    if model.is_file() or (model / ADAPTER_NAME).exists():  # an adapter names another model
        return False
    config, ours = read_json(model / "config.json"), forms.loader_files(PRUNED)
    if (config.get("model_type"), config.get("auto_map")) != (PRUNED, forms.AUTO_MAP):
        return False
    return all(
        (model / name).is_file() and (model / name).read_bytes() == data
        for name, data in ours.items()
    )


def read_speeds(path: Path) -> Table:
    """The table of a result of ``prunetool bench``, for a report.

    Raises:
      RecordError: if it is something else.
    """
    try:
        found = [Measured(**each) for each in json.loads(path.read_text("utf-8"))]
        for each in found:
            if not all(isinstance(value, int) for value in (each.file_bytes, each.peak_bytes)):
                raise TypeError("sizes are whole numbers")
        title, columns, rows = table(found)
    except OSError as error:
        raise RecordError(path, error.strerror or "cannot be read", "check the name") from error
    except (
        ValueError, KeyError, TypeError, IndexError, ArithmeticError, RecursionError
    ) as error:  # fmt: skip
        what = f"is not a result of bench ({type(error).__name__}: {error})"
        raise RecordError(path, what, "name a file that prunetool bench printed") from error
    return Table(shown(title, 200), rows, columns)


def table(found: Sequence[Measured]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows: medians, ± half the range, times that of its program's first."""
    how = found[0].how
    first = {each.runtime: each for each in reversed(found)}

    def cells(values: Sequence[float], of: Sequence[float]) -> list[str]:
        spread = (max(values) - min(values)) / 2
        return [f"{median(values):.1f}±{spread:.1f}", f"{median(values) / median(of):.2f}"]

    rows = []
    for each in found:
        other = first[each.runtime]
        row = [f"{shown(Path(each.model).name)}, {shown(each.runtime)}"]
        row += [f"{each.file_bytes / 1e6:,.0f}", f"{each.load_seconds:.2f}"]
        row.append(f"{each.peak_bytes / 1e6:,.0f}")
        row += cells(each.prompt_tokens_per_second, other.prompt_tokens_per_second)
        row += cells(each.generated_tokens_per_second, other.generated_tokens_per_second)
        rows.append(row)
    title = (
        f"Tokens a second: prompt of {how['prompt']}, {how['generate']} generated; median of "
        f"{how['repeats']} ± half their range, times the first; {how['threads']} threads"
    )
    columns = ["model", "MB", "load s", "peak MB", "prompt", "times", "text", "times of text"]
    return title, columns, rows


def plot(found: Sequence[Measured]) -> str:
    """Speed of generating by peak memory, as SVG."""
    lines = []
    for runtime, colour in COLOURS.items():
        points = [
            (each.peak_bytes / 1e9, median(each.generated_tokens_per_second))
            for each in found
            if each.runtime == runtime
        ]
        lines.append((runtime, colour, sorted(points)))
    caption = "Generated tokens a second by peak memory, GB"
    axes = ("peak memory, GB", "generated tokens a second")
    return picture.lines(lines, caption, axes, x_format=".4g")
