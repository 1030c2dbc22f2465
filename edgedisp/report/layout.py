"""Tables and sections of finished texts, and their Markdown and terminal forms (HTML: templates/)."""

from __future__ import annotations

import html
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, TypeVar

from edgedisp.report.formatting import MISSING

TEXTS: dict[str, Any] = tomllib.loads(
    files("edgedisp.report").joinpath("templates/texts.toml").read_text(encoding="utf-8")
)
TERMS: dict[str, str] = TEXTS["terms"]
HARMLESS = re.compile(r"[0-9A-Za-z\s.,:+\-–±%\[\]*/]*")  # figures and plain words need no escaping
FIGURE = re.compile(rf"[-+<]?\d|{MISSING}$")
T = TypeVar("T")


@dataclass(frozen=True)
class Grid:
    """A table of texts. bars: shares, one a row, drawn in its head. folded: hidden behind the caption."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    bars: tuple[float, ...] = ()
    folded: bool = False

    @property
    def text_columns(self) -> list[int]:
        """The left-aligned columns: the first, and each that holds words."""
        has_words = [any(not FIGURE.match(row[at]) for row in self.rows) for at in range(len(self.head))]
        return [at for at, words in enumerate(has_words) if words or at == 0]

    def without_empty_columns(self) -> Grid:
        columns = [at for at in range(len(self.head)) if any(row[at] != MISSING for row in self.rows)]
        head, *rows = (tuple(row[at] for at in columns) for row in (self.head, *self.rows))
        return replace(self, head=head, rows=tuple(rows))


def grid(
    name: str,
    rows: Iterable[tuple[str, T]],
    columns: Mapping[str, Callable[[T], str]],
    caption: str = "",
    **layout: Any,
) -> Grid:
    """A table of objects (name, object); columns: heading -> the text of an object in that column."""
    texts = tuple((key, *(text(one) for text in columns.values())) for key, one in rows)
    return Grid((name, *columns), texts, caption, **layout)


@dataclass(frozen=True)
class Section:
    """One section: lead, facts (label, text), grids, notes, code (caption, text).

    plots: names; those that the run has no data for are not drawn.
    """

    key: str
    title: str
    grids: tuple[Grid, ...] = ()
    lead: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    plots: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    code: tuple[tuple[str, str], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but a lead and names of plots."""
        return not (self.facts or self.grids or self.notes or self.code)


def section(key: str, grids: Iterable[Grid] = (), lead: str = "", **parts: Iterable[Any]) -> Section:
    """A section without empty grids and columns, with its title and lead. parts: facts, plots, notes."""
    title, usual_lead = TEXTS["sections"][key]
    filled = tuple(one.without_empty_columns() for one in grids if one.rows)
    return Section(
        key, title, filled, lead or usual_lead, **{name: tuple(part) for name, part in parts.items()}
    )


def grid_markdown(grid: Grid) -> str:
    """A Markdown table, figures right-aligned."""
    text_columns = grid.text_columns
    rule = [":--" if at in text_columns else "--:" for at in range(len(grid.head))]
    head, *rows = ([escape_markdown(text) for text in row] for row in (grid.head, *grid.rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def escape_markdown(text: str) -> str:
    """Untrusted text inside Markdown: no HTML, new cell, new line, emphasis, link or code."""
    flat = " ".join(str(text).split())
    if HARMLESS.fullmatch(flat):
        return flat
    flat = re.sub(r"([\\|`*\[\]#~])", r"\\\1", html.escape(flat, quote=False))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", flat)


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def grid_text(grid: Grid, width: int, names: int = 1) -> str:
    """A table for a terminal; columns that do not fit go below, where the first `names` columns repeat."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = grid.without_empty_columns()
    sizes = [
        max(len(printable(row[at])) + 2 for row in (grid.head, *grid.rows)) for at in range(len(grid.head))
    ]
    bands: list[list[int]] = [[]]
    for at in range(names, len(grid.head)):
        if bands[-1] and sum(sizes[:names]) + sum(sizes[one] for one in (*bands[-1], at)) > width:
            bands.append([])
        bands[-1].append(at)
    console = Console(width=width, no_color=True, highlight=False, force_terminal=False)
    lines = [grid.caption] if grid.caption else []
    for band in bands:
        columns = (*range(names), *band)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
        for at in columns:
            table.add_column(Text(printable(grid.head[at])), justify="left" if at < names else "right")
        for row in grid.rows:
            table.add_row(*(Text(printable(row[at])) for at in columns))
        with console.capture() as captured:
            console.print(table)
        lines += [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(lines)


def printable(text: str) -> str:
    """Control characters, which a terminal would obey, become spaces."""
    return "".join(char if char.isprintable() else " " for char in text)
