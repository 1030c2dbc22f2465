"""What devices measured of the bundles of a run, stored in `<run>/devices/*.json`, one file a measurement.

A file holds the device's result, when it came, and for each bundle its folder in the run with a hash of its
files. The latest complete measurement counts for each device, bundle, prompt, new tokens and threads, and the
latest score of each task; a partial result replaces partial ones alone. A measurement of a bundle that was
built again with other contents is outdated. Two results are of one device where its name, processor, phone
model, browser (without version) and cores agree.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from edgedisp.core.errors import BadInput
from edgedisp.core.files import (
    MANIFEST,
    RECORD,
    digest,
    from_json,
    list_files,
    read_listing,
    to_json,
    write_json,
)
from edgedisp.core.results import DeviceResult, Json, Timing
from edgedisp.core.stage_folder import RUN

FORMAT = 2
FOLDER = "devices"
UNTIMED = {RECORD, MANIFEST, "README.md", "genai_config.json"}
"""Files that may change without changing what is timed; the thread count is in every row."""

Key = tuple[object, ...]


@dataclass(frozen=True)
class MeasuredBundle:
    """A bundle's folder in its run, and the hash of the files that decide what is timed."""

    path: str
    content: str


BundlesByRun = dict[Path, dict[str, MeasuredBundle]]
"""Run -> label -> bundle."""


@dataclass(frozen=True)
class Stored:
    """One file: a result, when it came, and by label those of its bundles that lie in the run."""

    measured: str
    bundles: dict[str, MeasuredBundle]
    result: DeviceResult
    format: int = FORMAT


def bundles_by_run(bundles: Mapping[str, Path]) -> BundlesByRun:
    """The bundles (label -> folder) that lie in a run (`RUN/ARM/NAME`). BadInput for a damaged bundle."""
    by_run: BundlesByRun = {}
    for label, bundle in bundles.items():
        folder = bundle.resolve()
        run = folder.parent.parent
        if (run / RUN).is_file():
            path = folder.relative_to(run).as_posix()
            by_run.setdefault(run, {})[label] = MeasuredBundle(path, _content(folder))
    return by_run


def _content(bundle: Path) -> str:
    """Hash of the files that decide what is timed, by the bundle's own list where it has one."""
    files = read_listing(bundle) or list_files(bundle)
    return digest({name: entry["sha256"] for name, entry in files.items() if name not in UNTIMED})


def save(result: DeviceResult, bundles: BundlesByRun) -> list[Path]:
    """Write one device's result into the runs of its bundles, and remove files that it replaces.

    Returns these runs. Raises OSError where a run cannot be written.
    """
    if not result.rows and not result.scores:
        return []  # lost before its first turn
    now = datetime.now(UTC)
    name = re.sub(r"[^a-z0-9]+", "-", result.device.lower()).strip("-")[:40] or "device"
    for run, measured in bundles.items():
        file = run / FOLDER / f"{name}-{now:%Y%m%dT%H%M%S%f}.json"
        file.parent.mkdir(exist_ok=True)
        stored = Stored(now.isoformat(timespec="milliseconds"), measured, replace(result, answers={}))
        write_json(file, to_json(stored))
        for replaced in set(_merge(run)[2]) - {file}:
            replaced.unlink(missing_ok=True)
    return sorted(bundles)


def load(run: Path) -> tuple[list[DeviceResult], list[str]]:
    """The merged result of each device, and what is outdated: for the report.

    Labels are folders, such as `dispersed/int4`; a row of a partial result has `partial`; `measured` is when.
    Devices of one name, such as phones that do not tell theirs, get numbers. Raises BadInput for a damaged
    file.
    """
    devices, outdated, _ = _merge(run)
    counts: Counter[str] = Counter()
    for index, device in enumerate(devices):
        counts[device.device] += 1
        if (number := counts[device.device]) > 1:
            devices[index] = replace(device, device=f"{device.device} {number}")
    return devices, sorted(outdated)


