"""The report in a run's folder: written when a build ends, and again when a device has measured its bundles.

A build reads its stages' records; a device's measurement is added to the results that report.json holds.
`report/made_from.json` says what the report was made from, with a hash of each of its files: a report that
was cut off, edited or deleted is written again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.files import MANIFEST, digest, file_digest, read_json, read_object, to_json, write_json
from edgedisp.core.results import DeviceResult
from edgedisp.core.run import Run
from edgedisp.pipeline import device_results
from edgedisp.pipeline.run_results import load, run_results
from edgedisp.pipeline.stage import Passed
from edgedisp.recipe import Recipe
from edgedisp.report import bundle_card, model_card

FILES = ("report.html", "report.md", "report.json")


def publish(recipe: Recipe, passed: list[Passed], run: Path) -> Run:
    """Write the report into the run folder unless it is there already, and return the results."""
    stages = {step.name: [step.record.content, step.record.seconds] for step in passed}
    with _lock(run) as stamp:
        devices, outdated = device_results.load(run)
        key = {"stages": stages, "recipe": recipe.to_yaml(), **_device_key(devices, outdated)}
        if read_object(stamp) == {"key": key, "files": _hashes(run)}:
            return load(run)
        results = replace(run_results(recipe, passed), devices=devices, devices_outdated=outdated)
        for arm_run in recipe.arm_runs:  # a Hugging Face folder explains itself in its README
            card = model_card(results, arm_run.name)
            (run / arm_run.name / "model" / "README.md").write_text(card, encoding="utf-8")
        for path in (path for paths in results.packages.values() for path in paths):
            card = bundle_card(read_json(run / path / MANIFEST), path, results)
            (run / path / "README.md").write_text(card, encoding="utf-8")
        (run / "recipe.lock.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        _write(results, run, stamp, key)
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
            return f"{folder}: the report will show it once `edgedisp build` has ended"
        devices, outdated = device_results.load(run)
        key = {**read_object(stamp).get("key", {}), **_device_key(devices, outdated)}
        _write(replace(load(run), devices=devices, devices_outdated=outdated), run, stamp, key)
    return f"report: {run / 'report.html'} shows it under On devices"


def _device_key(devices: list[DeviceResult], outdated: list[str]) -> dict[str, str]:
    return {"devices": digest([to_json(devices), outdated])}


def _write(results: Run, run: Path, stamp: Path, key: dict[str, Any]) -> None:
    from edgedisp.report import render  # brings matplotlib

    stamp.unlink(missing_ok=True)
    render.write(results, run)
    write_json(stamp, {"key": key, "files": _hashes(run)})


def _hashes(run: Path) -> dict[str, str]:
    return {name: file_digest(run / name) for name in FILES if (run / name).is_file()}


@contextmanager
def _lock(run: Path) -> Iterator[Path]:
    """Hold a run's report for the seconds that writing takes; gives the file that says what made it."""
    from filelock import FileLock

    folder = run / "report"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock"):
        yield folder / "made_from.json"
