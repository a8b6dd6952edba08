"""The loss of a sweep by the fraction removed, as a picture: predicted, and measured."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prunetool import records, workdir
from prunetool.errors import PrunetoolError

Point = tuple[float, float]  # fraction of the layers' parameters removed; loss added, nats a token

WIDTH, HEIGHT, MARGIN = 480, 260, 44
TICKS = 4  # of each axis


def predicted(header: records.Header, work: Path) -> list[Point]:
    """The points of all sparsities that were scored from the same calibration in the same way.

    Returns:
      In order of the fraction removed; empty if the stream's last score predicted no loss.
    """
    steps = [number for number, step in enumerate(header.history) if step["command"] == "score"]
    if not steps:
        return []
    wanted = _but_sparsity(header.history[: steps[-1] + 1])
    points = set()
    for path in work.glob(f"score-*/{workdir.RECORDS_NAME}"):
        try:
            with path.open(encoding="utf-8") as stream:
                other, layers = records.read(stream)
                nats = [sum(record.values.get("nats", {}).values()) for record in layers]
        except (PrunetoolError, OSError, UnicodeError):
            continue  # an older version's, or damaged: not what this page is about
        if _but_sparsity(other.history) == wanted and any(nats):
            points.add((float(other.history[-1]["options"]["sparsity"]), sum(nats)))
    return sorted(points)


def _but_sparsity(history: Sequence[dict[str, Any]]) -> list[Any]:
    """What was asked up to a score, but for its sparsity."""
    *before, last = [(step["command"], step["options"]) for step in history]
    return [*before, (last[0], {k: v for k, v in last[1].items() if k != "sparsity"})]


def picture(
    lines: Sequence[tuple[str, str, Sequence[Point]]], caption: str, x_format: str = ".0%"
) -> str:
    """An SVG of several lines of points from 0 on; empty if no line has a point.

    Args:
      lines: name, CSS colour and points of each.
      caption: what it shows.
      x_format: how numbers stand along the x axis.
    """
    every = [point for *_, points in lines for point in points]
    if not every:
        return ""
    right, top = (max(values) * 1.05 or 1.0 for values in zip(*every, strict=True))

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (WIDTH - 2 * MARGIN) * x / right, (HEIGHT - 2 * MARGIN) * y / top
        return round(MARGIN + across, 1), round(HEIGHT - MARGIN - up, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="11" '
        f'fill="currentColor"><title>{html.escape(caption)}</title>'
    ]
    for i in range(TICKS + 1):
        x, y = right * i / TICKS, top * i / TICKS
        (left, up), (across, bottom) = place(0, y), place(x, 0)
        end = WIDTH - MARGIN
        parts.append(f'<line x1="{left}" y1="{up}" x2="{end}" y2="{up}" stroke="#ccc"/>')
        parts.append(f'<text x="{left - 4}" y="{up + 4}" text-anchor="end">{y:.2g}</text>')
        parts.append(
            f'<text x="{across}" y="{bottom + 14}" text-anchor="middle">{x:{x_format}}</text>'
        )
    for number, (name, colour, points) in enumerate(lines):
        parts += _line(name, colour, [place(*point) for point in points], number)
    return "\n".join([*parts, "</svg>\n"])


def _line(name: str, colour: str, places: Iterable[Point], number: int) -> list[str]:
    """A line with its dots, and its name in the legend."""
    places = list(places)
    if not places:
        return []
    joined = " ".join(f"{x},{y}" for x, y in places)
    dots = [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places]
    return [
        f'<polyline points="{joined}" fill="none" stroke="{colour}"/>',
        *dots,
        f'<text x="{MARGIN + 8}" y="{16 + 14 * number}" fill="{colour}">{html.escape(name)}</text>',
    ]
