"""The stream between steps: JSON lines of a header, one record a layer, and an end.

    {"record":"header","format":1,"model":…,"fingerprint":…,"work":…,"layers":30,"history":[…]}
    {"record":"layer","index":0,"files":{"stats":"stats/layer-00000.safetensors"},"values":{…}}
    {"record":"end"}

Arrays never travel: ``files`` names safetensors files below ``work``. ``history`` has one entry a
step. A stream without its end record is an error in every reader, so that a step that failed
stops the pipe, with or without the shell's ``pipefail``.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from prunetool.errors import RecordError

FORMAT = 1
AGAIN = "run the step before again; its own message says what happened"


@dataclass(frozen=True)
class Header:
    """What holds for all layers.

    Attributes:
      model: directory of the dense checkpoint.
      source: what the user called it (a path or a Hub id).
      fingerprint: of the checkpoint's headers; a step refuses a checkpoint that changed.
      work: directory that the records' files lie below.
      layers: number of decoder layers, and of layer records.
      history: one entry a step: command, version, options.
    """

    model: str
    source: str
    fingerprint: str
    work: str
    layers: int
    history: list[dict[str, Any]] = field(default_factory=list)

    def after(self, step: dict[str, Any]) -> "Header":
        """The header with one more step in its history."""
        return replace(self, history=[*self.history, step])


@dataclass(frozen=True)
class LayerRecord:
    """One layer: the files made for it so far, by kind, and small values."""

    index: int
    files: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def adding(self, files: dict[str, str], values: dict[str, Any]) -> "LayerRecord":
        """The record with more files and values; a later step's win."""
        return LayerRecord(self.index, {**self.files, **files}, {**self.values, **values})


def write(sink: IO[str], header: Header, layers: Iterable[LayerRecord]) -> None:
    """Write header, layers and end, each the moment it is there."""

    def line(kind: str, fields: dict[str, Any]) -> None:
        sink.write(json.dumps({"record": kind, **fields}, ensure_ascii=False) + "\n")
        sink.flush()

    line("header", {"format": FORMAT, **asdict(header)})
    for layer in layers:
        line("layer", asdict(layer))
    line("end", {})


def read(source: IO[str]) -> tuple[Header, Iterator[LayerRecord]]:
    """Read a stream: the header at once, the layers as they come.

    Raises:
      RecordError: where a line is malformed, out of order, of another format, or where the stream
        ends early (the layers' iterator raises it).
    """
    lines = _lines(source)
    first = next(lines, None)
    if first is None:
        raise RecordError(_name(source), "the stream is empty", AGAIN)
    number, value = first
    where = f"{_name(source)}: line {number}"
    if value.get("record") != "header":
        raise RecordError(where, "no header record", "pipe the records of a prunetool step in")
    if value.get("format") != FORMAT:
        raise RecordError(
            where, f"format {value.get('format')!r}, and this prunetool reads {FORMAT}",
            "run all steps with one version",
        )  # fmt: skip
    types: dict[str, type] = {
        "model": str, "source": str, "fingerprint": str, "work": str, "layers": int, "history": list
    }  # fmt: skip
    fields = _typed(where, value, types)
    if not all(isinstance(step, dict) for step in fields["history"]):
        raise RecordError(where, "history is not a list of steps", AGAIN)
    header = Header(**fields)
    return header, _layers(source, lines, header.layers)


def _layers(
    source: IO[str], lines: Iterator[tuple[int, dict[str, Any]]], count: int
) -> Iterator[LayerRecord]:
    seen = 0
    for number, value in lines:
        where = f"{_name(source)}: line {number}"
        if value.get("record") == "end":
            if seen != count:
                raise RecordError(where, f"ends after {seen} of {count} layers", AGAIN)
            if next(lines, None) is not None:
                raise RecordError(where, "more follows the end record", "pipe one stream in")
            return
        if value.get("record") != "layer":
            raise RecordError(where, f"record {value.get('record')!r} is unknown", AGAIN)
        fields = _typed(where, value, {"index": int, "files": dict, "values": dict})
        if fields["index"] != seen or seen >= count:
            raise RecordError(where, f"layer {fields['index']} where {seen} was due", AGAIN)
        for path in fields["files"].values():
            if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
                raise RecordError(where, f"file {path!r} is outside the work directory", AGAIN)
        seen += 1
        yield LayerRecord(**fields)
    raise RecordError(_name(source), f"cut off after {seen} of {count} layers", AGAIN)


def _lines(source: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        for number, line in enumerate(source, 1):
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
            yield number, value
    except (ValueError, RecursionError) as error:
        where = f"{_name(source)}: line {number or 1}"
        raise RecordError(where, f"not a record ({error})", AGAIN) from error


def _typed(where: str, value: dict[str, Any], types: dict[str, type]) -> dict[str, Any]:
    for key, kind in types.items():
        if not isinstance(value.get(key), kind) or isinstance(value.get(key), bool):
            raise RecordError(where, f"{key} is missing or no {kind.__name__}", AGAIN)
    return {key: value[key] for key in types}


def _name(source: IO[str]) -> str:
    return str(getattr(source, "name", "<stream>"))
