"""The report in a run's folder: written when a build ends, and again when a device has measured its bundles.

Both ways give the same files. A build reads its stages' records; a measurement adds to the summary that
report.json holds, so that no recipe, model or machine of the build has to be at hand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgedisp import device_results
from edgedisp.core.errors import BadInput
from edgedisp.core.stage_folder import MANIFEST, digest, write_json
from edgedisp.device_results import Place
from edgedisp.pipeline import Walked
from edgedisp.recipe import Recipe
from edgedisp.report import bundle_card, model_card
from edgedisp.report import write as write_report
from edgedisp.summary import load, summarise

PAGE = "report.html"


def publish(recipe: Recipe, walked: list[Walked], run: Path) -> dict[str, Any]:
    """Write the report into the run folder unless it stands there already, and return the summary."""
    made_from = {step.name: [step.record.content, step.record.seconds] for step in walked}
    with _writing(run) as stamp:
        measured = device_results.shown(run)
        known = {"stages": made_from, "recipe": recipe.to_yaml(), "devices": digest(measured)}
        if stamp.is_file() and json.loads(stamp.read_text()) == known and (run / PAGE).is_file():
            return load(run)
        summary = {**summarise(recipe, walked), **measured}
        write_report(summary, run)
        for one in recipe.arm_runs:  # a Hugging Face folder explains itself in its README
            card = model_card(summary, one.name)
            (run / one.name / "model" / "README.md").write_text(card, encoding="utf-8")
        for packed in (path for paths in summary["packed"].values() for path in paths):
            manifest = json.loads((run / packed / MANIFEST).read_text(encoding="utf-8"))
            card = bundle_card(manifest, packed, summary)
            (run / packed / "README.md").write_text(card, encoding="utf-8")
        (run / "recipe.lock.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        write_json(stamp, known)
    return summary


def check_runs(places: Mapping[str, Place]) -> None:
    """Refuse, before anything is measured, runs to which nothing can be added.

    Raises BadInput for a run that cannot be written, or whose report or kept results are damaged.
    """
    for run in {place.run for place in places.values()}:
        if not os.access(run, os.W_OK):
            raise BadInput(f"{run}: cannot be written, so no figures can be kept in it")
        device_results.shown(run)
        if (run / "report.json").is_file():
            load(run)


def show_devices(run: Path) -> str:
    """Write a run's report again, with what is kept of devices, if a build has ended there; says what it did.

    Raises OSError where it cannot be written.
    """
    with _writing(run) as stamp:
        if not (run / "report.json").is_file():
            kept = run / device_results.FOLDER
            return f"{kept}: kept; the report will show it once `edgedisp build` has ended"
        measured = device_results.shown(run)
        write_report({**load(run), **measured}, run)
        if stamp.is_file():
            write_json(stamp, {**json.loads(stamp.read_text()), "devices": digest(measured)})
    return f"report: {run / PAGE} shows it under On devices"


@contextmanager
def _writing(run: Path) -> Iterator[Path]:
    """Hold a run's report for the seconds that writing takes; gives the file that tells what made it."""
    from filelock import FileLock

    folder = run / "report"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock"):
        yield folder / "made_from.json"
