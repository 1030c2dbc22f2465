"""The files of a report: HTML, Markdown and JSON of one content, and the pages of single measurements.

A page is one file with no script, no outside link and a content policy that would block both; the recipe,
names and texts in it are untrusted and escaped by the template (autoescape).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedisp.core.files import sealed, to_json, write_json, write_text
from edgedisp.core.results import REPORT_FORMAT, Condensation, DeviceResult
from edgedisp.core.run import Run
from edgedisp.report import devices, sections
from edgedisp.report.figure import Plot, arm_color, data_urls, save
from edgedisp.report.formatting import count, plural
from edgedisp.report.layout import Grid, Section, fill_markdown, grid, notes, section, template
from edgedisp.report.plots import condensation_plots, plots
from edgedisp.report.results_table import table, table_markdown
from edgedisp.report.verdict import RULES, summary, verdict


def write(run: Run, output_dir: Path) -> None:
    """Write plots/*.png, report.html, report.md and report.json into `output_dir` (made if absent).

    Plots of an earlier report are removed. report.json goes first and comes last: where it is, all files are
    of one report.
    """
    folder, data = output_dir / "plots", output_dir / "report.json"
    folder.mkdir(parents=True, exist_ok=True)
    data.unlink(missing_ok=True)
    for path in folder.glob("*.png"):
        path.unlink()
    parts = _content(run)
    whole, result = parts["table"], verdict(run).to_json()
    document = {"format": REPORT_FORMAT, "run": to_json(run), "table": to_json(whole), "verdict": result}
    for plot in parts["plots"].values():
        save(plot, folder)
    write_text(output_dir / "report.html", _page(**parts))
    markdown = fill_markdown("report.md.j2", **{**parts, "table": table_markdown(whole)})
    write_text(output_dir / "report.md", markdown)
    write_json(data, sealed(document))


def page(run: Run) -> str:
    """The self-contained page of a report, pictures within."""
    return _page(**_content(run))


def _content(run: Run) -> dict[str, Any]:
    """What page and Markdown show."""
    tokens = sorted({training.tokens for training in run.training.values()})
    context = run.corpus.get("context")
    facts = [
        str(run.model.get("base") or "").rsplit("/", 1)[-1],
        f"{' or '.join(map(count, tokens))} training tokens per arm" if tokens else "",
        plural(len(run.seeds), "seed") if len(run.seeds) > 1 else "",
        f"context {count(context)}" if context else "",
        str(run.machine.get("cpu") or ""),
        run.created[:16].replace("T", " "),
        "smoke run" if run.smoke else "",
    ]
    content = {"title": run.title, "facts": list(filter(None, facts)), "questions": summary(run)}
    parts = {"table": table(run), "sections": run_sections(run), "plots": plots(run)}
    arms, cost = table(run, all_arms=True).arms, devices.cost_section(run)
    return content | parts | {"examples": sections.examples(run), "cost": cost, "arms": arms}


def run_sections(run: Run) -> list[Section]:
    """All sections that have content, in reading order."""
    trainings = [item for arm in run.arms for item in run.trainings(arm).items()]
    parents = sections.measured(run, lambda model: model.divergence.get("parent"))
    twins = sections.measured(run, lambda model: model.divergence.get("baseline"))
    divergence = [
        grid("divergence", parents, "Bundle against its fp32 parent, nats"),
        grid("divergence", twins, "Arm against the baseline at the same precision, nats"),
        grid("noise", sections.measured(run, lambda model: model.noise)),
    ]
    profiles = dict(sections.measured(run, lambda model: model.condensation))
    parity = grid("parity", sections.measured(run, lambda model: model.parity))
    parameters = [item for item in (run.model.get("parameters") or {}).items() if item[0] != "tied"]
    seconds = [stage.seconds for stage in run.stages]
    stages = grid("stages", [(stage.name, stage) for stage in run.stages], bars=seconds)
    rules = tuple((str(number), rule) for number, rule in enumerate(RULES, 1))
    parts = [
        sections.fairness_section(run),
        sections.scores_section(run),
        section("divergence", divergence),
        sections.condensation_section(profiles, [name for name in profiles if name.startswith("torch")]),
        section("training", [grid("training", trainings)], plots=["training"], notes=notes("training", run)),
        sections.merge_section(run),
        sections.survival_section(run),
        devices.latency_section(run),
        devices.devices_section(run.devices, run.devices_outdated),
        sections.mixed_section(run),
        section("verify", [parity]),
        section("sizes", [grid("parameters", parameters, bars=[size for _, size in parameters])]),
        section("stages", [stages], notes=notes("stages", run.stages)),
        sections.reproduce_section(run),
        section("limits", [Grid(("", "rule"), rules, "Rules of the verdict")], notes=notes("limits", run)),
    ]
    return [part for part in parts if not part.is_empty]


def devices_page(results: Sequence[DeviceResult]) -> str:
    """`edgedisp bench --html`: all devices of one measurement on one page."""
    bundles = {row.label for result in results for row in result.rows}
    facts = [plural(len(results), "device"), *([plural(len(bundles), "bundle")] if bundles else [])]
    title = ", ".join(result.device for result in results)
    return _page(title, [devices.devices_section(results)], {}, [], facts=facts)


def write_condensation(profiles: Mapping[str, Condensation], output_dir: Path) -> Path:
    """Write condensation.html, condensation.json and the pictures into `output_dir`, made if absent; returns
    the page. profiles: one or two models; the second has `change`. Raises OSError where it cannot be written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    names = list(profiles)
    figures = {plot.name: plot for plot in condensation_plots(profiles, names) if plot.panels}
    grids, remarks = sections.profile_grids(profiles), notes("condensation", profiles)
    content = section("condensation", grids, plots=tuple(figures), notes=remarks)
    for plot in figures.values():
        save(plot, output_dir)
    html, data = output_dir / "condensation.html", output_dir / "condensation.json"
    html.write_text(_page(" and ".join(names), [content], figures, names), encoding="utf-8")
    data.write_text(json.dumps(to_json(profiles), ensure_ascii=False) + "\n", encoding="utf-8")
    return html


def _page(
    title: str, sections: Sequence[Section], plots: Mapping[str, Plot], arms: Sequence[str], **content: Any
) -> str:
    pictures = {name: data_urls(plot) for name, plot in plots.items()}
    colors = {arm: arm_color(arm, arms) for arm in arms}
    content = {"facts": (), "questions": (), "table": None, "pictures": pictures, "colors": colors} | content
    return template("page.html.j2").render(title=title, sections=sections, plots=plots, **content)
