"""The section of a run's report on devices: what `edgedisp bench --report` and `edgedisp phone` measured.

The content of `edgedisp bench --html` (devices.py) as one section: all devices in one table, their facts in a
line each, their warnings below.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgedisp.report.devices import sections
from edgedisp.report.reading import Summary, at, branch, number
from edgedisp.report.section import Grid, Section
from edgedisp.report.wording import MISSING, fixed, plural

LEFT_OUT = ("side",)  # the one table shows speeds side by side
FACTS = (
    *("phone", "processor", "cores", "memory", "system", "browser", "onnxruntime"),
    *("measured by", "battery", "thermal status", "measured"),
)


def on_devices(summary: Summary) -> Section:
    """One table over all devices, thread sweeps; facts and notes by device."""
    found = at(summary, "devices")
    devices = [branch(device) for device in found] if isinstance(found, list) else []
    told = {_lengths(branch(row)) for device in devices for row in device.get("rows") or ()}
    asked = sorted(lengths for lengths in told if MISSING not in lengths)
    if len(asked) > 1:
        devices = [_with_lengths(device) for device in devices]
    facts, grids, folded, notes, meanings = [], [], [], list[str](), list[str]()
    for section in sections({"devices": devices}, named=True):
        if section.key.startswith("device"):
            facts.append((section.title, _facts(dict(section.facts))))
            folded += [
                replace(grid, caption=f"{section.title}, {grid.caption}", folded=True)
                for grid in section.grids
            ]
            notes += [f"{section.title}: {note}" for note in section.notes]
        elif section.key not in LEFT_OUT:
            meanings.append(section.lead)
            title = "All devices" if section.key == "figures" else section.title
            grids += [_one_name(_shorter(grid, title)) for grid in section.grids]
    notes += [*_outdated(summary), *meanings]
    lead = "Measured on the devices themselves after the build, of the bundles as they are."
    if asked:
        lead += f" Prompt and new tokens: {', '.join(asked)}."
    return Section(
        "devices",
        "On devices",
        lead,
        facts=tuple(facts),
        grids=(*grids, *folded),
        notes=tuple(notes),
    )


def _facts(known: dict[str, str]) -> str:
    """`AMD EPYC 7763, 2 cores, 15.6 GiB, Linux, onnxruntime 1.31.1, measured 2026-11-27 15:44 UTC`."""
    shown = {"cores": "{} cores", "onnxruntime": "onnxruntime {}", "measured": "measured {}"}
    shown |= {"measured by": "by {}", "battery": "battery {}", "thermal status": "thermal status {}"}
    told = [shown.get(name, "{}").format(known[name]) for name in FACTS if name in known]
    return ", ".join(told) or MISSING


def _shorter(grid: Grid, title: str) -> Grid:
    """Without columns that hold nothing, and called by its section where it has no caption."""
    kept = [at for at in range(len(grid.head)) if any(row[at] != MISSING for row in grid.rows)]
    return replace(
        grid,
        head=tuple(grid.head[at] for at in kept),
        rows=tuple(tuple(row[at] for at in kept) for row in grid.rows),
        caption=grid.caption or title,
        text_columns=tuple(place for place, at in enumerate(kept) if at in grid.text_columns),
    )


def _one_name(grid: Grid) -> Grid:
    """Device and bundle in one column: a phone's screen holds the first one while the others are moved."""
    if grid.head[:2] != ("device", "bundle"):
        return grid
    return replace(
        grid,
        head=("device, bundle", *grid.head[2:]),
        rows=tuple((f"{row[0]}, {row[1]}", *row[2:]) for row in grid.rows),
        text_columns=(0, *(place - 1 for place in grid.text_columns if place > 1)),
    )


def _lengths(row: dict[str, Any]) -> str:
    """`128+128`: tokens of the prompt and new ones."""
    return f"{fixed(number(row.get('prompt')), 0)}+{fixed(number(row.get('generate')), 0)}"


def _with_lengths(device: dict[str, Any]) -> dict[str, Any]:
    """Where not all were asked the same: each row's name tells what it was."""
    rows = [{**row, "label": f"{row['label']}, {_lengths(branch(row))}"} for row in device.get("rows") or ()]
    return {**device, **({"rows": rows} if rows else {})}


def _outdated(summary: Summary) -> list[str]:
    found = at(summary, "devices_outdated")
    names = [str(name) for name in found] if isinstance(found, list) else []
    if not names:
        return []
    return [
        f"Not shown, as the bundles were made anew since: {plural(len(names), 'measurement')} "
        f"({'; '.join(names)})."
    ]
