"""Measurements on devices as tables: for a terminal, for a page, and as the section of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgedisp.core.results import DeviceResult, Difference, Estimate, Json, Run, Timing
from edgedisp.core.serialization import from_json
from edgedisp.report.comparisons import comparison_of
from edgedisp.report.formatting import (
    MISSING,
    count,
    fixed,
    format_estimate,
    megabytes,
    p_value,
    plural,
    significant,
    small,
)
from edgedisp.report.layout import Grid, Section, grid_text, section
from edgedisp.report.run_sections import warnings as timing_warnings

GIB = 1 << 30
TIMING_HEAD = (
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
TIMING_MEANING = (
    "Batch 1, after a warm-up, bundles in turns; medians, with an interval for the median in brackets. "
    "ttft: from the prompt to the first new token; prefill: prompt tokens by that time; decode: tokens a "
    "second after the first one; p50 and p90: time of one of these; load: from files in memory; peak: "
    "largest resident memory (in a browser the WebAssembly heap); disk: graph and weights, download: all "
    "that a browser fetches; GB/s: bytes read for a token times tokens a second."
)
SCORES_HEAD = (
    "bundle",
    "task",
    "items",
    "on the device",
    "here, same items",
    "device - here",
    "verdict",
    "answered alike",
    "nats apart (most)",
    "all here",
)
SCORES_MEANING = (
    "The same bundle and the same token ids, on the device and here. Items are drawn at random; brackets are "
    "95 % intervals. device - here: paired by item (perplexities: nats per token); answered alike: the same "
    "choice or, where there is none, both right or both wrong; nats apart: log-likelihoods, by item; all "
    "here: "
    "the whole set that the items were drawn from."
)
REPORT_FACTS = {
    "phone": "{}",
    "processor": "{}",
    "cores": "{} cores",
    "memory": "{}",
    "system": "{}",
    "browser": "{}",
    "onnxruntime": "onnxruntime {}",
    "measured by": "by {}",
    "battery": "battery {}",
    "thermal status": "thermal status {}",
    "measured": "measured {}",
}
"""The facts of a device that a report gives in one line, and how."""


def device_sections(devices: Sequence[DeviceResult]) -> list[Section]:
    """Speeds side by side, every figure, scores, then each device by itself."""
    timed = [device for device in devices if device.rows]
    several = len(devices) > 1
    found = [
        section("side", "Decode speed side by side", [_side_by_side(timed)] if len(timed) > 1 else []),
        section("figures", "Every figure", [_timing_grid(timed, several)], TIMING_MEANING),
        section("scores", "Scored on the device", [_scores_grid(devices, several)], SCORES_MEANING),
        *(_device_section(device, f"device{place}") for place, device in enumerate(devices)),
    ]
    return [one for one in found if not one.is_empty or one.key.startswith("device")]


def on_devices_section(run: Run) -> Section:
    """The same in a run's report: one table over all devices, their facts in a line each."""
    devices = run.devices
    lengths = sorted({_lengths(row) for device in devices for row in device.rows})
    if len(lengths) > 1:
        devices = [
            replace(one, rows=[replace(row, label=f"{row.label}, {_lengths(row)}") for row in one.rows])
            for one in devices
        ]
    lead = "Measured on the devices themselves after the build, of the bundles as they are."
    lead += f" Prompt and new tokens: {', '.join(lengths)}." if lengths else ""
    timings, scores = _timing_grid(devices, True), _scores_grid(devices, True)
    sweeps = [
        replace(grid, caption=f"{_name(device)}, {grid.caption}", folded=True)
        for device in devices
        for grid in _sweep_grids(device)
    ]
    notes = [f"{_name(device)}: {note}" for device in devices for note in warnings(device)]
    if run.devices_outdated:
        names = "; ".join(run.devices_outdated)
        number = plural(len(run.devices_outdated), "measurement")
        notes.append(f"Not shown, as the bundles were made anew since: {number} ({names}).")
    notes += [TIMING_MEANING] if timings.rows else []
    notes += [SCORES_MEANING] if scores.rows else []
    return section(
        "devices",
        "On devices",
        [_first_joined(timings, "All devices"), _first_joined(scores, "Scored on the device"), *sweeps],
        lead,
        facts=tuple((_name(device), _fact_line(device)) for device in devices),
        notes=tuple(notes),
    )


def _fact_line(device: DeviceResult) -> str:
    """`AMD EPYC 7763, 2 cores, 15.6 GiB, Linux, onnxruntime 1.31.1, measured 2026-11-27 15:44 UTC`."""
    facts = dict(_facts(device))
    return ", ".join(form.format(facts[key]) for key, form in REPORT_FACTS.items() if key in facts) or MISSING


