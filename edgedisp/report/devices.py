"""Measurements on devices as tables: what `edgedisp bench` prints and its page shows.

`timed` is {devices [one result for each]}, a result being what `bench/devices.py` describes. Any figure may
be absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgedisp.report import device_scores
from edgedisp.report.reading import at, branch, number
from edgedisp.report.section import Grid, Section
from edgedisp.report.wording import MISSING, figure, fixed, megabytes

GIB = 1 << 30
Timed = Mapping[str, Any]
HEAD = (
    "bundle",
    "threads",
    "ttft ms",
    "prefill t/s",
    "decode t/s",
    "p50 ms",
    "p90 ms",
    "load s",
    "peak MB",
    "disk MB",
    "download MB",
    "GB/s",
)
MEANING = (
    "Batch 1, after a warm-up, bundles in turns; medians, with an interval for the median in brackets. "
    "ttft: from the prompt to the first new token; prefill: prompt tokens by that time; decode: tokens a "
    "second after the first one; p50 and p90: time of one of these; load: from files in memory; peak: "
    "largest resident memory (in a browser the WebAssembly heap); disk: graph and weights, download: all "
    "that a browser fetches; GB/s: bytes read for a token times tokens a second."
)
BROWSERS = {
    "SamsungBrowser": "Samsung Internet",
    "Edg": "Edge",
    "EdgA": "Edge",
    "OPR": "Opera",
    "Firefox": "Firefox",
    "FxiOS": "Firefox for iOS",
    "CriOS": "Chrome for iOS",
    "HeadlessChrome": "headless Chromium",
    "Chrome": "Chrome",
    "Version": "Safari",
}
"""Names in a user agent, the telling ones first: most browsers also name the one that they resemble."""


def sections(timed: Timed, *, named: bool = False) -> list[Section]:
    """The whole content: speeds side by side, every figure, then each device by itself.

    `named`: every row names its device, also where there is but one.
    """
    devices = [branch(device) for device in timed["devices"]]
    speeds = [device for device in devices if device.get("rows")]
    found = []
    if len(speeds) > 1:
        found.append(Section("side", "Decode speed side by side", grids=(_side_by_side(speeds),)))
    if speeds:
        grid = _figures(speeds, several=named or len(devices) > 1)
        found.append(Section("figures", "Every figure", MEANING, grids=(grid,)))
    if scored := device_scores.section(devices):
        found.append(scored)
    return [*found, *(_device(device, f"device{index}") for index, device in enumerate(devices))]


def _side_by_side(devices: list[dict[str, Any]]) -> Grid:
    """Bundles down, devices across."""
    labels = dict.fromkeys(str(row["label"]) for device in devices for row in device["rows"])
    rows = []
    for label in labels:
        cells: list[dict[str, Any]] = [
            next((r for r in device["rows"] if r["label"] == label), {}) for device in devices
        ]
        rows.append((label, *(_rate(cell, "decode_tokens_per_s") for cell in cells)))
    head = ("bundle", *(_name(device) for device in devices))
    return Grid(head, tuple(rows), "decode, tokens a second")


def _figures(devices: list[dict[str, Any]], several: bool) -> Grid:
    rows = []
    for device in devices:
        for row in map(branch, device["rows"]):
            partial = bool(row.get("partial", device.get("lost")))
            lead = (f"{_name(device)}{' (partial)' if partial else ''}",) if several else ()
            rows.append((*lead, *_texts(row)))
    head = (*(("device",) if several else ()), *HEAD)
    return Grid(head, tuple(rows), text_columns=(0, 1) if several else (0,))


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    value = {key: number(row.get(key)) for key in row}
    return (
        str(row["label"]),
        fixed(value.get("threads"), 0),
        _rate(row, "ttft_ms"),
        _rate(row, "prefill_tokens_per_s"),
        _rate(row, "decode_tokens_per_s"),
        figure(value.get("token_ms_p50")),
        figure(value.get("token_ms_p90")),
        fixed(value.get("load_s"), 2),
        megabytes(value.get("peak_memory_bytes")),
        megabytes(value.get("weights_bytes")),
        megabytes(value.get("download_bytes")),
        fixed(value.get("implied_bandwidth_gb_per_s"), 1),
    )


def _rate(row: Mapping[str, Any], key: str) -> str:
    """`150.0 [148.0, 152.0]`, the interval where the row has one."""
    low, high = (number(at(row, "spread", key, end)) for end in ("low", "high"))
    shown = figure(number(row.get(key)))
    return shown if low is None or high is None else f"{shown} [{figure(low)}, {figure(high)}]"


def _device(device: dict[str, Any], key: str) -> Section:
    """What the device is, how its threads were chosen, and what to beware of."""
    machine = branch(device, "machine")
    memory, cores = number(machine.get("memory_bytes")), number(machine.get("physical_cores"))
    load = branch(device, "load_average")
    known = {
        **_phone(machine),
        "processor": machine.get("cpu"),
        "features": " ".join(map(str, machine.get("features") or ())),
        "cores": None if cores is None else fixed(cores, 0),
        "memory": None if memory is None else f"{memory / GIB:.1f} GiB",
        "system": machine.get("system"),
        "browser": _browser(str(at(machine, "browser", "user_agent") or "")),
        "onnxruntime": at(machine, "packages", "onnxruntime"),
        "load average": _before_after(load.get("before"), load.get("after")),
        "clock": _range([r.get("clock_mhz") for r in device.get("repetitions") or ()], "MHz"),
        "temperature": _range([r.get("temperature_c") for r in device.get("repetitions") or ()], "°C"),
        "measured": _when(device.get("measured")),
    }
    facts = tuple((name, str(value)) for name, value in known.items() if value)
    return Section(
        key, _name(device), facts=facts, grids=tuple(_sweeps(device)), notes=tuple(warnings(device))
    )


def _browser(agent: str) -> str:
    """`Chrome 156`, `Safari 17`: of the names in a user agent the one that tells most, else the whole."""
    versions = dict(re.findall(r"(\w+)/(\d+)", agent))
    for name in BROWSERS:
        if name in versions:
            return f"{BROWSERS[name]} {versions[name]}"
    return agent[:80]


def _when(times: Any) -> str | None:
    """`2026-11-27 15:44 UTC`, from the first measurement to the last."""
    found = [str(time)[:16].replace("T", " ") for time in times] if isinstance(times, list) else []
    ends = list(dict.fromkeys([*found[:1], *found[-1:]]))
    return f"{' to '.join(ends)} UTC" if ends else None


def _name(device: Mapping[str, Any]) -> str:
    """As the user named it, with the model of a phone."""
    model = at(device, "machine", "phone", "model")
    return f"{device['device']} ({model})" if model else str(device["device"])


def _phone(machine: dict[str, Any]) -> dict[str, str | None]:
    """What a phone tells beside what every machine does: what it is, its battery and heat over the time."""
    phone, state = branch(machine, "phone"), branch(machine, "state")
    if not phone:
        return {}
    before, after = branch(state, "before"), branch(state, "after")

    def over(key: str, unit: str) -> str | None:
        told = [f"{one[key]}{unit}" for one in (before, after) if one.get(key) is not None]
        return " → ".join(dict.fromkeys(told)) or None

    battery = [
        over("battery_percent", " %"),
        over("battery_status", ""),
        over("battery_temperature_c", " °C"),
    ]
    return {
        "phone": " ".join(str(phone[key]) for key in ("manufacturer", "model") if phone.get(key)) or None,
        "measured by": phone.get("measured_by"),
        "battery": ", ".join(text for text in battery if text) or None,
        "thermal status": over("thermal_status", ""),
        "skin temperature": over("skin_temperature_c", " °C"),
    }


def _before_after(before: Any, after: Any) -> str | None:
    first, last = number(before), number(after)
    return None if first is None else f"{first:.2f} before, {fixed(last, 2)} after"


def _range(values: list[Any], unit: str) -> str | None:
    told = [value for value in map(number, values) if value is not None]
    if not told:
        return None
    low, high = fixed(min(told), 0), fixed(max(told), 0)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _sweeps(device: dict[str, Any]) -> list[Grid]:
    grids = []
    for label, swept in branch(device, "threads").items():
        rows = tuple(
            (
                fixed(number(row["threads"]), 0) + (" (best)" if row["threads"] == swept["best"] else ""),
                f"{figure(row['decode_tokens_per_s'])} [{figure(row['low'])}, {figure(row['high'])}]",
                figure(row["prefill_tokens_per_s"]),
            )
            for row in swept["rows"]
        )
        grids.append(Grid(("threads", "decode t/s", "prefill t/s"), rows, f"{label}: threads"))
    return grids


def warnings(device: Timed) -> list[str]:
    """What the measurement warns of: a lost device first, then in general, between arms, for one bundle."""
    said = [f"lost in the middle, what follows is partial: {device['lost']}"] if device.get("lost") else []
    said += [str(text) for text in device.get("warnings") or ()]
    said += [str(pair["fault"]) for pair in device.get("pairs") or () if pair.get("fault")]
    for row in device.get("rows") or ():
        said += [f"{row['label']}: {text}" for text in row.get("warnings") or ()]
    return said + device_scores.warnings(device)


def render_devices(timed: Timed, width: int) -> str:
    """The same for a terminal: the tables, and each device's warnings."""
    found = sections(timed)
    blocks = [
        "\n".join([section.title] * (section.key != "figures") + _lines(grid, width))
        for section in found
        for grid in section.grids
    ]
    for section in found:
        if section.key.startswith("device") and section.notes:
            blocks.append("\n".join(f"note: {section.title}: {note}" for note in section.notes))
    for label, threads in branch(timed, "written").items():
        blocks.append(f"{label}: {threads} threads written into the bundle")
    return "\n\n".join(blocks) or "No figures."


def _lines(grid: Grid, width: int) -> list[str]:
    """A table in plain characters; columns without any figure go, and then what does not fit goes below."""
    head, rows = list(grid.head), [list(row) for row in grid.rows]
    kept = [i for i in range(len(head)) if any(row[i] != MISSING for row in rows) or not rows]
    names = [i for i in kept if i in grid.text_columns]
    widths = {i: max(len(text) for text in [head[i], *(row[i] for row in rows)]) for i in kept}
    bands: list[list[int]] = [[]]
    start = sum(widths[i] + 2 for i in names)
    left = width - start
    for i in kept:
        if i in names:
            continue
        if widths[i] + 2 > left and bands[-1]:
            bands.append([])
            left = width - start
        bands[-1].append(i)
        left -= widths[i] + 2
    lines = []
    for band in bands:
        for row in [head, *rows]:
            cells = [row[i].ljust(widths[i]) for i in names] + [row[i].rjust(widths[i]) for i in band]
            lines.append("  ".join(cells).rstrip())
    return lines
