"""Measurements on devices as tables: for a terminal, for a page, and as sections of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from edgedisp.core.files import from_json
from edgedisp.core.results import DeviceResult, Difference, Estimate, Json, Timing
from edgedisp.core.run import Run
from edgedisp.report.comparisons import comparison_of
from edgedisp.report.formatting import (
    MISSING,
    count,
    fixed,
    format_estimate,
    label,
    megabytes,
    p_value,
    percent,
    plural,
    significant,
    small,
)
from edgedisp.report.layout import TERMS, Grid, Section, grid, grid_text, section

TIMING_COLUMNS: dict[str, Callable[[Timing], str]] = {
    "threads": lambda row: fixed(row.threads, 0),
    "prompt+new": lambda row: f"{row.prompt}+{row.generate}",
    "ttft ms": lambda row: format_estimate(row.ttft_ms),
    "prefill t/s": lambda row: format_estimate(row.prefill_tokens_per_s),
    "decode t/s": lambda row: format_estimate(row.decode_tokens_per_s),
    "p50 ms": lambda row: significant(row.token_ms_p50),
    "p90 ms": lambda row: significant(row.token_ms_p90),
    "load s": lambda row: fixed(row.load_s, 2),
    "peak MB": lambda row: megabytes(row.peak_memory_bytes),
    "disk MB": lambda row: megabytes(row.weights_bytes),
    "download MB": lambda row: megabytes(row.download_bytes),
    "GB/s": lambda row: fixed(row.bandwidth_gb_per_s, 1),
}


# The report of a run


def latency_section(run: Run) -> Section:
    """Every bundle's timing on this machine, the measurement's own noise, and quality against cost."""
    result = run.latency or DeviceResult("local")
    names = [
        (f"{label(precision)}, {arm}", arm, precision) for precision in run.precisions for arm in run.arms
    ]
    timed = [(name, result.timing(f"{arm}/{precision}"), precision) for name, arm, precision in names]
    rows = [(name, timing) for name, timing, _ in timed if timing]
    speeds: dict[str, list[float]] = {}
    for _, timing, precision in timed:
        if timing and timing.decode_tokens_per_s and timing.decode_tokens_per_s.value:
            speeds.setdefault(precision, []).append(timing.decode_tokens_per_s.value)
    gaps = [max(values) / min(values) - 1 for values in speeds.values() if len(values) > 1]
    notes = [
        f"Training does not change a graph, so arms are equally fast: the largest gap in decode speed, "
        f"{percent(max(gaps))}, is the noise of this measurement."
    ] if gaps else []  # fmt: skip
    notes += ["Timed: the first seed of each arm."] if rows and len(run.seeds) > 1 else []
    return section(
        "latency",
        [grid("bundle", rows, TIMING_COLUMNS)],
        plots=("tradeoff",),
        notes=[*notes, *_warnings(result), TERMS["timing"]] if rows else [],
    )


def on_devices_section(run: Run) -> Section:
    """What devices measured after the build: one table over all of them, their facts in a line each."""
    timings, scores = _timing_grid(run.devices), _scores_grid(run.devices)
    facts = [
        (_name(device), ", ".join(f"{name} {text}" for name, text in _facts(device)) or MISSING)
        for device in run.devices
    ]
    notes = [f"{_name(device)}: {note}" for device in run.devices for note in _warnings(device)]
    if run.devices_outdated:
        names = "; ".join(run.devices_outdated)
        number = plural(len(run.devices_outdated), "measurement")
        notes.append(f"Not shown, as the bundles were made anew since: {number} ({names}).")
    notes += [TERMS["timing"]] if timings.rows and not run.latency else []
    notes += [TERMS["device_scores"]] if scores.rows else []
    sweeps = [one for device in run.devices for one in _sweep_grids(device)]
    return section("devices", [timings, scores, *sweeps], facts=facts, notes=notes)


# One measurement


def device_sections(devices: Sequence[DeviceResult]) -> list[Section]:
    """Speeds side by side, every figure, scores, then each device by itself."""
    side = [_side_by_side(devices)] if sum(bool(device.rows) for device in devices) > 1 else []
    tables = [
        section("side", side),
        section("figures", [_timing_grid(devices)], TERMS["timing"]),
        section("device_scores", [_scores_grid(devices)], TERMS["device_scores"]),
    ]
    singles = [
        Section(
            f"device{place}",
            _name(one),
            tuple(_sweep_grids(one)),
            "",
            tuple(_facts(one)),
            (),
            tuple(_warnings(one)),
        )
        for place, one in enumerate(devices)
    ]
    return [*(one for one in tables if not one.is_empty), *singles]


def devices_text(devices: Sequence[DeviceResult], width: int = 80) -> str:
    """The same for a terminal: the tables, and each device's warnings."""
    blocks = []
    for part in device_sections(devices):
        blocks += [grid_text(one, width) for one in part.grids]
        if part.notes:
            blocks.append("\n".join(f"note: {part.title}: {note}" for note in part.notes))
    return "\n\n".join(blocks) or "No figures."


