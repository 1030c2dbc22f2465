"""What devices measured of a run's bundles, kept in the run: `<run>/devices/*.json`, one file a measurement.

A file holds the device's result, when it came, and for each bundle its folder in the run with a hash of its
files. Shown is the latest complete measurement for each device, bundle, prompt, new tokens and threads, and
the latest score of each task; a partial result replaces partial ones alone. A measurement of a bundle that
was built again with other contents is listed as outdated. Two results are of one device where its name,
processor, phone model, browser (without version) and cores agree.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from edgedisp.core.errors import BadInput
from edgedisp.core.files import MANIFEST, RECORD, digest, from_json, list_files, to_json, write_json
from edgedisp.core.results import DeviceResult
from edgedisp.core.stage_folder import RUN

FORMAT = 2
FOLDER = "devices"
UNTIMED = {RECORD, MANIFEST, "README.md", "genai_config.json"}
"""Files that may change without changing what is timed; the thread count is in every row."""

Key = tuple[object, ...]


@dataclass(frozen=True)
class Place:
    """A bundle in a run: the run's folder, the bundle's from there, and the hash of what is timed."""

    run: Path
    path: str
    content: str


@dataclass(frozen=True)
class StoredBundle:
    """A bundle's folder in the run, and the hash of what was timed."""

    path: str
    content: str


@dataclass(frozen=True)
class Stored:
    """One file: a result, when it came, and by label those of its bundles that lie in the run."""

    measured: str
    bundles: dict[str, StoredBundle]
    result: DeviceResult
    format: int = FORMAT

    def entries(self) -> Iterator[tuple[str, Key]]:
        """(label, key) of every timing and score; a later entry of the same key replaces it."""
        for row in self.result.rows:
            yield row.label, (row.prompt, row.generate, row.threads)
        for score in self.result.scores:
            yield score["label"], (score["task"],)


def places(bundles: Mapping[str, Path]) -> dict[str, Place]:
    """Label -> place, for the bundles that lie in a run (`RUN/ARM/NAME`)."""
    folders = {label: bundle.resolve() for label, bundle in bundles.items()}
    return {
        label: Place(folder.parent.parent, "/".join(folder.parts[-2:]), content(folder))
        for label, folder in folders.items()
        if (folder.parent.parent / RUN).is_file()
    }


def content(bundle: Path) -> str:
    """Hash of the files that decide what is timed, by the bundle's own list where it has one."""
    listed = next((path for path in (bundle / MANIFEST, bundle / RECORD) if path.is_file()), None)
    try:
        files = json.loads(listed.read_text("utf-8"))["files"] if listed else list_files(bundle)
        return digest({name: entry["sha256"] for name, entry in files.items() if name not in UNTIMED})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{listed}: is damaged ({error!r}); build or export the bundle again") from error


def keep(result: DeviceResult, bundles: Mapping[str, Place]) -> list[Path]:
    """Write one device's result into the runs of its bundles (by label), and remove files that it replaces.

    Returns these runs. Raises OSError where a run cannot be written.
    """
    if not result.rows and not result.scores:
        return []  # lost before its first turn
    now = datetime.now(UTC)
    name = re.sub(r"[^a-z0-9]+", "-", result.device.lower()).strip("-")[:40] or "device"
    runs = sorted({place.run for place in bundles.values()})
    for run in runs:
        inside = {label: place for label, place in bundles.items() if place.run == run}
        file = run / FOLDER / f"{name}-{now:%Y%m%dT%H%M%S%f}.json"
        file.parent.mkdir(exist_ok=True)
        stored_bundles = {label: StoredBundle(p.path, p.content) for label, p in inside.items()}
        stored = Stored(now.isoformat(timespec="milliseconds"), stored_bundles, replace(result, answers={}))
        write_json(file, to_json(stored))
        for replaced in set(_merge(run)[2]) - {file}:
            replaced.unlink(missing_ok=True)
    return runs


