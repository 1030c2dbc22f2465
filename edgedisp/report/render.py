"""The files of a report: HTML, Markdown and JSON of one content, and the pages of single measurements.

A page is one file with no script, no outside link and a content policy that would block both; the recipe,
names and texts in it are untrusted and escaped by the template (autoescape).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from edgedisp.core.files import to_json
from edgedisp.core.results import REPORT_FORMAT, Condensation, DeviceResult
from edgedisp.core.run import Run
from edgedisp.report import plots_condensation
from edgedisp.report.devices import device_sections, latency_section, on_devices_section
from edgedisp.report.figure import Plot, arm_color, data_urls, save
from edgedisp.report.formatting import count, plural, typographic
from edgedisp.report.layout import TERMS, Section, escape_markdown, fenced, grid_markdown, section
from edgedisp.report.plots import plots
from edgedisp.report.result_sections import (
    arms_section,
    condensation_section,
    divergence_section,
    layer_grid,
    model_grid,
    scores_section,
)
from edgedisp.report.results_table import DIFFERENCE, Metric, Row, Table, table, table_markdown
from edgedisp.report.run_sections import (
    fairness_section,
    limits_section,
    parity_section,
    reproduce_section,
    sizes_section,
    stages_section,
    training_section,
)
from edgedisp.report.verdict import verdict
from edgedisp.report.weight_sections import merge_section, mixed_section, survival_section

PLOTS = "plots"
SECTIONS = (
    fairness_section,
    arms_section,
    scores_section,
    divergence_section,
    condensation_section,
    training_section,
    merge_section,
    survival_section,
    latency_section,
    on_devices_section,
    mixed_section,
    parity_section,
    sizes_section,
    stages_section,
    reproduce_section,
    limits_section,
)


def write(run: Run, output_dir: Path) -> list[Path]:
    """Write report.html, report.md, report.json and plots/*.png into `output_dir` (made if absent).

    Returns the files. Plots of an earlier report that no longer exist are removed.
    """
    drawn = plots(run)
    folder = output_dir / PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.png"), *folder.glob("*.svg")):
        path.unlink()
    texts = {
        "report.html": page(run, drawn),
        "report.md": markdown(run, drawn),
        "report.json": report_json(run),
    }
    for name, text in texts.items():
        (output_dir / name).write_text(text, encoding="utf-8")
    return [*(output_dir / name for name in texts), *(save(plot, folder) for plot in drawn.values())]


def report_json(run: Run) -> str:
    """{format, run, table, verdict} as one JSON document."""
    result = verdict(run)
    document = {
        "format": REPORT_FORMAT,
        "run": to_json(run),
        "table": to_json(table(run)),
        "verdict": {**to_json(result), "sentence": result.sentence},
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sections(run: Run) -> list[Section]:
    """All sections that have content, in reading order."""
    return [one for one in (build(run) for build in SECTIONS) if not one.is_empty]


def subtitle(run: Run) -> list[str]:
    """The line under the title: base model, training, context, machine, date."""
    tokens = sorted({one.tokens for one in run.training.values()})
    context = run.corpus.get("context")
    facts = (
        str(run.model.get("base") or "").rsplit("/", 1)[-1],
        f"{' or '.join(map(count, tokens))} training tokens per arm" if tokens else "",
        plural(len(run.seeds), "seed") if len(run.seeds) > 1 else "",
        f"context {count(context)}" if context else "",
        str(run.machine.get("cpu") or ""),
        run.created[:16].replace("T", " "),
        "smoke run" if run.smoke else "",
    )
    return [fact for fact in facts if fact]


# Markdown


def markdown(run: Run, drawn: Mapping[str, Plot]) -> str:
    """The content as Markdown, pictures linked from plots/."""
    result = verdict(run)
    first, *rest = map(escape_markdown, result.parts)
    blocks = [
        f"# {escape_markdown(run.title)}",
        " · ".join(map(escape_markdown, subtitle(run))),
        f"**{first}** {' '.join(rest)}".rstrip(),
        escape_markdown(f"Held-out loss by precision: {result.by_precision}." if result.by_precision else ""),
        table_markdown(table(run)).rstrip(),
        *(block for part in sections(run) for block in _section_markdown(part, drawn)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _section_markdown(part: Section, drawn: Mapping[str, Plot]) -> list[str]:
    facts = [f"- {escape_markdown(name)}: {escape_markdown(text)}" for name, text in part.facts]
    blocks = [f"## {part.title}", escape_markdown(part.lead), "\n".join(facts)]
    for plot in (drawn[name] for name in part.plots if name in drawn):
        picture = f"![{plot.title}]({PLOTS}/{plot.name}.png)"
        blocks += [f"### {plot.title}", picture, escape_markdown(plot.caption)]
    for grid in part.grids:
        blocks += [f"**{escape_markdown(grid.caption)}**" if grid.caption else "", grid_markdown(grid)]
    blocks.append("\n".join(f"- {escape_markdown(note)}" for note in part.notes))
    for caption, text in part.code:
        blocks += [f"**{escape_markdown(caption)}**", fenced(text)]
    return blocks


# HTML


def single_page(run: Run) -> str:
    """The HTML page alone, pictures within."""
    return page(run, plots(run))


def page(run: Run, drawn: Mapping[str, Plot]) -> str:
    """The self-contained page of a report."""
    whole = table(run)
    rows = [_row_view(whole, row) for row in whole.rows]
    facts = subtitle(run)
    return _render(
        run.title, sections(run), drawn, run.arms, facts=facts, verdict=verdict(run), table=whole, rows=rows
    )


def _row_view(whole: Table, row: Row) -> dict[str, Any]:
    """A row of the page's table: costs take one column with a line per arm, scores one column per arm."""
    cells: list[dict[str, Any]] = []
    for metric in whole.metrics:
        if metric.kind == "cost":
            by_arm = [(arm, metric.text(row.value(metric, arm))) for arm in whole.arms]
            same = len({text for _, text in by_arm}) == 1
            lines = [] if same else by_arm
            cells.append({"kind": "cost", "main": by_arm[0][1] if same else "", "lines": lines})
        else:
            cells += [_cell_view(metric, row, column) for column in whole.columns(metric)]
    return {"label": row.label, "cells": cells}


def _cell_view(metric: Metric, row: Row, column: str) -> dict[str, Any]:
    """Main text, the interval below it, and the outcome in a word (never colour alone)."""
    cell = row.difference(metric) if column == DIFFERENCE else None
    outcome = cell.outcome if cell and cell.outcome in ("better", "worse") else ""
    main, _, interval = row.text(metric, column).rstrip("*").partition(" [")
    return {"kind": "score", "main": main, "interval": interval.rstrip("]"), "outcome": outcome}


def devices_page(devices: Sequence[DeviceResult]) -> str:
    """`edgedisp bench --html`: all devices of one measurement on one page."""
    bundles = {row.label for device in devices for row in device.rows}
    facts = [plural(len(devices), "device"), *([plural(len(bundles), "bundle")] if bundles else [])]
    return _render(", ".join(one.device for one in devices), device_sections(devices), {}, [], facts=facts)


def write_condensation(profiles: Mapping[str, Condensation], output_dir: Path) -> list[Path]:
    """Write condensation.html, condensation.json and the pictures into `output_dir`, made if absent.

    profiles: one or two models; the second has `change`. Raises OSError where the folder cannot be written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    names = list(profiles)
    figures = (
        plots_condensation.condensation_heatmap(profiles, names),
        plots_condensation.condensation_layers(profiles, names),
        plots_condensation.condensation_outliers(profiles, names),
    )
    drawn = {plot.name: plot for plot in figures if plot.panels}
    first, last = profiles[names[0]], profiles[names[-1]]
    change = [layer_grid(f"{names[-1]} - {names[0]}", last.change, signs=True)] if last.change else []
    grids = [model_grid(dict(profiles)), *change, *(layer_grid(name, one) for name, one in profiles.items())]
    content = section("condensation", grids, plots=tuple(drawn), notes=[TERMS["correlations"]])
    facts = [f"{count(first.tokens)} tokens in {count(first.sequences)} sequences"]
    texts = {
        "condensation.html": _render(" and ".join(names), [content], drawn, names, facts=facts),
        "condensation.json": json.dumps(to_json(profiles), ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        (output_dir / name).write_text(text, encoding="utf-8")
    return [*(output_dir / name for name in texts), *(save(plot, output_dir) for plot in drawn.values())]


def _render(
    title: str, parts: Sequence[Section], drawn: Mapping[str, Plot], arms: Sequence[str], **content: Any
) -> str:
    environment = Environment(
        loader=PackageLoader("edgedisp.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["minus"] = typographic
    content = {"verdict": None, "table": None, "rows": [], **content}
    return environment.get_template("page.html.j2").render(
        title=title,
        sections=parts,
        plots=drawn,
        pictures={name: data_urls(plot) for name, plot in drawn.items()},
        colors={arm: arm_color(arm, arms) for arm in arms},
        **content,
    )
