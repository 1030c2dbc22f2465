"""What devices measured of a run's bundles, kept in the run: `<run>/devices/*.json`, one file a measurement.

A file holds the result as `bench/devices.py` describes it, when it came, and for each bundle its folder in
the run with a hash of its files, taken before the measurement. `shown` reads them back: one entry a device,
labels being folders, such as `dispersed/int4`. A bundle that was made anew with other contents since has
another hash; what was measured of the old one is named as outdated and not shown.

Of one device, bundle, prompt, new tokens and threads the latest complete measurement stands, of scores the
latest of each task. An earlier file of which nothing is left is removed; a partial result replaces partial
ones alone. A device is the same when its name, its processor, a phone's model and, of a browser, its user
agent (without versions) and cores are.

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

from edgedisp.core.errors import BadInput
from edgedisp.core.stage_folder import MANIFEST, RECORD, RUN, digest, list_files, write_json

FORMAT = 1
FOLDER = "devices"
UNTIMED = {RECORD, MANIFEST, "README.md", "genai_config.json"}
"""Files that may change without changing what is timed; the threads that were used stand in every row."""
NOT_KEPT = {"client", "run"}  # a phone's address in somebody's network, and its page load
NOT_SHOWN = {"order", "groups", "answers"}
LISTS = ("rows", "scores", "repetitions", "pairs", "measured")
SETTINGS = ("prompt", "generate", "threads")  # of a row: with others it is another measurement
PARTS = ("rows", "logits", "scores")  # of a result, each of which a later one may replace by itself

Entry = tuple[str, str, str]
"""Part, label and, of scores, the task: what a result tells of one bundle."""


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
    if not any(result.get(part) for part in PARTS):
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
        keys = {entry: key for entry, key in one.keys.items() if _stands(run, one.bundles[entry[1]], current)}
        fresh = {entry for entry, key in keys.items() if key not in taken}
        taken |= set(keys.values())
        if fresh:
            parts.setdefault(one.identity, []).append(one.part(fresh))
        elif one.keys and not keys:
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
    def keys(self) -> dict[Entry, tuple[Any, ...]]:
        """Entry -> what a later measurement has in common with it that replaces it."""
        found: dict[Entry, tuple[Any, ...]] = {}
        for part in PARTS:
            for told in self._entries(part):
                label, task = str(told["label"]), str(told.get("task", ""))
                if label not in self.bundles:
                    continue  # not of this run
                how = tuple(told.get(name) for name in SETTINGS) if part == "rows" else ()
                found[part, label, task] = (*self.identity, self.bundles[label]["path"], part, task, *how)
        return found

    def _entries(self, part: str) -> list[dict[str, Any]]:
        told = self.result.get(part) or ()
        return list((told.get("rows") or ()) if part == "logits" and told else told)

    def gives_way_to(self, later: _Kept) -> bool:
        """Whether nothing of this one would be left beside `later`."""
        replaced = set(self.keys.values()) <= set(later.keys.values())
        return replaced and (self.partial or not later.partial)

    def part(self, wanted: Set[Entry]) -> dict[str, Any]:
        """The wanted entries of the result, bundles called by their folders; without the times of tokens."""
        names = {label: str(bundle["path"]) for label, bundle in self.bundles.items()}
        timed = {label for part, label, _ in wanted if part == "rows"}
        result = self.result

        def entries(part: str) -> list[dict[str, Any]]:
            return [
                {**told, "label": names[told["label"]]}
                for told in self._entries(part)
                if (part, told["label"], told.get("task", "")) in wanted
            ]

        return {
            **{key: value for key, value in result.items() if key not in NOT_SHOWN},
            "measured": [self.measured],
            "rows": [{**row, "partial": self.partial} for row in entries("rows")],
            "logits": {**logits, "rows": entries("logits")} if (logits := result.get("logits")) else None,
            "scores": entries("scores"),
            "repetitions": [
                {**{k: v for k, v in one.items() if not isinstance(v, list)}, "label": names[one["label"]]}
                for one in result.get("repetitions") or ()
                if one["label"] in timed
            ],
            "pairs": [
                {**pair, "baseline": names[pair["baseline"]], "dispersed": names[pair["dispersed"]]}
                for pair in result.get("pairs") or ()
                if {pair["baseline"], pair["dispersed"]} <= timed
            ],
            "threads": {
                names[label]: swept
                for label, swept in (result.get("threads") or {}).items()
                if label in timed
            },
        }


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


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One device's parts as one result; its first part, the latest complete one, tells of the machine."""
    found = dict(parts[0])
    for part in parts[1:]:
        lists = {key: [*found[key], *part[key]] for key in LISTS}
        said = [*(found.get("warnings") or ()), *(part.get("warnings") or ())]
        first, second = (one["logits"] or {} for one in (found, part))
        compared = [*(first.get("rows") or ()), *(second.get("rows") or ())]
        found = {
            **part,  # what else a device tells
            **found,
            **lists,
            "warnings": list(dict.fromkeys(said)),
            "threads": {**part["threads"], **found["threads"]},
            "logits": {**second, **first, "rows": compared} if compared else None,
        }
    rows = sorted(found["rows"], key=lambda row: str(row["label"]))
    told = {key: value for key, value in found.items() if value or key not in (*LISTS, "logits", "threads")}
    return {**told, "measured": sorted(found["measured"]), **({"rows": rows} if rows else {})}


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
