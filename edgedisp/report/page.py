"""`write`: one summary in, the whole report out.

HTML and Markdown are two forms of one content: title, verdict, before/after table, sections. The page is
one file with no script, no outside link and a content policy that would block both; the recipe, names and
texts in it are untrusted and escaped by the template (autoescape). report.json holds the summary with the
table and the verdict, for programs.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from edgedisp.report.before_after import (
    DIFFERENCE,
    Cell,
    Metric,
    Table,
    difference_texts,
    interval_text,
    table,
    value_text,
)
from edgedisp.report.claims import by_precision, verdict
from edgedisp.report.picture import Plot, arm_class, inline_svgs, save
from edgedisp.report.plots import NAMES, plots
from edgedisp.report.provenance import fairness, limits, reproduce, stages
from edgedisp.report.reading import Summary, arms, at, branch, finite, number, run_title, seeds
from edgedisp.report.rendering import escape_markdown, fenced, grid_markdown, render_markdown
from edgedisp.report.results import result_sections
from edgedisp.report.section import Section
from edgedisp.report.wording import count, typographic

FORMAT = 2  # of report.json; raised when a key changes its meaning. 1: `comparison` without the level of arms


def write(summary: Summary, out: Path) -> list[Path]:
    """Write report.html, report.md, report.json and plots/*.{svg,png} into `out` (made if absent).

    Returns the files written. Plots of an earlier report that no longer exist are removed.
    """
    clean, lost = _finite(summary)
    pictures = plots(clean)
    sections = _sections(clean, lost, set(pictures))
    folder = out / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    for name in set(NAMES) - set(pictures):
        for suffix in (".svg", ".png"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
    files = {
        "report.html": page(clean, sections, pictures),
        "report.md": markdown(clean, sections, pictures),
        "report.json": report_json(clean),
    }
    for name, text in files.items():
        unfinished = out / f"{name}.partial"  # whoever reads meanwhile gets the earlier report
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(out / name)
    return [
        *(out / name for name in files),
        *(path for plot in pictures.values() for path in save(plot, folder)),
    ]


def single(summary: Summary) -> str:
    """The page as text, without files beside it."""
    clean, lost = _finite(summary)
    pictures = plots(clean)
    return page(clean, _sections(clean, lost, set(pictures)), pictures)


def _finite(summary: Summary) -> tuple[dict[str, Any], list[str]]:
    """As `reading.finite`; the paths stay in the summary, for when a report is made from report.json."""
    clean, lost = finite(summary)
    lost = [*map(str, at(clean, "not_finite") or ()), *lost]
    return ({**clean, "not_finite": lost} if lost else clean), lost


def _sections(summary: Summary, lost: list[str], drawn: set[str]) -> list[Section]:
    first = fairness(summary)
    last = [section for section in (stages(summary), reproduce(summary)) if not section.empty]
    return [*([] if first.empty else [first]), *result_sections(summary, drawn), *last, limits(summary, lost)]


def report_json(summary: Summary) -> str:
    """The summary, the table's cells and the verdict as one JSON document, keys in the order given."""
    clean, _ = _finite(summary)
    document = {
        "format": FORMAT,
        "summary": clean,
        "table": table(clean).as_json(),
        "verdict": verdict(clean),
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# HTML


def page(summary: Summary, sections: list[Section], pictures: dict[str, Plot]) -> str:
    """The self-contained page."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["minus"] = typographic
    source = resources.files("edgedisp.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    built, said = table(summary), verdict(summary)
    return environment.from_string(source).render(
        title=run_title(summary),
        facts=subtitle(summary),
        smoke=bool(at(summary, "smoke")),
        verdict=said,
        by_precision=by_precision(said),
        table=built,
        rows=[_row_view(built, index) for index in range(len(built.rows))],
        legend=any(
            cell.low is not None
            for row in built.rows
            for group in row.cells.values()
            for cell in group.values()
        ),
        sections=sections,
        plots=pictures,
        classes={arm: arm_class(arm, arms(summary)) for arm in arms(summary)},
        more_arms=any(section.key == "arms" for section in sections),
        # Drawn by matplotlib, which escapes every text: the one thing let through unescaped.
        svgs={name: [Markup(svg) for svg in inline_svgs(plot)] for name, plot in pictures.items()},
    )


def subtitle(summary: Summary) -> list[str]:
    """The line under the title: base model, training, context, date."""
    tokens = {number(at(part, "tokens")) for part in branch(summary, "midtrain").values()} - {None}
    context = number(at(summary, "corpus", "context"))
    found = [
        str(at(summary, "model", "base") or "").rsplit("/", 1)[-1],
        f"{' or '.join(count(value) for value in sorted(tokens, key=str))} training tokens per arm"
        if tokens
        else "",
        f"{seeds(summary)} seeds" if seeds(summary) > 1 else "",
        f"context {count(context)}" if context else "",
        str(at(summary, "machine", "cpu") or at(summary, "machine", "cpu_model") or ""),
        str(at(summary, "created") or "")[:16].replace("T", " "),
    ]
    return [text for text in found if text]


def _row_view(built: Table, index: int) -> dict[str, Any]:
    """A row of the page's table: costs take one column with a line per arm, scores one column per arm."""
    row = built.rows[index]
    cells: list[dict[str, Any]] = []
    for metric in built.metrics:
        if metric.kind == "cost":
            by_arm = [(arm, value_text(metric, row.cell(metric.key, arm).value)) for arm in built.arms]
            same = len({text for _, text in by_arm}) == 1
            cells.append(
                {"kind": "cost", "main": by_arm[0][1] if same else "", "lines": [] if same else by_arm}
            )
        else:
            columns = built.columns(metric)
            group = [_cell_view(metric, column, row.cell(metric.key, column)) for column in columns]
            cells += [{**cell, "start": index == 0} for index, cell in enumerate(group)]
    return {"label": row.label, "cells": cells}


def _cell_view(metric: Metric, column: str, cell: Cell) -> dict[str, str]:
    """Main text, the interval below it, and a word where a difference is clear (never colour alone)."""
    if column != DIFFERENCE:
        shown = value_text(metric, cell.value)
        return {"main": shown, "sub": interval_text(metric, cell), "word": "", "kind": "score"}
    main, ends, _ = difference_texts(metric, cell)
    word = {True: "better", False: "worse", None: "clear" if cell.excludes_zero else ""}[metric.better(cell)]
    return {"main": main, "sub": ends, "word": word, "kind": "difference"}


# Markdown


def markdown(summary: Summary, sections: list[Section], pictures: dict[str, Plot]) -> str:
    """The same content as Markdown, pictures linked from plots/."""
    said = verdict(summary)
    blocks = [f"# {escape_markdown(run_title(summary))}"]
    blocks.append(" · ".join(map(escape_markdown, subtitle(summary))))
    first, *rest = said["parts"]
    blocks.append(f"**{escape_markdown(first)}** {escape_markdown(' '.join(rest))}".rstrip())
    if each := by_precision(said):
        blocks.append(escape_markdown(f"Held-out loss by precision: {each}."))
    blocks.append(render_markdown(table(summary)).rstrip())
    blocks += [block for section in sections for block in _section_markdown(section, pictures)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _section_markdown(section: Section, pictures: dict[str, Plot]) -> list[str]:
    blocks = [f"## {section.title}", escape_markdown(section.lead)]
    blocks.append(
        "\n".join(f"- {escape_markdown(name)}: {escape_markdown(text)}" for name, text in section.facts)
    )
    for name in section.plots:
        plot = pictures[name]
        blocks += [
            f"### {plot.title}",
            f"![{escape_markdown(plot.description)}](plots/{name}.png)",
            escape_markdown(plot.caption),
        ]
    for grid in section.grids:
        blocks.append(f"**{escape_markdown(grid.caption)}**" if grid.caption else "")
        blocks.append(grid_markdown(grid.head, grid.rows, grid.text_columns))
    blocks.append("\n".join(f"- {escape_markdown(note)}" for note in section.notes))
    for caption, text in section.code:
        blocks += [f"**{escape_markdown(caption)}**", fenced(text)]
    return blocks
