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

from edgedisp.core.results import Condensation, DeviceResult, Run
from edgedisp.core.serialization import to_json
from edgedisp.report import plots_condensation
from edgedisp.report.devices import device_sections, on_devices_section
from edgedisp.report.figure import Plot, arm_color, data_urls, save
from edgedisp.report.formatting import count, plural, typographic
from edgedisp.report.layout import Section, escape_markdown, fenced, grid_markdown, joined_markdown, section
from edgedisp.report.plots import plots
from edgedisp.report.result_sections import (
    CONDENSATION,
    CORRELATIONS,
    arms_section,
    condensation_section,
    divergence_section,
    layer_grid,
    merge_section,
    mixed_section,
    model_grid,
    scores_section,
    survival_section,
)
from edgedisp.report.results_table import DIFFERENCE, Metric, Row, Table, table, table_markdown
from edgedisp.report.run_sections import (
    fairness_section,
    latency_section,
    limits_section,
    parity_section,
    reproduce_section,
    sizes_section,
    stages_section,
    training_section,
)
from edgedisp.report.verdict import verdict

FORMAT = 3
"""Of report.json; raised when a key changes its meaning."""
PAGE, MARKDOWN, DATA = "report.html", "report.md", "report.json"
PLOTS = "plots"


def write(run: Run, out: Path) -> list[Path]:
    """Write report.html, report.md, report.json and plots/*.png into `out` (made if absent).

    Returns the files. Plots of an earlier report that no longer exist are removed.
    """
    drawn = plots(run)
    sections = report_sections(run, drawn)
    folder = out / PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.png"), *folder.glob("*.svg")):
        path.unlink()
    texts = {
        PAGE: page(run, sections, drawn),
        MARKDOWN: markdown(run, sections, drawn),
        DATA: report_json(run),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [*(out / name for name in texts), *(save(plot, folder) for plot in drawn.values())]


def report_sections(run: Run, drawn: Mapping[str, Plot]) -> list[Section]:
    """All sections that have content, in reading order."""
    names = set(drawn)
    found = (
        fairness_section(run),
        arms_section(run, names),
        scores_section(run, names),
        divergence_section(run),
        condensation_section(run, names),
        training_section(run, names),
        merge_section(run),
        survival_section(run, names),
        latency_section(run, names),
        on_devices_section(run),
        mixed_section(run, names),
        parity_section(run),
        sizes_section(run),
        stages_section(run),
        reproduce_section(run),
        limits_section(run),
    )
    return [one for one in found if not one.is_empty]


def report_json(run: Run) -> str:
    """{format, run, table, verdict} as one JSON document."""
    said = verdict(run)
    document = {
        "format": FORMAT,
        "run": to_json(run),
        "table": to_json(table(run)),
        "verdict": {**to_json(said), "sentence": said.sentence},
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def single_page(run: Run) -> str:
    """The HTML page alone, pictures within."""
    drawn = plots(run)
    return page(run, report_sections(run, drawn), drawn)


def page(run: Run, sections: Sequence[Section], drawn: Mapping[str, Plot]) -> str:
    """The self-contained page of a report."""
    built = table(run)
    return _render(
        run.title,
        sections,
        drawn,
        run.arms,
        facts=subtitle(run),
        verdict=verdict(run),
        table=built,
        rows=[_row_view(built, row) for row in built.rows],
    )


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


def _row_view(built: Table, row: Row) -> dict[str, Any]:
    """A row of the page's table: costs take one column with a line per arm, scores one column per arm."""
    cells: list[dict[str, Any]] = []
    for metric in built.metrics:
        if metric.kind == "cost":
            by_arm = [(arm, metric.text(row.value(metric, arm))) for arm in built.arms]
            same = len({text for _, text in by_arm}) == 1
            lines = [] if same else by_arm
            cells.append({"kind": "cost", "main": by_arm[0][1] if same else "", "lines": lines})
        else:
            cells += [_cell_view(metric, row, column) for column in built.columns(metric)]
    return {"label": row.label, "cells": cells}


def _cell_view(metric: Metric, row: Row, column: str) -> dict[str, Any]:
    """Main text, the interval below it, and the outcome in a word (never colour alone)."""
    cell = row.difference(metric) if column == DIFFERENCE else None
    outcome = cell.outcome if cell and cell.outcome in ("better", "worse") else ""
    main, _, interval = row.text(metric, column).rstrip("*").partition(" [")
    return {"kind": "score", "main": main, "interval": interval.rstrip("]"), "outcome": outcome}


def markdown(run: Run, sections: Sequence[Section], drawn: Mapping[str, Plot]) -> str:
    """The same content as Markdown, pictures linked from plots/."""
    said = verdict(run)
    first, *rest = map(escape_markdown, said.parts)
    by_precision = f"Held-out loss by precision: {said.by_precision}." if said.by_precision else ""
    blocks = [
        f"# {escape_markdown(run.title)}",
        " · ".join(map(escape_markdown, subtitle(run))),
        f"**{first}** {' '.join(rest)}".rstrip(),
        escape_markdown(by_precision),
        table_markdown(table(run)).rstrip(),
    ]
    return joined_markdown([*blocks, *(block for one in sections for block in _section_markdown(one, drawn))])


def _section_markdown(one: Section, drawn: Mapping[str, Plot]) -> list[str]:
    blocks = [f"## {one.title}", escape_markdown(one.lead)]
    blocks.append(
        "\n".join(f"- {escape_markdown(name)}: {escape_markdown(text)}" for name, text in one.facts)
    )
    for plot in (drawn[name] for name in one.plots):
        blocks += [
            f"### {plot.title}",
            f"![{plot.title}]({PLOTS}/{plot.name}.png)",
            escape_markdown(plot.caption),
        ]
    for grid in one.grids:
        blocks += [f"**{escape_markdown(grid.caption)}**" if grid.caption else "", grid_markdown(grid)]
    blocks.append("\n".join(f"- {escape_markdown(note)}" for note in one.notes))
    for caption, text in one.code:
        blocks += [f"**{escape_markdown(caption)}**", fenced(text)]
    return blocks


def devices_page(devices: Sequence[DeviceResult]) -> str:
    """`edgedisp bench --html`: all devices of one measurement on one page."""
    bundles = {row.label for device in devices for row in device.rows}
    facts = [plural(len(devices), "device"), *([plural(len(bundles), "bundle")] if bundles else [])]
    title = ", ".join(device.device for device in devices)
    return _render(title, device_sections(devices), {}, [], facts=facts)


def write_condensation(profiles: Mapping[str, Condensation], document: Any, out: Path) -> list[Path]:
    """Write condensation.html, condensation.json (`document`) and the pictures into `out`, made if absent.

    profiles: one or two models; the second has `change`. Raises OSError where the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = list(profiles)
    figures = (
        plots_condensation.condensation_heatmap,
        plots_condensation.condensation_layers,
        plots_condensation.condensation_outliers,
    )
    made = [figure(profiles, names) for figure in figures]
    drawn = {plot.name: plot for plot in made if plot is not None}
    first, last = profiles[names[0]], profiles[names[-1]]
    change = [layer_grid(f"{names[-1]} - {names[0]}", last.change, signs=True)] if last.change else []
    grids = [model_grid(dict(profiles)), *change, *(layer_grid(name, one) for name, one in profiles.items())]
    content = section(
        "condensation", "Condensation", grids, CONDENSATION, plots=tuple(drawn), notes=(CORRELATIONS,)
    )
    facts = [f"{count(first.tokens)} tokens in {count(first.sequences)} sequences"]
    texts = {
        "condensation.html": _render(" and ".join(names), [content], drawn, names, facts=facts),
        "condensation.json": json.dumps(to_json(document), ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [*(out / name for name in texts), *(save(plot, out) for plot in drawn.values())]


def _render(
    title: str, sections: Sequence[Section], drawn: Mapping[str, Plot], arms: Sequence[str], **parts: Any
) -> str:
    environment = Environment(
        loader=PackageLoader("edgedisp.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["minus"] = typographic
    pictures = {name: data_urls(plot) for name, plot in drawn.items()}
    colors = {arm: arm_color(arm, arms) for arm in arms}
    content = {"verdict": None, "table": None, "rows": [], **parts}
    template = environment.get_template("page.html.j2")
    return template.render(
        title=title, sections=sections, plots=drawn, pictures=pictures, colors=colors, **content
    )