def shown(run: Path) -> tuple[list[DeviceResult], list[str]]:
    """The merged result of each device, and what is outdated: for the report.

    Labels are folders, such as `dispersed/int4`; a row of a partial result has `partial`; `measured` is when.
    Devices of one name, such as phones that do not tell theirs, get numbers. Raises BadInput for a damaged
    file.
    """
    devices, outdated, _ = _merge(run)
    counts: Counter[str] = Counter()
    numbered = []
    for device in devices:
        counts[device.device] += 1
        number = counts[device.device]
        numbered.append(device if number == 1 else replace(device, device=f"{device.device} {number}"))
    return numbered, sorted(outdated)


def _merge(run: Path) -> tuple[list[DeviceResult], list[str], list[Path]]:
    """Devices with what stands of each file, what is outdated, and the files of which nothing stands."""
    taken: set[Key] = set()
    merged: dict[Key, DeviceResult] = {}
    outdated, unused = [], []
    for file, stored in _files(run):
        device = _identity(stored.result)
        paths = {label: bundle.path for label, bundle in stored.bundles.items()}
        current = {label for label, bundle in stored.bundles.items() if _stands(run, bundle)}
        entries = {entry for entry in stored.entries() if entry[0] in paths}
        entries -= {entry for entry in entries if (device, paths[entry[0]], entry[1]) in taken}
        fresh = {entry for entry in entries if entry[0] in current}
        taken |= {(device, paths[label], key) for label, key in fresh}
        if fresh:
            merged[device] = _join(merged.get(device), stored, paths, fresh)
        elif entries:
            names = ", ".join(sorted(paths.values()))
            outdated.append(f"{names} on {stored.result.device}, {stored.measured[:10]}")
        else:
            unused.append(file)
    devices = sorted(merged.values(), key=lambda device: min(device.measured))
    return devices, outdated, unused


def _join(
    device: DeviceResult | None, stored: Stored, paths: Mapping[str, str], fresh: set[tuple[str, Key]]
) -> DeviceResult:
    """Add a file's fresh entries to its device; the device's first file describes the machine."""
    result = stored.result
    if device is None:
        device = DeviceResult(
            result.device, result.machine, load_average=result.load_average, lost=result.lost
        )
    rows = [row for row in result.rows if (row.label, (row.prompt, row.generate, row.threads)) in fresh]
    timed = {row.label for row in rows}
    partial = bool(result.lost)
    rows = [*device.rows, *(replace(row, label=paths[row.label], partial=partial) for row in rows)]
    scores = [score for score in result.scores if (score["label"], (score["task"],)) in fresh]
    sweeps = {paths[label]: sweep for label, sweep in result.threads.items() if label in timed}
    pairs = [
        {**pair, "baseline": paths[pair["baseline"]], "candidate": paths[pair["candidate"]]}
        for pair in result.pairs
        if {pair["baseline"], pair["candidate"]} <= timed
    ]
    return replace(
        device,
        rows=sorted(rows, key=lambda row: row.label),
        scores=[*device.scores, *({**score, "label": paths[score["label"]]} for score in scores)],
        pairs=[*device.pairs, *pairs],
        threads={**sweeps, **device.threads},
        clock_mhz=_span(device.clock_mhz, result.clock_mhz if timed else None),
        temperature_c=_span(device.temperature_c, result.temperature_c if timed else None),
        measured=tuple(sorted([*device.measured, stored.measured])),
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
                files.append((path, from_json(Stored, document)))
                list(files[-1][1].entries())
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}: is damaged ({error!r}); delete it, or measure again") from error
    # Names hold microseconds: two results may be of one millisecond, and a folder lists files in any order.
    files.sort(key=lambda item: (item[1].measured, item[0].name), reverse=True)
    return sorted(files, key=lambda item: bool(item[1].result.lost))


def _stands(run: Path, bundle: StoredBundle) -> bool:
    """Whether the bundle is there as it was when it was measured."""
    folder = run / bundle.path
    inside = folder.resolve().is_relative_to(run.resolve())
    return inside and folder.is_dir() and content(folder) == bundle.content
