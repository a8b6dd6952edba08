"""Pictures as SVG, which stand in a page or a file of their own."""

import html
import math
from collections.abc import Collection, Sequence

WIDTH, HEIGHT, MARGIN = 480, 260, 44
TICKS = 5  # of each axis, at most
BAR, GAP = 90, 6  # height of a row of bars, and the space above it

Point = tuple[float, float]


def _begin(width: int, height: int, caption: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        'style="max-width:100%" role="img" font-family="system-ui, sans-serif" font-size="11" '
        f'fill="currentColor"><title>{html.escape(caption)}</title>'
    )


def bars(rows: Sequence[tuple[str, str, Sequence[float]]], caption: str) -> str:
    """An SVG of rows of bars, one bar a layer, of fractions from 0 to 1.

    Args:
      rows: name, CSS colour and fractions of each.
      caption: what it shows.
    """
    count = max((len(values) for *_, values in rows), default=0)
    step = (WIDTH - MARGIN) / max(count, 1)
    parts = [_begin(WIDTH, len(rows) * (BAR + 24), caption)]
    for number, (name, colour, values) in enumerate(rows):
        top = number * (BAR + 24) + 16
        parts.append(f'<text x="0" y="{top - 4}">{html.escape(name)}</text>')
        for layer, value in enumerate(values):
            x, width = round(layer * step, 1), round(max(step - 1, 0.5), 1)
            high = round((BAR - GAP) * min(max(value, 0), 1), 1)
            parts += [
                f'<rect x="{x}" y="{top}" width="{width}" height="{BAR - GAP}" fill="{colour}" '
                'fill-opacity=".15"/>',
                f'<rect x="{x}" y="{round(top + BAR - GAP - high, 1)}" width="{width}" '
                f'height="{high}" fill="{colour}"><title>layer {layer}: {value:.0%}</title></rect>',
            ]
    return "\n".join([*parts, "</svg>\n"])


def stacks(
    rows: Sequence[tuple[str, Sequence[tuple[str, int, int]]]],
    colours: tuple[str, str],
    caption: str,
) -> str:
    """An SVG of rows of stacked bars, of two counts each.

    Args:
      rows: name of each row, and its bars: a label, perhaps empty, and the two counts.
      colours: of the first count, at the bottom, and the second.
      caption: what it shows.
    """
    parts = [_begin(WIDTH, len(rows) * (BAR + 40), caption)]
    for number, (name, bars) in enumerate(rows):
        top = number * (BAR + 40) + 16
        tallest = max((first + second for _, first, second in bars), default=0) or 1
        step = (WIDTH - MARGIN) / max(len(bars), 1)
        parts.append(f'<text x="0" y="{top - 4}">{html.escape(name)}</text>')
        for place, (label, *counts) in enumerate(bars):
            x, width = round(place * step, 1), round(max(step - 1, 0.5), 1)
            bottom = float(top + BAR - GAP)
            for count, colour in zip(counts, colours, strict=True):
                high = round((BAR - GAP) * count / tallest, 1)
                bottom = round(bottom - high, 1)
                parts.append(
                    f'<rect x="{x}" y="{bottom}" width="{width}" height="{high}" fill="{colour}">'
                    f"<title>{count}</title></rect>"
                )
            parts.append(f'<text x="{x}" y="{top + BAR + 8}">{html.escape(label)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 to just above the largest."""
    size = 10 ** math.floor(math.log10(largest / TICKS))
    step = next(size * times for times in (1, 2, 5, 10) if size * times * TICKS >= largest)
    return [step * number for number in range(math.ceil(largest / step) + 1)]


def lines(
    named: Sequence[tuple[str, str, Sequence[Point]]],
    caption: str,
    axes: tuple[str, str],
    x_format: str = ".0%",
    dashed: Collection[str] = (),
    height: int = HEIGHT,
) -> str:
    """An SVG of several lines of points from 0 on; empty if no line has a point.

    Args:
      named: name, CSS colour and points of each line.
      caption: what it shows.
      axes: what stands along x and y.
      x_format: how numbers stand along the x axis.
      dashed: names of the lines that are dashed.
      height: of the picture; a name of the legend takes 14.
    """
    every = [point for *_, points in named for point in points]
    if not every:
        return ""
    across, up = (_ticks(max(0, *values) or 1.0) for values in zip(*every, strict=True))
    right, top = across[-1], up[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        left, high = (WIDTH - 2 * MARGIN) * x / right, (height - 2 * MARGIN) * y / top
        return round(MARGIN + left, 1), round(height - MARGIN - high, 1)

    parts = [_begin(WIDTH, height, caption)]
    for y in up:
        left, high = place(0, y)
        parts += [
            f'<line x1="{left}" y1="{high}" x2="{WIDTH - MARGIN}" y2="{high}" '
            'stroke="currentColor" stroke-opacity=".2"/>',
            f'<text x="{left - 4}" y="{high + 4}" text-anchor="end">{y:.4g}</text>',
        ]
    middle = 'text-anchor="middle"'
    parts += [
        f'<text x="{place(x, 0)[0]}" y="{height - MARGIN + 14}" {middle}>{x:{x_format}}</text>'
        for x in across
    ]
    x_label, y_label = map(html.escape, axes)
    parts += [
        f'<text x="{WIDTH // 2}" y="{height - 12}" {middle}>{x_label}</text>',
        f'<text x="12" y="{height // 2}" {middle} transform="rotate(-90 12 {height // 2})">'
        f"{y_label}</text>",
    ]
    for number, (name, colour, points) in enumerate(named):
        dash = ' stroke-dasharray="4"' if name in dashed else ""
        parts += _line(name, colour, [place(*point) for point in points], number, dash)
    return "\n".join([*parts, "</svg>\n"])


def _line(name: str, colour: str, places: Sequence[Point], number: int, dash: str) -> list[str]:
    """A line with its dots, and its name in the legend; ``dash`` is an SVG attribute, if any."""
    if not places:
        return []
    joined = " ".join(f"{x},{y}" for x, y in places)
    dots = [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places]
    return [
        f'<polyline points="{joined}" fill="none" stroke="{colour}"{dash}/>',
        *dots,
        f'<text x="{MARGIN + 8}" y="{16 + 14 * number}" fill="{colour}">{html.escape(name)}</text>',
    ]