def _merge(run: Path) -> tuple[list[DeviceResult], list[str], list[Path]]:
    """Devices with the entries of each file that count, what is outdated, and the files that can go."""
    counted: set[Key] = set()
    merged: dict[Key, DeviceResult] = {}
    outdated, replaced = [], []
    for file, stored in _files(run):
        device, result, bundles = _identity(stored.result), stored.result, stored.bundles
        paths = {label: bundle.path for label, bundle in bundles.items()}
        keys = {*map(_key, result.rows), *map(_key, result.scores)}
        latest = {key for key in keys if key[0] in paths and (device, paths[key[0]], key) not in counted}
        current = {key for key in latest if _is_unchanged(run, bundles[key[0]])}
        counted |= {(device, paths[key[0]], key) for key in current}
        if current:
            joined = _join(merged.get(device), result, paths, current)
            times = tuple(sorted([*joined.measured, stored.measured]))
            merged[device] = replace(joined, measured=times)
        elif latest:
            names = ", ".join(sorted(paths.values()))
            outdated.append(f"{names} on {result.device}, {stored.measured[:10]}")
        else:
            replaced.append(file)
    return sorted(merged.values(), key=lambda device: min(device.measured)), outdated, replaced


def _key(entry: Timing | Json) -> tuple[str, Key]:
    """The label of a timing or score, and its settings: a later entry of the same key replaces it."""
    if isinstance(entry, Timing):
        return entry.label, (entry.prompt, entry.generate, entry.threads)
    return entry["label"], (entry["task"],)


def _join(
    device: DeviceResult | None, result: DeviceResult, paths: Mapping[str, str], keys: set[tuple[str, Key]]
) -> DeviceResult:
    """Add a file's entries of these keys to its device; the device's first file describes the machine."""
    if device is None:
        device = DeviceResult(
            result.device, result.machine, load_average=result.load_average, lost=result.lost
        )
    rows = [row for row in result.rows if _key(row) in keys]
    timed, partial = {row.label for row in rows}, bool(result.lost)
    added = [replace(row, label=paths[row.label], partial=partial) for row in rows]
    scores = [{**score, "label": paths[score["label"]]} for score in result.scores if _key(score) in keys]
    sweeps = {paths[label]: sweep for label, sweep in result.sweeps.items() if label in timed}
    pairs = [
        {**pair, "baseline": paths[pair["baseline"]], "candidate": paths[pair["candidate"]]}
        for pair in result.pairs
        if {pair["baseline"], pair["candidate"]} <= timed
    ]
    return replace(
        device,
        rows=sorted([*device.rows, *added], key=lambda row: row.label),
        scores=[*device.scores, *scores],
        pairs=[*device.pairs, *pairs],
        sweeps={**sweeps, **device.sweeps},
        clock_mhz=_span(device.clock_mhz, result.clock_mhz if timed else None),
        temperature_c=_span(device.temperature_c, result.temperature_c if timed else None),
        warnings=tuple(dict.fromkeys([*device.warnings, *result.warnings])),
    )


def _span(*ranges: tuple[float, float] | None) -> tuple[float, float] | None:
    values = [value for limits in ranges if limits for value in limits]
    return (min(values), max(values)) if values else None


def _identity(result: DeviceResult) -> Key:
    """What makes a device the same one another time."""
    machine = result.machine
    browser, phone = machine.get("browser") or {}, machine.get("phone") or {}
    agent = re.sub(r"/[\d.]+", "", str(browser.get("user_agent") or ""))
    return (result.device, machine.get("cpu"), phone.get("model"), agent, browser.get("cores"))


def _files(run: Path) -> list[tuple[Path, Stored]]:
    """Every file: complete results before partial ones, the latest first. BadInput for a damaged one."""
    files = []
    for path in (run / FOLDER).glob("*.json"):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] == FORMAT:
                stored = from_json(Stored, document)
                _ = [_key(score) for score in stored.result.scores]
                files.append((path, stored))
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}: is damaged ({error!r}); delete it, or measure again") from error
    # Names hold microseconds: two results may be of one millisecond, and a folder lists files in any order.
    files.sort(key=lambda item: (item[1].measured, item[0].name), reverse=True)
    return sorted(files, key=lambda item: bool(item[1].result.lost))


def _is_unchanged(run: Path, bundle: MeasuredBundle) -> bool:
    """Whether the bundle is there as it was when it was measured."""
    folder = run / bundle.path
    inside = folder.resolve().is_relative_to(run.resolve())
    return inside and folder.is_dir() and _content(folder) == bundle.content
