"""What devices measured of a run's bundles, kept in the run: `<run>/devices/*.json`, one file a measurement.

A file holds the result as `bench/devices.py` describes it, when it came, and for each bundle its folder in
the run with a hash of its files, taken before the measurement. `shown` reads them back: one entry a device,
labels being folders, such as `dispersed/int4`. A bundle that was made anew with other contents since has
another hash; what was measured of the old one is named as outdated and not shown.

Of one device, bundle, prompt, new tokens and threads the latest complete measurement stands. An earlier file
of which nothing is left is removed; a partial result replaces partial ones alone. A device is the same when
its name, its processor, a phone's model and, of a browser, its user agent (without versions) and cores are.

Stages and their records know nothing of this folder: measuring changes no key, and deleting a file there
forgets what it holds. Left out: a history of measurements; `edgedisp bench --json` gives each to whoever
keeps one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgedisp import BadInput
from edgedisp.folder import MANIFEST, RECORD, RUN, digest, list_files, write_json

FORMAT = 1
FOLDER = "devices"
UNTIMED = {RECORD, MANIFEST, "README.md", "genai_config.json"}
"""Files that may change without changing what is timed; the threads that were used stand in every row."""
NOT_KEPT = {"client", "run"}  # a phone's address in somebody's network, and its page load
NOT_SHOWN = {"order", "groups"}
NAMES = ("label", "baseline", "dispersed")  # keys whose values are labels of bundles


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


def keep(result: Mapping[str, Any], found: Mapping[str, Place]) -> list[Path]:
    """Write one device's result into the runs of its bundles (`found`, by label); returns these runs.

    Raises OSError where a run cannot be written, ValueError for a figure that is no number.
    """
    if not any(result.get(part) for part in ("rows", "logits", "scores")):
        return []  # lost before its first turn
    runs = sorted({place.run for place in found.values()})
    now = datetime.now(UTC)
    for run in runs:
        made = {
            "format": FORMAT,
            "measured": now.isoformat(timespec="milliseconds"),
            "bundles": {
                label: {"path": place.path, "content": place.content}
                for label, place in found.items()
                if place.run == run
            },
            "result": {key: value for key, value in result.items() if key not in NOT_KEPT},
        }
        (run / FOLDER).mkdir(exist_ok=True)
        file = _free_name(run / FOLDER, str(result["device"]), now)
        replaced = [one for one in _all(run) if one.gives_way_to(_Kept(file, made))]
        write_json(file, made)
        for one in replaced:
            one.file.unlink(missing_ok=True)
    return runs


def shown(run: Path) -> dict[str, Any]:
    """{devices [one result each, see bench/devices.py], devices_outdated [what of]}: for the report.

    A device's results are merged; a row of a partial one has `partial` true, `measured` is when. Raises
    BadInput for a damaged file.
    """
    current: dict[str, str | None] = {}
    taken: set[tuple[Any, ...]] = set()
    parts: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    outdated = []
    latest_first = sorted(_all(run), key=lambda one: one.measured, reverse=True)
    for one in sorted(latest_first, key=lambda one: one.partial):
        keys = {label: key for label, key in one.keys.items() if _stands(run, one.bundles[label], current)}
        fresh = {label for label, key in keys.items() if key not in taken}
        taken |= set(keys.values())
        if fresh:
            parts.setdefault(one.identity, []).append(one.part(fresh))
        elif not keys:
            names = ", ".join(sorted(str(bundle["path"]) for bundle in one.bundles.values()))
            outdated.append(f"{names} on {one.result.get('device')}, {one.measured[:10]}")
    merged = sorted((_merged(of_one) for of_one in parts.values()), key=lambda device: device["measured"][0])
    return {"devices": _named_apart(merged), "devices_outdated": sorted(outdated)}


@dataclass(frozen=True)
class _Kept:
    """One file, whole or about to be written."""

    file: Path
    raw: dict[str, Any]

    @property
    def result(self) -> dict[str, Any]:
        return dict(self.raw["result"])

    @property
    def bundles(self) -> dict[str, Any]:
        return dict(self.raw["bundles"])

    @property
    def measured(self) -> str:
        return str(self.raw["measured"])

    @property
    def partial(self) -> bool:
        return bool(self.result.get("lost"))

    @property
    def identity(self) -> tuple[Any, ...]:
        """What makes a device the same one another time."""
        machine = self.result.get("machine") or {}
        browser, phone = machine.get("browser") or {}, machine.get("phone") or {}
        agent = re.sub(r"/[\d.]+", "", str(browser.get("user_agent") or ""))
        model = phone.get("model")
        return (str(self.result.get("device")), machine.get("cpu"), model, agent, browser.get("cores"))

    @property
    def keys(self) -> dict[str, tuple[Any, ...]]:
        """Label -> what a later measurement has in common that replaces this one's figures."""
        rows = {row["label"]: row for row in self.result.get("rows") or ()}
        compared = {row["label"] for row in (self.result.get("logits") or {}).get("rows") or ()}
        found = {}
        for label, bundle in self.bundles.items():
            if label in rows:
                how = tuple(rows[label].get(name) for name in ("prompt", "generate", "threads"))
            elif label in compared or not (rows or compared):
                how = ("logits",)
            else:
                continue  # lost before its first turn
            found[label] = (*self.identity, bundle["path"], *how)
        return found

    def gives_way_to(self, later: _Kept) -> bool:
        """Whether nothing of this one would be left beside `later`."""
        replaced = set(self.keys.values()) <= set(later.keys.values())
        return replaced and (self.partial or not later.partial)

    def part(self, labels: Set[str]) -> dict[str, Any]:
        """The result of some bundles, called by their folders; without the single times of tokens."""
        names = {label: str(bundle["path"]) for label, bundle in self.bundles.items()}
        left = {key: value for key, value in self.result.items() if key not in NOT_SHOWN}
        left["repetitions"] = [
            {key: value for key, value in repetition.items() if not isinstance(value, list)}
            for repetition in left.get("repetitions") or ()
        ]
        parts = (left.get("rows"), left.get("repetitions"), (left.get("logits") or {}).get("rows"))
        told = {str(entry["label"]) for entries in parts for entry in entries or ()}
        part: dict[str, Any] = _relabelled(left, names, (told | set(names)) - set(labels))
        rows = [{**row, "partial": self.partial} for row in part.get("rows") or ()]
        return {**part, "measured": [self.measured], **({"rows": rows} if rows else {})}