def _side_by_side(devices: Sequence[DeviceResult]) -> Grid:
    """Bundles down, devices across."""
    labels = dict.fromkeys(row.label for device in devices for row in device.rows)
    columns = {
        _name(device): lambda bundle, device=device: format_estimate(
            row.decode_tokens_per_s if (row := device.timing(bundle)) else None
        )
        for device in devices
        if device.rows
    }
    return grid("bundle", [(one, one) for one in labels], columns, "Decode speed, tokens a second")


def _prefix(device: DeviceResult, devices: Sequence[DeviceResult]) -> str:
    return f"{_name(device)}, " if len(devices) > 1 else ""


def _timing_grid(devices: Sequence[DeviceResult]) -> Grid:
    rows = [
        (f"{_prefix(device, devices)}{row.label}{' (partial)' * bool(row.partial or device.lost)}", row)
        for device in devices
        for row in device.rows
    ]
    return grid("bundle", rows, TIMING_COLUMNS, "All timings")


def _sweep_grids(device: DeviceResult) -> list[Grid]:
    columns: dict[str, Callable[[Json], str]] = {
        "decode t/s": lambda row: format_estimate(
            Estimate(row["decode_tokens_per_s"], row["low"], row["high"])
        ),
        "prefill t/s": lambda row: significant(row["prefill_tokens_per_s"]),
    }
    grids = []
    for bundle, sweep in device.threads.items():
        rows = [
            (f"{row['threads']}{' (best)' * (row['threads'] == sweep['best'])}", row) for row in sweep["rows"]
        ]
        grids.append(grid("threads", rows, columns, f"{_name(device)}, {bundle}: threads", folded=True))
    return grids


# Scores


def _scores_grid(devices: Sequence[DeviceResult]) -> Grid:
    columns: dict[str, Callable[[Json], str]] = {
        "items": lambda record: f"{count(record['answered'])} of {count(record['of'])}",
        "on the device": lambda record: _score(record, "device"),
        "here, same items": lambda record: _score(record, "here"),
        "device - here": _score_difference,
        "verdict": score_verdict,
        "answered alike": _agreement,
        "nats apart (most)": lambda record: (
            f"{small(apart['mean'])} ({small(apart['max'])})" if (apart := record.get("logprob")) else MISSING
        ),
        "all here": lambda record: _score(record, "full"),
    }
    rows = [
        (f"{_prefix(device, devices)}{record['label']}: {_task(record)}", record)
        for device in devices
        for record in device.scores
    ]
    return grid("bundle: task", rows, columns, "Scored on the device")


def _task(record: Json) -> str:
    task, metric = str(record["task"]), str(record["metric"])
    return task if metric in task else f"{task}, {metric}"


def _scale(record: Json) -> float:
    """100 for shares, which are shown as percent."""
    return 100.0 if record["higher_is_better"] and 0 <= record["full"]["value"] <= 1 else 1.0


def _score(record: Json, part: str) -> str:
    if not record.get(part):
        return MISSING
    scale = _scale(record)
    return format_estimate(from_json(Estimate, record[part]), scale) + " %" * (scale == 100)


def _score_difference(record: Json) -> str:
    if not record.get("difference"):
        return MISSING
    row = comparison_of("", "", str(record["task"]), from_json(Difference, record["difference"]))
    return format_estimate(row.estimate, _scale(record), signs=True)


