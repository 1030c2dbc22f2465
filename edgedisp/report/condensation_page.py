"""The files of `edgedisp condensation --out`: one page, the pictures, and the data.

What was measured comes as `measured`: model name -> its profile (see `dispersion/profile.py`), one or two of
them in the order given; the second has `change`, itself less the first. The pictures are those of a build's
report, drawn from a summary that holds nothing but the profiles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from edgedisp.report.condensation import FIGURES, LEAD, model_texts, with_interval
from edgedisp.report.picture import Plot, arm_color, inline_svgs, save
from edgedisp.report.plot_condensation import condensation_layers, condensation_outliers
from edgedisp.report.plot_inside import condensation_heatmap
from edgedisp.report.reading import at, branch, finite
from edgedisp.report.section import Grid
from edgedisp.report.wording import count, typographic

DATA, PAGE = "condensation.json", "condensation.html"
Measured = Mapping[str, Mapping[str, Any]]


def write(measured: Measured, document: Any, out: Path) -> list[Path]:
    """Write condensation.html, condensation.json (`document`) and the pictures into `out`, made if absent.

    Returns the files. Raises OSError where the folder cannot be made or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    plots = pictures(measured)
    files = {PAGE: page(measured, plots), DATA: json.dumps(finite(document)[0], ensure_ascii=False)}
    for name, text in files.items():
        (out / name).write_text(text + "\n", encoding="utf-8")
    return [*(out / name for name in files), *(path for plot in plots for path in save(plot, out))]


def pictures(measured: Measured) -> list[Plot]:
    """Heatmap, curves and outliers of one model or two."""
    summary = {"arms": list(measured), "condensation": measured}
    made = (condensation_heatmap(summary), condensation_layers(summary), condensation_outliers(summary))
    return [plot for plot in made if plot is not None]


def page(measured: Measured, plots: list[Plot]) -> str:
    """The self-contained page: no script, no outside link."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["minus"] = typographic
    source = resources.files("edgedisp.report").joinpath("condensation.html.j2").read_text(encoding="utf-8")
    names = list(measured)
    grids = [_models(measured), *(_layers(name, found) for name, found in measured.items())]
    if change := branch(measured[names[-1]], "change"):
        grids[1:1] = _changes(names, change)
    first = next(iter(measured.values()))
    return environment.from_string(source).render(
        title=" and ".join(names),
        lead=LEAD.split(" Measured on")[0],
        facts=f"{count(first.get('tokens'))} tokens in {count(first.get('sequences'))} sequences",
        plots=[(plot, [Markup(svg) for svg in inline_svgs(plot)]) for plot in plots],
        colors={name: arm_color(name, names) for name in names},
        grids=grids,
    )


def _models(measured: Measured) -> Grid:
    rows = tuple((name, *model_texts(found)) for name, found in measured.items())
    return Grid(("model", "mean cosine", "Spearman", "Kendall"), rows, "All layers")


def _layers(name: str, found: Mapping[str, Any]) -> Grid:
    """Every figure of every layer with its interval."""
    listed = [*found["layers"], {**found["final_norm"], "layer": "after the final norm"}]
    rows = tuple((str(row["layer"]), *(_cell(row, figure) for figure in FIGURES)) for row in listed)
    return Grid(
        _head(), rows, f"{name}, layer by layer: means over sequences and 95 % intervals", folded=True
    )


def _changes(names: list[str], change: Mapping[str, Any]) -> list[Grid]:
    """What differs over all layers and in each, second model less first, paired."""
    whole = tuple(
        with_interval(branch(change, *path), "difference", 4, signs=True)
        for path in (("mean_cosine",), ("correlations", "spearman"), ("correlations", "kendall"))
    )
    title = f"{names[1]} - {names[0]}"
    head = ("difference", "mean cosine", "Spearman", "Kendall")
    grids = [Grid(head, ((title, *whole),), "Paired over the same sequences")]
    listed = [*change["layers"], {**change["final_norm"], "layer": "after the final norm"}]
    rows = tuple(
        (
            str(row["layer"]),
            *(
                with_interval(branch(row, figure), "difference", decimals + 1, signs=True)
                for figure, (_, decimals) in FIGURES.items()
            ),
        )
        for row in listed
    )
    return [*grids, Grid(_head(), rows, f"{title}, layer by layer", folded=True)]


def _head() -> tuple[str, ...]:
    return ("layer", *(heading for heading, _ in FIGURES.values()))


def _cell(row: Mapping[str, Any], figure: str) -> str:
    ends = at(row, "intervals", figure) or (None, None)
    part = {"value": row[figure], "low": ends[0], "high": ends[1]}
    return with_interval(part, "value", FIGURES[figure][1])