def _all(run: Path) -> list[_Kept]:
    """Every file. Raises BadInput for one that is damaged."""
    found = []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            one = _Kept(path, json.loads(path.read_text(encoding="utf-8")))
            _ = one.measured, one.identity, one.keys
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{path}: is damaged ({error!r}); delete it, or measure again") from error
        if one.raw.get("format") == FORMAT:
            found.append(one)
    return found


def _stands(run: Path, bundle: Mapping[str, Any], known: dict[str, str | None]) -> bool:
    """Whether the bundle is there as it was when it was measured."""
    path = str(bundle["path"])
    if path not in known:
        folder = run / path
        inside = folder.resolve().is_relative_to(run.resolve())
        known[path] = content(folder) if inside and folder.is_dir() else None
    return known[path] == bundle["content"]


def _relabelled(tree: Any, names: Mapping[str, str], dropped: Set[str]) -> Any:
    """Labels as values of NAMES and as keys become `names`; entries of a list about a dropped label go."""
    if isinstance(tree, Mapping):
        return {
            names.get(key, key): names.get(value, value)
            if key in NAMES and isinstance(value, str)
            else _relabelled(value, names, dropped)
            for key, value in tree.items()
            if key not in dropped
        }
    if isinstance(tree, list):
        return [
            _relabelled(entry, names, dropped)
            for entry in tree
            if not (isinstance(entry, Mapping) and {str(entry.get(name)) for name in NAMES} & dropped)
        ]
    return tree


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One device's parts as one result; its first part, the latest complete one, tells of the machine."""
    found = dict(parts[0])
    for part in parts[1:]:
        for key in ("rows", "pairs", "repetitions", "measured"):
            found[key] = [*(found.get(key) or ()), *(part.get(key) or ())]
        found["warnings"] = list(
            dict.fromkeys([*(found.get("warnings") or ()), *(part.get("warnings") or ())])
        )
        found["threads"] = {**(part.get("threads") or {}), **(found.get("threads") or {})}
        if part.get("logits"):
            before = (found.get("logits") or {}).get("rows") or ()
            found["logits"] = {**part["logits"], "rows": [*before, *part["logits"]["rows"]]}
        found = {**part, **found}  # what else a device tells
    rows = sorted(found.get("rows") or (), key=lambda row: str(row["label"]))
    return {**found, "measured": sorted(found["measured"]), **({"rows": rows} if rows else {})}


def _named_apart(devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Different devices of one name, such as phones that do not tell theirs, get numbers."""
    seen: dict[str, int] = {}
    found = []
    for device in devices:
        name = str(device["device"])
        seen[name] = seen.get(name, 0) + 1
        found.append({**device, "device": name if seen[name] == 1 else f"{name} {seen[name]}"})
    return found


def _free_name(folder: Path, device: str, now: datetime) -> Path:
    """`ssh-pi-192-0-2-7-20261127T154412.json`: nothing in a device's name can lead out of the folder."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")[:40] or "device"
    stem = f"{name}-{now:%Y%m%dT%H%M%S}"
    names = (stem, *(f"{stem}-{number}" for number in range(2, 10_000)))
    return next(path for one in names if not (path := folder / f"{one}.json").exists())