def _first_joined(grid: Grid, caption: str) -> Grid:
    """Device and bundle in one column, which a phone's screen holds while the others are moved."""
    grid = grid.without_empty_columns()
    rows = tuple((f"{row[0]}, {row[1]}", *row[2:]) for row in grid.rows)
    columns = (0, *(at - 1 for at in grid.text_columns if at > 1))
    return replace(
        grid, head=("device, bundle", *grid.head[2:]), rows=rows, caption=caption, text_columns=columns
    )


def _lengths(row: Timing) -> str:
    return f"{row.prompt}+{row.generate}"


# Timings


def _side_by_side(devices: Sequence[DeviceResult]) -> Grid:
    """Bundles down, devices across."""
    labels = dict.fromkeys(row.label for device in devices for row in device.rows)
    cells = {label: [device.timing(label) for device in devices] for label in labels}
    rows = tuple(
        (label, *(format_estimate(row.decode_tokens_per_s) if row else MISSING for row in rows))
        for label, rows in cells.items()
    )
    return Grid(("bundle", *map(_name, devices)), rows, "decode, tokens a second")


def _timing_grid(devices: Sequence[DeviceResult], several: bool) -> Grid:
    rows = []
    for device in devices:
        for row in device.rows:
            partial = " (partial)" if row.partial or device.lost else ""
            rows.append((*((f"{_name(device)}{partial}",) if several else ()), *_timing_texts(row)))
    head = (*(("device",) if several else ()), *TIMING_HEAD)
    return Grid(head, tuple(rows), text_columns=(0, 1) if several else (0,))


def _timing_texts(row: Timing) -> tuple[str, ...]:
    return (
        row.label,
        fixed(row.threads, 0),
        format_estimate(row.ttft_ms),
        format_estimate(row.prefill_tokens_per_s),
        format_estimate(row.decode_tokens_per_s),
        significant(row.token_ms_p50),
        significant(row.token_ms_p90),
        fixed(row.load_s, 2),
        megabytes(row.peak_memory_bytes),
        megabytes(row.weights_bytes),
        megabytes(row.download_bytes),
        fixed(row.bandwidth_gb_per_s, 1),
    )


def _sweep_grids(device: DeviceResult) -> list[Grid]:
    grids = []
    for label, sweep in device.threads.items():
        rows = tuple(
            (
                fixed(row["threads"], 0) + (" (best)" if row["threads"] == sweep["best"] else ""),
                format_estimate(Estimate(row["decode_tokens_per_s"], row["low"], row["high"])),
                significant(row["prefill_tokens_per_s"]),
            )
            for row in sweep["rows"]
        )
        grids.append(Grid(("threads", "decode t/s", "prefill t/s"), rows, f"{label}: threads"))
    return grids


# Scores


def _scores_grid(devices: Sequence[DeviceResult], several: bool) -> Grid:
    rows = [
        ((_name(device),) if several else ()) + _score_texts(record)
        for device in devices
        for record in device.scores
    ]
    head = ("device", *SCORES_HEAD) if several else SCORES_HEAD
    return Grid(head, tuple(rows), text_columns=(0, 1, 2) if several else (0, 1))


def _score_texts(record: Json) -> tuple[str, ...]:
    is_percent = bool(record["higher_is_better"]) and 0 <= record["full"]["value"] <= 1
    scale, unit = (100.0, " %") if is_percent else (1.0, "")
    apart = record.get("logprob")
    task, metric = str(record["task"]), str(record["metric"])
    shift = MISSING
    if record.get("difference"):
        row = comparison_of("", "", task, from_json(Difference, record["difference"]))
        shift = format_estimate(row.estimate, scale, signs=True)

    def figure(part: str) -> str:
        if not record.get(part):
            return MISSING
        return format_estimate(from_json(Estimate, record[part]), scale) + unit

    alike = record.get("agreement")
    share = Estimate(alike["share"], alike["low"], alike["high"]) if alike else None
    return (
        str(record["label"]),
        task if metric in task else f"{task}, {metric}",
        f"{count(record['answered'])} of {count(record['of'])}",
        figure("device"),
        figure("here"),
        shift,
        score_verdict(record),
        MISSING if share is None else f"{format_estimate(share, 100)} %",
        MISSING if not apart else f"{small(apart['mean'])} ({small(apart['max'])})",
        figure("full"),
    )


