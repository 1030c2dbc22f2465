"""Tables and sections of finished texts, and their Markdown and terminal forms (HTML: templates/)."""

from __future__ import annotations

import html
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from edgedisp.core.progress import printable
from edgedisp.report import formatting
from edgedisp.report.formatting import MISSING

FOLDER = files("edgedisp.report").joinpath("templates")
TEXTS: dict[str, Any] = tomllib.loads(FOLDER.joinpath("texts.toml").read_text(encoding="utf-8"))
TABLES: dict[str, Any] = tomllib.loads(FOLDER.joinpath("tables.toml").read_text(encoding="utf-8"))
TERMS: dict[str, str] = TEXTS["terms"]
HARMLESS = re.compile(r"[0-9A-Za-z\s.,:+\-–±%\[\]*/]*")  # figures and plain words need no escaping
FIGURE = re.compile(rf"[-+<]?\d|{MISSING}$")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Grid:
    """A table of texts. bars: lengths, one a row, drawn in its head. folded: hidden behind the caption."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    bars: Sequence[float] = ()
    folded: bool = False

    @property
    def text_columns(self) -> list[int]:
        """The left-aligned columns: the first, and each that holds words."""
        columns = range(len(self.head))
        return [at for at in columns if at == 0 or not all(FIGURE.match(row[at]) for row in self.rows)]

    def without_empty_columns(self) -> Grid:
        columns = [at for at in range(len(self.head)) if any(row[at] != MISSING for row in self.rows)]
        head, *rows = (tuple(row[at] for at in columns) for row in (self.head, *self.rows))
        return replace(self, head=head, rows=tuple(rows))


def grid(key: str, rows: Iterable[tuple[str, Any]], caption: str = "", **layout: Any) -> Grid:
    """A table of templates/tables.toml over (name, object); layout: bars, folded.

    A table without columns of its own takes rows (name, {heading: text}).
    """
    table, rows = TABLES[key], list(rows)
    if (columns := table.get("columns")) is None:
        head = tuple(dict.fromkeys(heading for _, texts in rows for heading in texts))
        body = [(name, *(texts.get(heading, MISSING) for heading in head)) for name, texts in rows]
    else:
        head = tuple(columns)
        values = [_compiled(expression) for expression in columns.values()]
        body = [(name, *(str(value(row=row)) for value in values)) for name, row in rows]
    layout = {"folded": table.get("folded", False), **layout}
    return Grid((table["name"], *head), tuple(body), caption or table.get("caption", ""), **layout)


def facts(key: str, row: Any) -> list[tuple[str, str]]:
    """The facts `key` of templates/tables.toml about an object as (label, text), without empty ones."""
    texts = {name: _compiled(text)(row=row) for name, text in TABLES["facts"][key].items()}
    return [(name, str(text)) for name, text in texts.items() if text and text != MISSING]


@cache
def _compiled(expression: str) -> Callable[..., Any]:
    return _environment().compile_expression(expression)


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
    """A section without empty parts, titled by texts.toml. parts: facts, plots, notes, code."""
    title, usual_lead = TEXTS["sections"][key]
    filled = tuple(table.without_empty_columns() for table in grids if table.rows)
    tuples = {name: tuple(item for item in part if all(item)) for name, part in parts.items()}
    return Section(key, title, filled, lead or usual_lead, **tuples)


def template(name: str) -> Template:
    """A file of templates/: what goes into HTML is escaped, into Markdown by the filter `md`."""
    return _environment().get_template(name)


def notes(name: str, *values: Any) -> list[str]:
    """The lines of a macro of templates/notes.j2."""
    lines = getattr(template("notes.j2").module, name)(*values).splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


def fill_markdown(name: str, **content: Any) -> str:
    """A filled template without repeated blank lines."""
    return re.sub(r"\n{3,}", "\n\n", template(name).render(**content)).strip() + "\n"


@cache
def _environment() -> Environment:
    """Filters are the functions of formatting.py and a few of this module."""
    environment = Environment(
        loader=PackageLoader("edgedisp.report"),
        autoescape=lambda name: ".html." in (name or ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    formatters = {name: value for name, value in vars(formatting).items() if callable(value)}
    forms = {"md": escape_markdown, "yaml": json.dumps, "fenced": fenced, "grid_markdown": grid_markdown}
    environment.filters |= formatters | forms
    environment.tests["hub_id"] = lambda text: HUB_ID.fullmatch(str(text)) is not None
    environment.globals |= {"missing": MISSING, "texts": TEXTS}
    return environment


# Markdown


def grid_markdown(grid: Grid) -> str:
    """A Markdown table, figures right-aligned."""
    text_columns = grid.text_columns
    rule = [":--" if at in text_columns else "--:" for at in range(len(grid.head))]
    head, *rows = ([escape_markdown(text) for text in row] for row in (grid.head, *grid.rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *rows])


def escape_markdown(text: object) -> str:
    """Untrusted text inside Markdown: no HTML, new cell, new line, emphasis, link or code."""
    flat = " ".join(str(text).split())
    if HARMLESS.fullmatch(flat):
        return flat
    flat = re.sub(r"([\\|`*\[\]#~])", r"\\\1", html.escape(flat, quote=False))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", flat)


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


# Terminal


def grid_text(grid: Grid, width: int) -> str:
    """A table for a terminal; columns that do not fit go below, where the first column repeats."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = grid.without_empty_columns()
    sizes = column_widths(grid)
    bands = [[0]]
    for at in range(1, len(sizes)):
        if len(bands[-1]) > 1 and sum(sizes[column] for column in (*bands[-1], at)) > width:
            bands.append([0])
        bands[-1].append(at)
    console = Console(width=width, no_color=True, highlight=False, force_terminal=False)
    lines = [grid.caption] if grid.caption else []
    for band in bands:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
        for at in band:
            table.add_column(Text(printable(grid.head[at])), justify="right" if at else "left")
        for row in grid.rows:
            table.add_row(*(Text(printable(row[at])) for at in band))
        with console.capture() as captured:
            console.print(table)
        lines += [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join(lines)


def column_widths(grid: Grid) -> list[int]:
    """Characters that each column takes in a terminal, with the space between columns."""
    return [max(map(len, map(printable, column))) + 2 for column in zip(grid.head, *grid.rows)]
