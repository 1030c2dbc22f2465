"""The report in a run's folder: written when a build ends, and again when a device has measured its bundles.

A build reads its stages' records; a device's measurement is added to the results that report.json holds, so
no recipe, model or machine of the build has to be at hand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from edgedisp.core.errors import BadInput
from edgedisp.core.files import MANIFEST, digest, to_json, write_json
from edgedisp.core.results import DeviceResult
from edgedisp.core.run import Run
from edgedisp.pipeline import device_results
from edgedisp.pipeline.run_results import load, run_results
from edgedisp.pipeline.stage import Passed
from edgedisp.recipe import Recipe
from edgedisp.report import bundle_card, model_card

PAGE = "report.html"


def publish(recipe: Recipe, passed: list[Passed], run: Path) -> Run:
    """Write the report into the run folder unless it stands there already, and return the results."""
    from edgedisp.report import render  # brings matplotlib

    content = {step.name: [step.record.content, step.record.seconds] for step in passed}
    with _lock(run) as stamp:
        measured = device_results.load(run)
        key = {"stages": content, "recipe": recipe.to_yaml(), "devices": digest(to_json(measured))}
        if stamp.is_file() and json.loads(stamp.read_text()) == key and (run / PAGE).is_file():
            return load(run)
        results = _with_devices(run_results(recipe, passed), measured)
        render.write(results, run)
        for one in recipe.arm_runs:  # a Hugging Face folder explains itself in its README
            (run / one.name / "model" / "README.md").write_text(
                model_card(results, one.name), encoding="utf-8"
            )
        for path in (path for paths in results.packages.values() for path in paths):
            manifest = json.loads((run / path / MANIFEST).read_text(encoding="utf-8"))
            (run / path / "README.md").write_text(bundle_card(manifest, path, results), encoding="utf-8")
        (run / "recipe.lock.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        write_json(stamp, key)
    return results


def check_runs(runs: Iterable[Path]) -> None:
    """Refuse, before anything is measured, runs to which nothing can be added.

    Raises BadInput for a run that cannot be written, or whose report or stored results are damaged.
    """
    for run in runs:
        if not os.access(run, os.W_OK):
            raise BadInput(f"{run}: cannot be written, so no figures can be kept in it")
        device_results.load(run)
        if (run / "report.json").is_file():
            load(run)


def show_devices(run: Path) -> str:
    """Write a run's report again with its devices, if a build has ended there; says what it did.

    Raises OSError where it cannot be written.
    """
    with _lock(run) as stamp:
        if not (run / "report.json").is_file():
            folder = run / device_results.FOLDER
            return f"{folder}: kept; the report will show it once `edgedisp build` has ended"
        from edgedisp.report import render  # brings matplotlib

        measured = device_results.load(run)
        render.write(_with_devices(load(run), measured), run)
        if stamp.is_file():
            write_json(stamp, {**json.loads(stamp.read_text()), "devices": digest(to_json(measured))})
    return f"report: {run / PAGE} shows it under On devices"


def _with_devices(run: Run, measured: tuple[list[DeviceResult], list[str]]) -> Run:
    return replace(run, devices=measured[0], devices_outdated=measured[1])


@contextmanager
def _lock(run: Path) -> Iterator[Path]:
    """Hold a run's report for the seconds that writing takes; gives the file that says what made it."""
    from filelock import FileLock

    folder = run / "report"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock"):
        yield folder / "made_from.json"
