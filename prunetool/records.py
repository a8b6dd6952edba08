"""The stream between steps: JSON lines with a header, one record per layer, and an end.

    {"record":"header","format":1,"model":…,"fingerprint":…,"work":…,"layers":30,"history":[…]}
    {"record":"layer","index":0,"files":{"stats":"stats/layer-00000.safetensors"},"values":{…}}
    {"record":"end"}

Arrays never travel: ``files`` names safetensors files below ``work``. ``history`` has one entry per
step. A stream without its end record is an error in every reader, so that a failed step stops the
pipe, with or without the shell's ``pipefail``. A failing step ends its output to a pipe, even if
empty, with

    {"record":"failed"}

and the later steps fail silently; a killed step cannot, and the next one reports a stream that is
cut off.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

from prunetool import __version__, console
from prunetool.errors import RecordError, StepFailed, shown

FORMAT = 1
CHECKSUMS = ("tokens", "calibration")  # in the history; the other options are the user's
AGAIN = "run the previous step again; its own message says what happened"

# The only files that a record may name: those of the steps. A stream is untrusted input.
MATRIX = "(q|k|v|o|gate|up|down)"
HASH = 12 * "[0-9a-f]"
FILES = {
    "stats|held_out|first|attention|gradients": r"stats/layer-{layer:05d}\.{kind}\.safetensors",
    rf"kept\.(heads|channels)|mask\.{MATRIX}": rf"score-{HASH}/layer-{{layer:05d}}\.safetensors",
    "basis": rf"score-{HASH}/(basis|layer-{{layer:05d}}\.basis)\.safetensors",
    "refit": rf"compensate-{HASH}/layer-{{layer:05d}}\.safetensors",
    "recover": rf"recover-{HASH}/layer-{{layer:05d}}\.safetensors",
}


@dataclass(frozen=True)
class Header:
    """The part of a stream common to all layers.

    Attributes:
      model: directory of the dense checkpoint.
      source: what the user called it (a path or a Hub id).
      fingerprint: the checkpoint's `Model.identity`; a step refuses a changed checkpoint.
      work: directory with the records' files.
      layers: number of decoder layers, and of layer records.
      history: one entry per step: command, version, options.
    """

    model: str
    source: str
    fingerprint: str
    work: str
    layers: int
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def calibration(self) -> dict[str, Any]:
        """Options of the stream's calibration."""
        options: dict[str, Any] = self.history[0]["options"]
        return options

    def had(self, *commands: str) -> bool:
        """Whether one of these steps is in its history."""
        return any(step["command"] in commands for step in self.history)

    @property
    def removes_units(self) -> bool:
        """Whether a score had heads or channels as its target."""
        targets = (str(step["options"].get("target")) for step in self.history[1:])
        return any({"heads", "channels"} & set(target.split(",")) for target in targets)

    @property
    def cuts_hidden(self) -> bool:
        """Whether a score had ``--target hidden``."""
        return any(step["options"].get("target") == "hidden" for step in self.history[1:])

    @property
    def adds_biases(self) -> bool:
        """Whether compensate had ``--bias``."""
        return any("bias" in step["options"] for step in self.history[1:])

    def after(self, command: str, **options: Any) -> "Header":
        """The header with one more step in its history."""
        step = {"command": command, "version": __version__, "options": options}
        return replace(self, history=[*self.history, step])


@dataclass(frozen=True)
class LayerRecord:
    """One layer: the files made for it so far, by kind, and small values."""

    index: int
    files: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def adding(self, files: dict[str, str], values: dict[str, Any]) -> "LayerRecord":
        """The record with more files and values; new ones replace old ones."""
        return LayerRecord(self.index, {**self.files, **files}, {**self.values, **values})

    @property
    def has_shared_basis(self) -> bool:
        """Whether its basis of the residual stream is that of all layers."""
        return self.files.get("basis", "").endswith("/basis.safetensors")


def write(sink: IO[str], header: Header, layers: Iterable[LayerRecord], copy: IO[str]) -> None:
    """Write header, layers and end as soon as each is ready, and a copy of them all."""

    def both(kind: str, fields: dict[str, Any]) -> None:
        copy.write(_line(kind, fields))
        console.write(sink, _line(kind, fields))

    both("header", {"format": FORMAT, **asdict(header)})
    for layer in layers:
        both("layer", asdict(layer))
    both("end", {})


def _line(kind: str, fields: dict[str, Any]) -> str:
    return json.dumps({"record": kind, **fields}) + "\n"


def tell_failed(sink: IO[str]) -> None:
    """End a stream to a pipe with the record that says that this step failed."""
    with suppress(OSError):  # nobody reads any more
        if console.is_pipe(sink):
            console.write(sink, _line("failed", {}))