def score_verdict(record: Json) -> str:
    """`better` or `worse on the device` by the rule of every comparison, else why not."""
    if not record.get("difference"):
        return MISSING
    row = comparison_of("", "", str(record["task"]), from_json(Difference, record["difference"]))
    if not row.estimate.has_interval:
        return "cannot tell"
    if row.value == 0 and (record.get("agreement") or {}).get("share") == 1:
        return "the same"
    if not row.is_clear:
        return "no measurable difference"
    return f"{row.direction} on the device (p = {p_value(row.p)})"


# One device


def _device_section(device: DeviceResult, key: str) -> Section:
    """What the device is, how its threads were chosen, and what to beware of."""
    grids = tuple(_sweep_grids(device))
    return Section(key, _name(device), facts=_facts(device), grids=grids, notes=tuple(warnings(device)))


def _name(device: DeviceResult) -> str:
    """As the user named it, with the model of a phone."""
    model = (device.machine.get("phone") or {}).get("model")
    return f"{device.device} ({model})" if model else device.device


def _facts(device: DeviceResult) -> tuple[tuple[str, str], ...]:
    machine = device.machine
    memory, load = machine.get("memory_bytes"), device.load_average
    before_after = (
        f"{load['before']:.2f} before, {fixed(load.get('after'), 2)} after" if load.get("before") else None
    )
    known = {
        **_phone_facts(machine),
        "processor": machine.get("cpu"),
        "features": " ".join(map(str, machine.get("features") or ())),
        "cores": machine.get("physical_cores"),
        "memory": f"{memory / GIB:.1f} GiB" if memory else None,
        "system": machine.get("system"),
        "browser": str((machine.get("browser") or {}).get("user_agent") or "")[:120],
        "onnxruntime": (machine.get("packages") or {}).get("onnxruntime"),
        "load average": before_after,
        "clock": _range(device.clock_mhz, "MHz"),
        "temperature": _range(device.temperature_c, "°C"),
        "measured": _times(device.measured),
    }
    return tuple((name, str(value)) for name, value in known.items() if value)


def _phone_facts(machine: Json) -> dict[str, Any]:
    """A phone's model, battery and heat, before and after."""
    phone, state = machine.get("phone"), machine.get("state") or {}
    if not phone:
        return {}
    moments = [state.get("before") or {}, state.get("after") or {}]

    def over(key: str, unit: str) -> str:
        values = [f"{one[key]}{unit}" for one in moments if one.get(key) is not None]
        return " → ".join(dict.fromkeys(values))

    battery = over("battery_percent", " %"), over("battery_status", ""), over("battery_temperature_c", " °C")
    return {
        "phone": " ".join(str(phone[key]) for key in ("manufacturer", "model") if phone.get(key)),
        "measured by": phone.get("measured_by"),
        "battery": ", ".join(text for text in battery if text),
        "thermal status": over("thermal_status", ""),
        "skin temperature": over("skin_temperature_c", " °C"),
    }


def _range(ends: tuple[float, float] | None, unit: str) -> str | None:
    if ends is None:
        return None
    low, high = fixed(ends[0], 0), fixed(ends[1], 0)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _times(times: Sequence[str]) -> str | None:
    """`2026-11-27 15:44 UTC`, from the first measurement to the last."""
    minutes = [time[:16].replace("T", " ") for time in times]
    return f"{' to '.join(dict.fromkeys([minutes[0], minutes[-1]]))} UTC" if minutes else None


def warnings(device: DeviceResult) -> list[str]:
    """What to beware of: in the timings, and items that were not answered or lost some context."""
    notes = timing_warnings(device)
    for record in device.scores:
        which = f"{record['label']}: {record['task']}"
        if record["answered"] < record["drawn"]:
            notes.append(f"{which}: {record['answered']} of {plural(record['drawn'], 'item')} answered")
        if record.get("reason") and record["answered"]:
            notes.append(f"{which}: {record['reason']}")
        if record["truncated"]:
            cut = plural(record["truncated"], "item")
            notes.append(f"{which}: {cut} longer than the context, cut on the left, here as there")
    return notes


def devices_text(devices: Sequence[DeviceResult], width: int = 80) -> str:
    """The same for a terminal: the tables, and each device's warnings."""
    blocks = []
    for part in device_sections(devices):
        for grid in part.grids:
            title = [part.title] if part.key != "figures" and not part.key.startswith("device") else []
            blocks.append("\n".join([*title, grid_text(grid, width)]))
        if part.key.startswith("device") and part.notes:
            blocks.append("\n".join(f"note: {part.title}: {note}" for note in part.notes))
    return "\n\n".join(blocks) or "No figures."
