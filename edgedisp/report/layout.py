"""Tables and sections without a form, and their forms: Markdown and terminal text (HTML: templates/)."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgedisp.report.formatting import MISSING

HARMLESS = re.compile(r"[0-9A-Za-z\s.,:+\-–±%\[\]*/]*")  # figures and plain words need no escaping


@dataclass(frozen=True)
class Grid:
    """A table of finished texts.

    text_columns: left-aligned ones. bars: shares, one a row, drawn in its head. folded: hidden behind the
    caption.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    text_columns: tuple[int, ...] = (0,)
    bars: tuple[float, ...] = ()
    folded: bool = False

    def without_empty_columns(self) -> Grid:
        columns = [at for at in range(len(self.head)) if any(row[at] != MISSING for row in self.rows)]
        return Grid(
            tuple(self.head[at] for at in columns),
            tuple(tuple(row[at] for at in columns) for row in self.rows),
            self.caption,
            tuple(place for place, at in enumerate(columns) if at in self.text_columns),
            self.bars,
            self.folded,
        )


@dataclass(frozen=True)
class Section:
    """One section: lead, facts (label, text), plots (names), grids, notes, code (caption, text)."""

    key: str
    title: str
    lead: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    plots: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()
    notes: tuple[str, ...] = ()
    code: tuple[tuple[str, str], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but a lead."""
        return not (self.facts or self.plots or self.grids or self.notes or self.code)


def section(key: str, title: str, grids: Iterable[Grid] = (), lead: str = "", **parts: object) -> Section:
    """A section with the grids that have rows; its lead only where it has content."""
    made = Section(key, title, "", grids=tuple(grid for grid in grids if grid.rows), **parts)  # type: ignore[arg-type]
    return Section(**{**vars(made), "lead": "" if made.is_empty else lead})


def grid_markdown(grid: Grid) -> str:
    """A Markdown table, figures right-aligned."""
    rule = [":--" if index in grid.text_columns else "--:" for index in range(len(grid.head))]
    body = [[escape_markdown(text) for text in row] for row in (grid.head, *grid.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [body[0], rule, *body[1:]])


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


def grid_text(grid: Grid, width: int) -> str:
    """A table for a terminal; what does not fit beside the text columns goes below in another band."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = grid.without_empty_columns()
    names = [at for at in range(len(grid.head)) if at in grid.text_columns]
    sizes = [max(len(printable(row[at])) for row in (grid.head, *grid.rows)) for at in range(len(grid.head))]
    console = Console(width=width, no_color=True, highlight=False, force_terminal=False)
    bands: list[list[int]] = [[]]
    free = room = width - sum(sizes[at] + 2 for at in names)
    for at in (at for at in range(len(grid.head)) if at not in names):
        if sizes[at] + 2 > free and bands[-1]:
            bands.append([])
            free = room
        bands[-1].append(at)
        free -= sizes[at] + 2
    lines: list[str] = [grid.caption] if grid.caption else []
    for band in bands:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
        for at in (*names, *band):
            table.add_column(Text(printable(grid.head[at])), justify="left" if at in names else "right")
        for row in grid.rows:
            table.add_row(*(Text(printable(row[at])) for at in (*names, *band)))
        with console.capture() as captured:
            console.print(table)
        lines += [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(lines)


def printable(text: str) -> str:
    """Control characters, which a terminal would obey, become spaces."""
    return "".join(char if char.isprintable() else " " for char in text)


def joined_markdown(blocks: Sequence[str]) -> str:
    return "\n\n".join(block for block in blocks if block) + "\n"