def read(source: IO[str]) -> tuple[Header, Iterator[LayerRecord]]:
    """Read a stream: the header at once, the layers as they come.

    Raises:
      RecordError: if a line is malformed, out of order or of another format, or the stream ends
        early (raised by the layers' iterator).
      StepFailed: if it is a pipe, and the step that writes it reports failure.
    """
    lines = _lines(source)
    first = next(lines, None)
    if first is None:
        raise RecordError(_name(source), "the stream is empty", AGAIN)
    number, value = first
    where = f"{_name(source)}: line {number}"
    if value.get("record") != "header":
        raise RecordError(where, "no header record", "pipe in the records of a prunetool step")
    if value.get("format") != FORMAT:
        raise RecordError(
            where,
            f"format {shown(value.get('format'))}, but this prunetool reads {FORMAT}",
            "run all steps with one version",
        )
    types: dict[str, type] = {
        "model": str, "source": str, "fingerprint": str, "work": str, "layers": int, "history": list
    }  # fmt: skip
    fields = _typed(where, value, types)
    for key in ("model", "work"):
        if "\0" in fields[key]:
            raise RecordError(where, f"{key} is not a path", AGAIN)
    _check(where, "history", fields["history"], [STEP])
    if not fields["history"]:
        raise RecordError(where, "history is empty", AGAIN)
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
                raise RecordError(where, "records follow the end record", "pipe in one stream")
            return
        if value.get("record") != "layer":
            raise RecordError(where, f"record {shown(repr(value.get('record')))} is unknown", AGAIN)
        fields = _typed(where, value, {"index": int, "files": dict, "values": dict})
        if fields["index"] != seen or seen >= count:
            raise RecordError(
                where, f"layer {fields['index']} after {seen} of {count} layers", AGAIN
            )
        for kind, path in fields["files"].items():
            if not _is_named_so(kind, path, seen):
                what = f"file {shown(repr(path))} of {shown(kind)} is not one that a step makes"
                raise RecordError(where, what, AGAIN)
        for key, shape in VALUES.items():
            if key in fields["values"]:
                _check(where, key, fields["values"][key], shape)
        for kind in fields["files"]:
            step, _, part = kind.partition(".")
            said = fields["values"].get(BEHIND.get(step, ""), {})
            if step in BEHIND and (not said or (step == "mask" and part not in said)):
                raise RecordError(where, f"has a file of {kind} but no values for it", AGAIN)
        seen += 1
        yield LayerRecord(**fields)
    raise RecordError(_name(source), f"cut off after {seen} of {count} layers", AGAIN)


def _is_named_so(kind: str, path: object, layer: int) -> bool:
    for kinds, name in FILES.items():
        if re.fullmatch(kinds, kind):
            return isinstance(path, str) and bool(
                re.fullmatch(name.format(layer=layer, kind=kind), path)
            )
    return False


def _number(value: object) -> bool:
    return isinstance(value, float) or (
        isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
    )


def _known(value: object) -> bool:
    return value is None or _number(value)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_count, value))


def _text(value: object) -> bool:
    return isinstance(value, str)


def _anything(_: object) -> bool:
    return True


# Shapes of values: a predicate, a list of one shape, a dict of required keys with their shapes, or
# a dict of one pattern of keys (``...``) and their shape.
Shape = Callable[[object], bool] | Mapping[Any, Any] | list[Any]
BOTH = {"o_proj": _number, "down_proj": _number}
REFIT = dict.fromkeys(
    ("removed", "refitted", "held_out_removed", "held_out_refitted", "damping"), _known
)
MASK = {"method": _text, "pattern": _text, "damping": _number, "removed": _number, "loss": _known}
BEHIND = {
    "kept": "energy",
    "mask": "masks",
    "basis": "hidden",
    "refit": "refit",
    "recover": "recover",
}  # value that goes with a file
STEP: Shape = {"command": _text, "version": _text, "options": {...: (".*", _anything)}}
VALUES: dict[str, Shape] = {
    "kept": {"heads": _count, "kv_heads": _count, "channels": _count},
    "loss": BOTH,
    "energy": BOTH,
    "nats": {...: ("(o|down)_proj", _number)},
    "scores": {...: ("heads|channels", {...: (r"-?\d{1,4}|least", _pair)})},
    "masks": {...: (MATRIX, MASK)},
    "hidden": {"kept": _count, "of": _count, "share": {...: ("attention|mlp", _number)}},
    "attention": {...: (".*", _number)},
    "refit": {...: (rf"{MATRIX}_proj(\.masked)?", REFIT)},
    "recover": {"kl_before": _number, "kl_after": _number, "steps": _count},
    "seconds": {...: (".*", {...: (".*", _number)})},
}


def _check(where: str, key: str, value: object, shape: Shape) -> None:
    """Refuse a value of another shape.

    Raises:
      RecordError: if it differs; names the key.
    """
    if not _has_shape(value, shape):
        raise RecordError(where, f"{key} is {shown(repr(value))}, which is malformed", AGAIN)


def _has_shape(value: object, shape: Shape) -> bool:
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has_shape(item, shape[0]) for item in value)
    if callable(shape):
        return shape(value)
    if not isinstance(value, dict):
        return False
    if ... in shape:
        pattern, inner = shape[...]
        return all(re.fullmatch(pattern, k) and _has_shape(v, inner) for k, v in value.items())
    return shape.keys() <= value.keys() and all(_has_shape(value[k], v) for k, v in shape.items())


def _lines(source: IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    number, lines = 0, iter(source)
    try:
        while True:
            with console.waiting():
                line = next(lines, None)
            if line is None:
                return
            number += 1
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
            if value.get("record") == "failed":
                kind = StepFailed if console.is_pipe(source) else RecordError
                raise kind(f"{_name(source)}: line {number}", "its step failed", AGAIN)
            yield number, value
    except (ValueError, RecursionError, MemoryError) as error:
        where = f"{_name(source)}: line {number or 1}"
        raise RecordError(where, f"not a record ({error})", AGAIN) from error


def _typed(where: str, value: dict[str, Any], types: dict[str, type]) -> dict[str, Any]:
    for key, kind in types.items():
        if not isinstance(value.get(key), kind) or isinstance(value.get(key), bool):
            raise RecordError(where, f"{key} is missing or not of type {kind.__name__}", AGAIN)
    return {key: value[key] for key in types}


def _name(source: IO[str]) -> str:
    return str(getattr(source, "name", "<stream>"))
