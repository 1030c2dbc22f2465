"""The before/after table as terminal text and as Markdown.

A terminal is narrow and the table is wide, so column groups are packed into bands: as many whole groups
side by side as fit, then the next band below with the row names repeated. When one group alone does not
fit, intervals shrink from `[low, high]` to `±half` and then go; a column that still does not fit gets a
band alone. Plain characters rather than a rich Table: the same text goes to a pipe, a log and a terminal.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence

from edgedisp.report.before_after import (
    DIFFERENCE,
    Cell,
    Metric,
    Row,
    Table,
    difference_texts,
    interval_text,
    value_text,
)

GAP = "  "
INTERVAL = "[low, high]: 95 % interval."
PAIRED = "Difference: {minuend} - baseline, paired; *: its interval excludes 0."
HARMLESS = re.compile(r"[0-9A-Za-z\s.,:+\-–±%\[\]*/]*")  # figures and plain words need no escaping
Column = tuple[Metric, str]
LONGEST = 14  # characters of an arm's or a precision's name


def cell_text(metric: Metric, column: str, cell: Cell, style: str = "full") -> str:
    """One cell; a clear difference ends in `*`.

    `style`: full `11.93 [11.10, 12.80]`, short `11.93 ±0.85`, bare `11.93`.
    """
    if column == DIFFERENCE:
        shown, ends, half = difference_texts(metric, cell)
    else:
        shown, ends = value_text(metric, cell.value), interval_text(metric, cell)
        half = value_text(metric, cell.half_width) if ends else ""
    if ends and style == "full":
        shown = f"{shown} [{ends}]"
    elif ends and style == "short":
        shown = f"{shown} ±{half}"
    return f"{shown}*" if column == DIFFERENCE and cell.excludes_zero else shown


def render_text(table: Table, width: int = 80) -> str:
    """The table for a terminal of `width` columns (at least 40); no line is longer."""
    width = max(width, 40)
    if not table.rows or not table.metrics:
        return "No figures."
    names = max(9, *(len(_cut(row.label, LONGEST)) for row in table.rows))
    groups = [[(metric, column) for column in table.columns(metric)] for metric in table.metrics]
    style = _style(table, groups, width - names)
    bands = _bands(table, _fitting(table, groups, style, width - names), style, width - names)
    blocks = ["\n".join(_band(table, band, style, names, width)) for band in bands]
    notes = [_cut(note, 10 * width) for note in (_legend(table), *table.notes) if note]
    wrapped = [textwrap.fill(note, width, subsequent_indent="  ") for note in notes]
    return "\n\n".join([*blocks, "\n".join(wrapped)] if wrapped else blocks)


def _legend(table: Table) -> str:
    groups = [group for row in table.rows for group in row.cells.values()]
    paired = any(group.get(DIFFERENCE, Cell()).low is not None for group in groups)
    intervals = any(cell.low is not None for group in groups for cell in group.values())
    return " ".join([INTERVAL] * intervals + [PAIRED.format(minuend=table.minuend)] * paired)


def _column_width(table: Table, column: Column, style: str) -> int:
    texts = [cell_text(*column, row.cell(column[0].key, column[1]), style) for row in table.rows]
    return max(len(_cut(column[1], LONGEST)), *map(len, texts))


def _group_width(table: Table, group: Sequence[Column], style: str) -> int:
    """Columns with a gap before each; a short group is as wide as its heading."""
    columns = sum(len(GAP) + _column_width(table, column, style) for column in group)
    return max(columns, len(GAP) + min(len(group[0][0].heading), 16))


def _style(table: Table, groups: Sequence[Sequence[Column]], room: int) -> str:
    """The fullest style in which every single group fits."""
    for style in ("full", "short"):
        if all(_group_width(table, group, style) <= room for group in groups):
            return style
    return "bare"


def _fitting(table: Table, groups: list[list[Column]], style: str, room: int) -> list[list[Column]]:
    """Groups that are too wide even so are cut into single columns."""
    out: list[list[Column]] = []
    for group in groups:
        fits = _group_width(table, group, style) <= room
        out += [group] if fits else [[column] for column in group]
    return out


def _bands(table: Table, groups: list[list[Column]], style: str, room: int) -> list[list[list[Column]]]:
    bands: list[list[list[Column]]] = []
    left = 0
    for group in groups:
        need = _group_width(table, group, style) + (len(GAP) if bands else 0)
        if not bands or need > left:
            bands.append([])
            left = room
            need = _group_width(table, group, style)
        bands[-1].append(group)
        left -= need
    return bands


def _band(table: Table, band: list[list[Column]], style: str, names: int, width: int) -> list[str]:
    """Heading, column names, a rule and the rows of one band."""
    spans = [_group_width(table, group, style) for group in band]
    titles = [_cut(group[0][0].heading, span - len(GAP)).rjust(span) for group, span in zip(band, spans)]
    heads = [
        _join(table, group, style, span, [_cut(column, LONGEST) for _, column in group])
        for group, span in zip(band, spans)
    ]
    lines = [" " * names + GAP.join(titles), "precision".ljust(names) + GAP.join(heads)]
    lines.append("─" * min(width, len(lines[1])))
    last = None
    for row in table.rows:
        if len(table.runs) > 1 and row.run != last:
            lines.append(_cut(row.run, width))
        last = row.run
        cells = [
            _join(table, group, style, span, _texts(row, group, style)) for group, span in zip(band, spans)
        ]
        lines.append((_cut(row.label, LONGEST).ljust(names) + GAP.join(cells)).rstrip())
    return lines


def _texts(row: Row, group: Sequence[Column], style: str) -> list[str]:
    return [cell_text(*column, row.cell(column[0].key, column[1]), style) for column in group]


def _join(table: Table, group: Sequence[Column], style: str, span: int, texts: Sequence[str]) -> str:
    widths = [_column_width(table, column, style) for column in group]
    return "".join(GAP + text.rjust(size) for text, size in zip(texts, widths)).rjust(span)


def _cut(text: str, size: int) -> str:
    """At most `size` characters; control characters (a terminal would obey them) become spaces."""
    text = "".join(char if char.isprintable() else " " for char in text)
    return text if len(text) <= size else text[: max(0, size - 1)] + "…"


def render_markdown(table: Table) -> str:
    """One Markdown table; with several runs the first column names the run."""
    columns = [(metric, column) for metric in table.metrics for column in table.columns(metric)]
    several = len(table.runs) > 1
    head = ["run"] * several + ["precision"] + [f"{metric.heading}: {column}" for metric, column in columns]
    rows = []
    for row in table.rows:
        cells = [cell_text(*column, row.cell(column[0].key, column[1])) for column in columns]
        rows.append([row.run] * several + [row.label, *cells])
    lines = [grid_markdown(head, rows, text_columns=range(1 + several))]
    lines += [f"\n{escape_markdown(note)}" for note in (_legend(table), *table.notes) if note]
    return "\n".join(lines) + "\n"


def grid_markdown(
    head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = (0,)
) -> str:
    """A Markdown table, figures right-aligned."""
    rule = [":--" if index in text_columns else "--:" for index in range(len(head))]
    body = [[escape_markdown(text) for text in row] for row in [head, *rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in [body[0], rule, *body[1:]])


def escape_markdown(text: str) -> str:
    """Untrusted text inside Markdown: no HTML, no new cell, no new line, no emphasis, link or code."""
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
