"""What devices measured of a run's bundles, kept in the run: `<run>/devices/*.json`, one file a measurement.

A file holds the result as `bench/devices.py` describes it, when it came, and for each bundle its folder in
the run with a hash of its files. Kept is the latest complete measurement for each device, bundle, prompt, new
tokens and threads, and the latest score of each task; a partial result replaces partial ones alone. What was
measured of a bundle that was made anew with other contents is named as outdated and not shown. A device is
the same when its name, its processor, a phone's model and a browser's user agent (without versions) and cores
are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.files import MANIFEST, RECORD, digest, list_files, write_json
from edgedisp.core.stage_folder import RUN

FORMAT = 1
FOLDER = "devices"
UNTIMED = {RECORD, MANIFEST, "README.md", "genai_config.json"}
"""Files that may change without changing what is timed; the threads that were used stand in every row."""
NOT_KEPT = {"client", "run"}  # a phone's address in somebody's network, and its page load
NOT_SHOWN = {"order", "groups", "answers"}
PARTS = {"rows": ("prompt", "generate", "threads"), "scores": ("task",)}
"""Part of a result -> what makes one of its entries another measurement than one of the same bundle."""


@dataclass(frozen=True)
class Place:
    """A bundle in a run: the run's folder, the bundle's from there, and the hash of what is timed."""

    run: Path
    path: str
    content: str


def places(bundles: Mapping[str, Path]) -> dict[str, Place]:
    """Where each labelled bundle lies, of those that lie in a run (`RUN/ARM/NAME`)."""
    found = {}
    for label, bundle in bundles.items():
        folder = bundle.resolve()
        run = folder.parent.parent
        if (run / RUN).is_file():
            found[label] = Place(run, folder.relative_to(run).as_posix(), content(folder))
    return found


def content(bundle: Path) -> str:
    """Hash of the files that decide what is timed, by the bundle's own list where it has one."""
    listed = next((path for path in (bundle / MANIFEST, bundle / RECORD) if path.is_file()), None)
    try:
        files = json.loads(listed.read_text("utf-8"))["files"] if listed else list_files(bundle)
        return digest({name: entry["sha256"] for name, entry in files.items() if name not in UNTIMED})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{listed}: is damaged ({error!r}); build or export the bundle again") from error


def keep(result: Mapping[str, Any], bundles: Mapping[str, Place]) -> list[Path]:
    """Write one device's result into the runs of its bundles (by label), and remove files that it replaces.

    Returns these runs. Raises OSError where a run cannot be written, ValueError for a figure that is no
    number.
    """
    if not any(result.get(part) for part in PARTS):
        return []  # lost before its first turn
    runs = sorted({place.run for place in bundles.values()})
    now = datetime.now(UTC)
    name = re.sub(r"[^a-z0-9]+", "-", str(result["device"]).lower()).strip("-")[:40] or "device"
    for run in runs:
        own = {label: place for label, place in bundles.items() if place.run == run}
        file = run / FOLDER / f"{name}-{now:%Y%m%dT%H%M%S%f}.json"
        file.parent.mkdir(exist_ok=True)
        measurement = {
            "format": FORMAT,
            "measured": now.isoformat(timespec="milliseconds"),
            "bundles": {label: {"path": p.path, "content": p.content} for label, p in own.items()},
            "result": {key: value for key, value in result.items() if key not in NOT_KEPT},
        }
        write_json(file, measurement)
        for replaced in set(_merge(run)[2]) - {file}:
            replaced.unlink(missing_ok=True)
    return runs


def shown(run: Path) -> dict[str, Any]:
    """{devices [one merged result each, see bench/devices.py], devices_outdated [what of]}: for the report.

    Labels are folders, such as `dispersed/int4`; a row of a partial result has `partial` true; `measured` is
    when. Devices of one name, such as phones that do not tell theirs, get numbers. Raises BadInput for a
    damaged file.
    """
    devices, outdated, _ = _merge(run)
    counts: dict[str, int] = {}
    for device in devices:
        name = str(device["device"])
        counts[name] = counts.get(name, 0) + 1
        device["device"] = name if counts[name] == 1 else f"{name} {counts[name]}"
    return {"devices": devices, "devices_outdated": sorted(outdated)}


