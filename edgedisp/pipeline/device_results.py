"""What devices measured of the bundles of a run, stored in `<run>/devices/*.json`.

There is one file for each device, bundle, prompt, new tokens and threads. A later measurement replaces it,
but a partial one never a complete one; the score of a task stays until that task is scored anew. A file whose
bundle was built again with other contents is outdated. Two results are of one device where its name,
processor, phone model, browser (without version) and cores agree.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from edgedisp.core import files
from edgedisp.core.errors import BadInput
from edgedisp.core.results import DeviceResult, Json
from edgedisp.core.stage_folder import RUN

FOLDER = "devices"
UNTIMED = {files.RECORD, files.MANIFEST, "README.md", "genai_config.json", "app.json"}
"""Files that may change without changing what is timed; the thread count is in every row."""

BundlesByRun = dict[Path, dict[str, str]]
"""Run -> label of a bundle -> its folder in the run."""


@dataclass(frozen=True)
class Stored:
    """One file: a result with one row, labelled by its bundle's folder in the run, whose files had the hash
    `content`."""

    measured: str
    content: str
    result: DeviceResult


def bundles_by_run(bundles: Mapping[str, Path]) -> BundlesByRun:
    """The bundles (label -> folder) that lie in a run (`RUN/ARM/NAME`). Raises BadInput, before anything is
    measured, for a run that cannot be written, or whose stored results are damaged."""
    by_run: BundlesByRun = {}
    for label, bundle in bundles.items():
        folder = bundle.resolve()
        run = folder.parent.parent
        if (run / RUN).is_file():
            by_run.setdefault(run, {})[label] = folder.relative_to(run).as_posix()
    for run in by_run:
        if not os.access(run, os.W_OK):
            raise BadInput(f"{run}: cannot be written, so no figures can be kept in it")
        load(run)
    return by_run


def save(result: DeviceResult, bundles: BundlesByRun) -> list[Path]:
    """Write one device's result into the runs of its bundles, and return these runs.

    Raises OSError where a run cannot be written, BadInput for a damaged bundle or file.
    """
    faults = (str(pair["fault"]) for pair in result.pairs if pair["fault"])
    result = replace(result, warnings=(*result.warnings, *faults), pairs=[], repetitions=[], answers={})
    runs = set()
    for run, paths in bundles.items():
        for row in (row for row in result.rows if row.label in paths):
            label, path = row.label, paths[row.label]
            part = replace(
                result,
                rows=[replace(row, label=path, partial=bool(result.lost))],
                scores=[{**score, "label": path} for score in result.scores if score["label"] == label],
                sweeps={path: result.sweeps[label]} if label in result.sweeps else {},
            )
            _write(run, Stored(datetime.now(UTC).isoformat(), _content(run / path), part))
            runs.add(run)
    return sorted(runs)


def _write(run: Path, stored: Stored) -> None:
    (row,) = stored.result.rows
    key = files.digest([_identity(stored.result), row.label, row.prompt, row.generate, row.threads])
    name = re.sub(r"[^a-z0-9]+", "-", stored.result.device.lower()).strip("-")[:40] or "device"
    file = run / FOLDER / f"{name}-{key[:16]}.json"
    file.parent.mkdir(exist_ok=True)
    if file.is_file() and (old := _read(file)).content == stored.content:
        if stored.result.lost and not old.result.lost:
            return
        scores = _latest([*old.result.scores, *stored.result.scores])
        stored = replace(stored, result=replace(stored.result, scores=scores))
    files.write_json(file, files.sealed(files.to_json(stored)))


def load(run: Path) -> tuple[list[DeviceResult], list[str]]:
    """The results of each device in one, and what is outdated: for the report.

    Labels are folders, such as `dispersed/int4`; a row of a partial result has `partial`; `measured` is when;
    what a device is and was like is from its latest measurement. Devices of one name, such as phones that do
    not tell theirs, get numbers. Raises BadInput for a damaged file.
    """
    devices: dict[str, DeviceResult] = {}
    outdated = []
    for stored in sorted(map(_read, (run / FOLDER).glob("*.json")), key=lambda stored: stored.measured):
        result, key = stored.result, files.digest(_identity(stored.result))
        bundle = result.rows[0].label
        if not (run / bundle).is_dir() or _content(run / bundle) != stored.content:
            outdated.append(f"{bundle} on {result.device}, {stored.measured[:10]}")
            continue
        before = devices.get(key, DeviceResult(result.device))
        lost = [f"{bundle}: lost in the middle: {result.lost}"] if result.lost else []
        devices[key] = replace(
            result,
            rows=sorted([*before.rows, *result.rows], key=lambda row: row.label),
            scores=_latest([*before.scores, *result.scores]),
            sweeps={**before.sweeps, **result.sweeps},
            warnings=tuple(dict.fromkeys([*before.warnings, *result.warnings, *lost])),
            lost=None,  # of one bundle alone, whose row is `partial`
            measured=(*before.measured, stored.measured),
        )
    counts: Counter[str] = Counter()
    for key, device in devices.items():
        counts[device.device] += 1
        if (number := counts[device.device]) > 1:
            devices[key] = replace(device, device=f"{device.device} {number}")
    return [*devices.values()], sorted(outdated)


def _latest(scores: list[Json]) -> list[Json]:
    """The last score of each bundle and task."""
    return [*{(score["label"], score["task"]): score for score in scores}.values()]


def _read(file: Path) -> Stored:
    try:
        stored = files.from_json(Stored, files.read_json(file))
        if len(stored.result.rows) != 1:
            raise ValueError(f"{len(stored.result.rows)} rows instead of one")
    except ValueError as error:
        raise BadInput(f"{file}: is damaged ({error!r}); delete it, and measure again") from error
    return stored


def _identity(result: DeviceResult) -> list[object]:
    """What makes a device the same one another time."""
    machine = result.machine
    browser, phone = machine.get("browser") or {}, machine.get("phone") or {}
    agent = re.sub(r"/[\d.]+", "", str(browser.get("user_agent") or ""))
    return [result.device, machine.get("cpu"), phone.get("model"), agent, browser.get("cores")]


def _content(bundle: Path) -> str:
    """Hash of the files that decide what is timed, by the bundle's own list where it has one."""
    listing = files.read_listing(bundle) or files.list_files(bundle)
    return files.digest({name: entry["sha256"] for name, entry in listing.items() if name not in UNTIMED})
