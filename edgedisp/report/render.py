"""The files of a report: HTML, Markdown and JSON of one content, and the pages of single measurements.

A page is one file with no script, no outside link and a content policy that would block both; the recipe,
names and texts in it are untrusted and escaped by the template (autoescape).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedisp.core.files import to_json
from edgedisp.core.results import REPORT_FORMAT, Condensation, DeviceResult
from edgedisp.core.run import Run
from edgedisp.report import devices, result_sections, run_sections
from edgedisp.report.figure import Plot, arm_color, data_urls, save
from edgedisp.report.formatting import count, plural
from edgedisp.report.layout import Section, fill_markdown, notes, section, template
from edgedisp.report.plots import condensation_plots, plots
from edgedisp.report.results_table import table, table_markdown
from edgedisp.report.verdict import verdict

PLOTS = "plots"
SECTIONS = (
    run_sections.fairness_section,
    result_sections.arms_section,
    result_sections.scores_section,
    result_sections.divergence_section,
    result_sections.condensation_section,
    run_sections.training_section,
    run_sections.merge_section,
    result_sections.survival_section,
    devices.latency_section,
    devices.on_devices_section,
    run_sections.mixed_section,
    run_sections.parity_section,
    run_sections.sizes_section,
    run_sections.stages_section,
    run_sections.reproduce_section,
    run_sections.limits_section,
)


def write(run: Run, output_dir: Path) -> list[Path]:
    """Write report.html, report.md, report.json and plots/*.png into `output_dir` (made if absent).

    Returns the files. Plots of an earlier report that no longer exist are removed.
    """
    figures = plots(run)
    folder = output_dir / PLOTS
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*folder.glob("*.png"), *folder.glob("*.svg")):
        path.unlink()
    texts = {
        "report.html": page(run, figures),
        "report.md": markdown(run, figures),
        "report.json": report_json(run),
    }
    return [*_write(texts, output_dir), *(save(plot, folder) for plot in figures.values())]


def _write(texts: Mapping[str, str], folder: Path) -> list[Path]:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


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
    return [part for part in (build(run) for build in SECTIONS) if not part.is_empty]


def subtitle(run: Run) -> list[str]:
    """The line under the title: base model, training, context, machine, date."""
    tokens = sorted({training.tokens for training in run.training.values()})
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


def markdown(run: Run, figures: Mapping[str, Plot]) -> str:
    """The content as Markdown, pictures linked from plots/."""
    content = {"facts": subtitle(run), "verdict": verdict(run), "table": table_markdown(table(run))}
    return fill_markdown("report.md.j2", title=run.title, sections=sections(run), plots=figures, **content)


def single_page(run: Run) -> str:
    """The HTML page alone, pictures within."""
    return page(run, plots(run))


def page(run: Run, figures: Mapping[str, Plot]) -> str:
    """The self-contained page of a report."""
    content = {"facts": subtitle(run), "verdict": verdict(run), "table": table(run)}
    return _page(run.title, sections(run), figures, run.arms, **content)


def devices_page(results: Sequence[DeviceResult]) -> str:
    """`edgedisp bench --html`: all devices of one measurement on one page."""
    bundles = {row.label for result in results for row in result.rows}
    facts = [plural(len(results), "device"), *([plural(len(bundles), "bundle")] if bundles else [])]
    title = ", ".join(result.device for result in results)
    return _page(title, devices.device_sections(results), {}, [], facts=facts)


def write_condensation(profiles: Mapping[str, Condensation], output_dir: Path) -> list[Path]:
    """Write condensation.html, condensation.json and the pictures into `output_dir`, made if absent.

    profiles: one or two models; the second has `change`. Raises OSError where the folder cannot be written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    names = list(profiles)
    figures = {plot.name: plot for plot in condensation_plots(profiles, names) if plot.panels}
    grids = result_sections.profile_grids(profiles)
    content = section("condensation", grids, plots=tuple(figures), notes=notes("condensation", profiles))
    texts = {
        "condensation.html": _page(" and ".join(names), [content], figures, names, facts=()),
        "condensation.json": json.dumps(to_json(profiles), ensure_ascii=False) + "\n",
    }
    return [*_write(texts, output_dir), *(save(plot, output_dir) for plot in figures.values())]


def _page(
    title: str, parts: Sequence[Section], figures: Mapping[str, Plot], arms: Sequence[str], **content: Any
) -> str:
    return template("page.html.j2").render(
        title=title,
        sections=parts,
        plots=figures,
        pictures={name: data_urls(plot) for name, plot in figures.items()},
        colors={arm: arm_color(arm, arms) for arm in arms},
        **{"verdict": None, "table": None, **content},
    )