def _agreement(record: Json) -> str:
    alike = record.get("agreement")
    if not alike:
        return MISSING
    return f"{format_estimate(Estimate(alike['share'], alike['low'], alike['high']), 100)} %"


def score_verdict(record: Json) -> str:
    """`better` or `worse on the device` by the rule of every comparison, else why not."""
    if not record.get("difference"):
        return MISSING
    row = comparison_of("", "", str(record["task"]), from_json(Difference, record["difference"]))
    if not row.estimate.has_interval:
        return "cannot tell"
    if row.value == 0 and (record.get("agreement") or {}).get("share") == 1:
        return "the same"
    return (
        f"{row.direction} on the device (p = {p_value(row.p)})"
        if row.is_clear
        else "no measurable difference"
    )


# Facts and warnings


def _name(device: DeviceResult) -> str:
    """As the user named it, with the model of a phone."""
    model = (device.machine.get("phone") or {}).get("model")
    return f"{device.device} ({model})" if model else device.device


def _facts(device: DeviceResult) -> list[tuple[str, str]]:
    machine, load = device.machine, device.load_average
    memory, minutes = machine.get("memory_bytes"), [time[:16].replace("T", " ") for time in device.measured]
    facts = {
        **_phone_facts(machine),
        "processor": machine.get("cpu"),
        "features": " ".join(map(str, machine.get("features") or ())),
        "cores": machine.get("physical_cores"),
        "memory": memory and f"{memory / (1 << 30):.1f} GiB",
        "system": machine.get("system"),
        "browser": str((machine.get("browser") or {}).get("user_agent") or "")[:120],
        "onnxruntime": (machine.get("packages") or {}).get("onnxruntime"),
        "load average": load.get("before") and f"{fixed(load['before'], 2)} → {fixed(load.get('after'), 2)}",
        "clock": device.clock_mhz and _range(device.clock_mhz, "MHz"),
        "temperature": device.temperature_c and _range(device.temperature_c, "°C"),
        "measured": minutes and f"{' to '.join(dict.fromkeys([minutes[0], minutes[-1]]))} UTC",
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _phone_facts(machine: Json) -> dict[str, Any]:
    """A phone's model, battery and heat, before and after."""
    phone, state = machine.get("phone") or {}, machine.get("state") or {}

    def over(key: str, unit: str = "") -> str:
        moments = [state.get("before") or {}, state.get("after") or {}]
        values = [f"{one[key]}{unit}" for one in moments if one.get(key) is not None]
        return " → ".join(dict.fromkeys(values))

    battery = over("battery_percent", " %"), over("battery_status"), over("battery_temperature_c", " °C")
    return {
        "phone": " ".join(str(phone[key]) for key in ("manufacturer", "model") if phone.get(key)),
        "measured by": phone.get("measured_by"),
        "battery": ", ".join(text for text in battery if text),
        "thermal status": over("thermal_status"),
        "skin temperature": over("skin_temperature_c", " °C"),
    }


def _range(limits: tuple[float, float], unit: str) -> str:
    return f"{' to '.join(dict.fromkeys(fixed(value, 0) for value in limits))} {unit}"


def _warnings(device: DeviceResult) -> Iterator[str]:
    """A lost device, unequal twins, unsteady bundles, items without an answer or with a cut context."""
    if device.lost:
        yield f"lost in the middle, what follows is partial: {device.lost}"
    yield from device.warnings
    yield from (str(pair["fault"]) for pair in device.pairs if pair.get("fault"))
    yield from (f"{row.label}: {text}" for row in device.rows for text in row.warnings)
    for record in device.scores:
        which = f"{record['label']}: {record['task']}"
        if record["answered"] < record["drawn"]:
            yield f"{which}: {record['answered']} of {plural(record['drawn'], 'item')} answered"
        if record.get("reason") and record["answered"]:
            yield f"{which}: {record['reason']}"
        if record["truncated"]:
            cut = plural(record["truncated"], "item")
            yield f"{which}: {cut} longer than the context, cut on the left, here as there"
