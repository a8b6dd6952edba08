"""A report as HTML, Markdown, CSV or JSON: tables and pictures, whatever they are about."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NamedTuple

from prunetool.errors import plain


class Cell(NamedTuple):
    """A table cell; ``value``, 0 to 1, sets its colour (NaN: grey)."""

    text: object
    value: float | None = None
    title: str = ""

    @property
    def number(self) -> float | str | None:
        """For programs: the number that is shown if it is one alone, else the text; None for –."""
        text = str(self.text)
        if text in (NOTHING.text, "nan", "inf", "-inf"):
            return None
        if not NUMBER.fullmatch(text):
            return text
        digits = text.replace(",", "")
        if digits.endswith("%"):
            return float(digits[:-1]) / 100
        return int(digits) if digits.lstrip("-").isdigit() else float(digits)


NOTHING = Cell("–")
NUMBER = re.compile(r"-?\d[\d,]{0,30}(\.\d+)?(e[+-]\d+)?%?", re.ASCII)
WIDEST = 300  # characters of a cell in Markdown
Row = Sequence[object]  # its name, then `Cell` or other values


class Table(NamedTuple):
    """A table.

    Attributes:
      caption: what it shows.
      rows: the first value of a row names it.
      head: names of all columns; none if the rows are pairs.
      kind: ``numbers``, ``words`` or ``map``.
      folded: only the caption is seen first.
    """

    caption: str
    rows: Sequence[Row]
    head: Sequence[str] = ()
    kind: str = "numbers"
    folded: bool = False


class Figure(NamedTuple):
    """A picture, and the name for a file of it."""

    caption: str
    svg: str
    name: str


class Page(NamedTuple):
    """A report: its title, and its parts in order."""

    title: str
    parts: Sequence[Table | Figure]

    @property
    def tables(self) -> list[Table]:
        """The tables alone."""
        return [part for part in self.parts if isinstance(part, Table)]

    @property
    def figures(self) -> list[Figure]:
        """The pictures alone."""
        return [part for part in self.parts if isinstance(part, Figure)]


def as_html(page: Page) -> str:
    """One self-contained page, in ASCII, since standard output may have any encoding."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"colour": _colour, "as_cell": as_cell}
    source = resources.files("prunetool").joinpath("templates/report.html").read_text("utf-8")
    made = environment.from_string(source).render(page=page)
    return made.encode("ascii", "xmlcharrefreplace").decode()


def as_markdown(page: Page) -> str:
    """Tables alone, as GitHub and the Hub show them."""
    lines = [f"# {plain(page.title)}", ""]
    for table in page.tables:
        width = max(len(row) for row in table.rows)
        names = [*table.head, *[""] * (width - len(table.head))]
        rule = "|---|" + "---:|" * (width - 1)
        lines += [f"## {plain(table.caption, WIDEST)}", "", _markdown(names), rule]
        lines += map(_markdown, table.rows)
        lines.append("")
    return "\n".join(lines)


def _markdown(row: Row) -> str:
    return f"| {' | '.join(plain(str(as_cell(cell).text), WIDEST) for cell in row)} |"


def as_csv(page: Page) -> str:
    """A line for each cell: table, row, column, value."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["table", "row", "column", "value"])
    for table in page.tables:
        for first, *cells in table.rows:
            for number, cell in enumerate(cells, 1):
                name = table.head[number] if table.head else ""
                lines.writerow(
                    [*map(_unformulated, (table.caption, first, name, as_cell(cell).number))]
                )
    return out.getvalue()


def _unformulated(value: object) -> object:
    """A text that a spreadsheet does not take for a formula."""
    risky = isinstance(value, str) and value[:1] in ("=", "+", "-", "@")
    return f"'{value}" if risky else value


def as_json(page: Page) -> str:
    """An object with all tables."""
    tables = [
        {
            "caption": table.caption,
            "columns": list(table.head),
            "rows": [
                [first, *(as_cell(cell).number for cell in cells)] for first, *cells in table.rows
            ],
        }
        for table in page.tables
    ]
    value = {"title": page.title, "tables": tables}
    return json.dumps(value, indent=1) + "\n"


class Form(NamedTuple):
    """A format of reports: the suffix of its files, and what makes it."""

    suffix: str
    render: Callable[[Page], str]


FORMS = {
    "html": Form(".html", as_html),
    "markdown": Form(".md", as_markdown),
    "csv": Form(".csv", as_csv),
    "json": Form(".json", as_json),
}


def as_cell(value: Any) -> Cell:
    """A value of a row as a cell."""
    return value if isinstance(value, Cell) else Cell(value)


def _colour(value: float) -> str:
    """Background from light (0) to dark (1), and a readable text colour; grey for NaN."""
    if not math.isfinite(value):
        return "background:#ddd"
    ink = "#fff" if value > 0.8 else "#000"  # above this, white is more legible
    return f"background:hsl(210 65% {96 - 62 * min(max(value, 0), 1):.1f}%);color:{ink}"