def _merge(run: Path) -> tuple[list[dict[str, Any]], list[str], list[Path]]:
    """Devices with what stands of each file, what is outdated, and the files of which nothing stands."""
    taken: set[tuple[Any, ...]] = set()
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    outdated, unused = [], []
    for file, measurement in _files(run):
        result, bundles = measurement["result"], measurement["bundles"]
        paths = {label: str(bundle["path"]) for label, bundle in bundles.items()}
        current = {label for label, bundle in bundles.items() if _stands(run, bundle)}
        fresh: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
        outdated_keys = set()
        for part, settings in PARTS.items():
            for entry in result.get(part) or ():
                label, how = entry["label"], tuple(entry.get(name) for name in settings)
                key = (_identity(result), part, paths.get(label), how)
                if label not in paths or key in taken:
                    continue
                if label in current:
                    taken.add(key)
                    fresh[part].append(entry)
                else:
                    outdated_keys.add(key)
        if any(fresh.values()):
            _add(merged, measurement, fresh, paths)
        elif outdated_keys:
            names = ", ".join(sorted(paths.values()))
            outdated.append(f"{names} on {result.get('device')}, {measurement['measured'][:10]}")
        else:
            unused.append(file)
    devices = sorted(merged.values(), key=lambda device: min(device["measured"]))
    return devices, outdated, unused


def _add(
    merged: dict[tuple[Any, ...], dict[str, Any]],
    measurement: Mapping[str, Any],
    fresh: Mapping[str, list[dict[str, Any]]],
    paths: Mapping[str, str],
) -> None:
    """Join a file's fresh entries to its device; the device's first file tells of the machine."""
    result = measurement["result"]
    lists = (*PARTS, "repetitions", "pairs", "warnings")
    known = {key: value for key, value in result.items() if key not in {*NOT_SHOWN, *lists, "threads"}}
    device = merged.setdefault(_identity(result), {**known, "measured": [], "rows": [], "warnings": []})
    device["measured"] = sorted([*device["measured"], measurement["measured"]])
    device["warnings"] = list(dict.fromkeys([*device["warnings"], *(result.get("warnings") or ())]))
    timed = {row["label"] for row in fresh["rows"]}
    partial = bool(result.get("lost"))
    repetitions = [one for one in result.get("repetitions") or () if one["label"] in timed]
    new = {
        "rows": [{**row, "label": paths[row["label"]], "partial": partial} for row in fresh["rows"]],
        "scores": [{**score, "label": paths[score["label"]]} for score in fresh["scores"]],
        "repetitions": [
            {k: v for k, v in {**one, "label": paths[one["label"]]}.items() if not isinstance(v, list)}
            for one in repetitions
        ],
        "pairs": [
            {**pair, "baseline": paths[pair["baseline"]], "candidate": paths[pair["candidate"]]}
            for pair in result.get("pairs") or ()
            if {pair["baseline"], pair["candidate"]} <= timed
        ],
    }
    for name, values in new.items():
        if values:
            device[name] = [*device.get(name, []), *values]
    device["rows"].sort(key=lambda row: str(row["label"]))
    sweeps = {paths[label]: sweep for label, sweep in (result.get("threads") or {}).items() if label in timed}
    if sweeps:
        device["threads"] = {**sweeps, **device.get("threads", {})}


def _identity(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a device the same one another time."""
    machine = result.get("machine") or {}
    browser, phone = machine.get("browser") or {}, machine.get("phone") or {}
    agent = re.sub(r"/[\d.]+", "", str(browser.get("user_agent") or ""))
    return (str(result.get("device")), machine.get("cpu"), phone.get("model"), agent, browser.get("cores"))


def _files(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every file: complete results before partial ones, the latest first. Raises BadInput for a damaged
    one."""
    found = []
    for path in (run / FOLDER).glob("*.json"):
        try:
            measurement = json.loads(path.read_text(encoding="utf-8"))
            _ = str(measurement["measured"]), measurement["result"]["device"], dict(measurement["bundles"])
            _ = [entry["label"] for part in PARTS for entry in measurement["result"].get(part) or ()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path}: is damaged ({error!r}); delete it, or measure again") from error
        if measurement.get("format") == FORMAT:
            found.append((path, measurement))
    # Names hold microseconds: two results may be of one millisecond, and a folder lists files in any order.
    found.sort(key=lambda one: (one[1]["measured"], one[0].name), reverse=True)
    return sorted(found, key=lambda one: bool(one[1]["result"].get("lost")))


def _stands(run: Path, bundle: Mapping[str, Any]) -> bool:
    """Whether the bundle is there as it was when it was measured."""
    folder = run / str(bundle["path"])
    inside = folder.resolve().is_relative_to(run.resolve())
    return inside and folder.is_dir() and content(folder) == bundle["content"]
