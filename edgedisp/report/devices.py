"""Measurements on devices as tables: for a terminal, for a page, and as sections of a report."""

from __future__ import annotations

from collections.abc import Sequence

from edgedisp.core.files import from_json
from edgedisp.core.results import DeviceResult, Difference, Estimate, Json
from edgedisp.core.run import Run
from edgedisp.report import formatting as fmt
from edgedisp.report.comparisons import comparison_of
from edgedisp.report.formatting import MISSING, format_estimate
from edgedisp.report.layout import TERMS, Grid, Section, facts, grid, grid_text, notes, section
from edgedisp.report.sections import models

# The report of a run


def latency_section(run: Run) -> Section:
    """Every bundle's timing on this machine, the measurement's own noise, and quality against cost."""
    result = run.latency or DeviceResult("local")
    timings = [(name, result.timing(f"{arm}/{precision}"), precision) for name, arm, precision in models(run)]
    rows = [(name, timing) for name, timing, _ in timings if timing]
    speeds: dict[str, list[float]] = {}
    for _, timing, precision in timings:
        if timing and timing.decode_tokens_per_s and timing.decode_tokens_per_s.value:
            speeds.setdefault(precision, []).append(timing.decode_tokens_per_s.value)
    gaps = [max(values) / min(values) - 1 for values in speeds.values() if len(values) > 1]
    remarks = [TERMS["speed_gap"].format(fmt.percent(max(gaps)))] if gaps else []
    remarks += ["Timed: the first seed of each arm."] if len(run.seeds) > 1 else []
    remarks += [*notes("device", result), TERMS["timing"]]
    return section("latency", [grid("timings", rows)], plots=("tradeoff",), notes=remarks if rows else [])


def on_devices_section(run: Run) -> Section:
    """What devices measured after the build: one table over all of them, their facts in a line each."""
    timings, scores = _timing_grid(run.devices), _scores_grid(run.devices)
    about = [
        (_name(device), ", ".join(f"{name} {text}" for name, text in _facts(device)) or MISSING)
        for device in run.devices
    ]
    remarks = [f"{_name(device)}: {note}" for device in run.devices for note in notes("device", device)]
    if run.devices_outdated:
        number = fmt.plural(len(run.devices_outdated), "measurement")
        names = "; ".join(run.devices_outdated)
        remarks.append(f"Not shown, as the bundles were made anew since: {number} ({names}).")
    remarks += [TERMS["timing"]] if timings.rows and not run.latency else []
    remarks += [TERMS["device_scores"]] if scores.rows else []
    sweeps = [sweep for device in run.devices for sweep in _sweep_grids(device)]
    return section("devices", [timings, scores, *sweeps], facts=about, notes=remarks)


# One measurement


def device_sections(devices: Sequence[DeviceResult]) -> list[Section]:
    """Speeds side by side, every figure, scores, then each device by itself."""
    tables = [
        section("side", [_side_by_side(devices)] if sum(bool(device.rows) for device in devices) > 1 else []),
        section("figures", [_timing_grid(devices)], TERMS["timing"]),
        section("device_scores", [_scores_grid(devices)], TERMS["device_scores"]),
    ]
    singles = [
        Section(
            f"device{number}",
            _name(device),
            tuple(_sweep_grids(device)),
            facts=tuple(_facts(device)),
            notes=tuple(notes("device", device)),
        )
        for number, device in enumerate(devices)
    ]
    return [*(table for table in tables if not table.is_empty), *singles]


def devices_text(devices: Sequence[DeviceResult], width: int = 80) -> str:
    """The same for a terminal: the tables, and each device's warnings."""
    blocks = []
    for part in device_sections(devices):
        blocks += [grid_text(table, width) for table in part.grids]
        if part.notes:
            blocks.append("\n".join(f"note: {part.title}: {note}" for note in part.notes))
    return "\n\n".join(blocks) or "No figures."


def _side_by_side(devices: Sequence[DeviceResult]) -> Grid:
    """Bundles down, devices across."""
    rows: dict[str, dict[str, str]] = {}
    for device in devices:
        for row in device.rows:
            texts = rows.setdefault(row.label, {})
            texts.setdefault(_name(device), format_estimate(row.decode_tokens_per_s))
    return grid("speeds", rows.items())


def _prefix(device: DeviceResult, devices: Sequence[DeviceResult]) -> str:
    return f"{_name(device)}, " if len(devices) > 1 else ""


def _timing_grid(devices: Sequence[DeviceResult]) -> Grid:
    rows = [
        (f"{_prefix(device, devices)}{row.label}{' (partial)' * bool(row.partial or device.lost)}", row)
        for device in devices
        for row in device.rows
    ]
    return grid("timings", rows, "All timings")


def _sweep_grids(device: DeviceResult) -> list[Grid]:
    grids = []
    for bundle, timings in device.sweeps.items():
        best = max(timings, key=lambda row: (row.decode_tokens_per_s or Estimate(0.0)).value or 0.0)
        rows = [(f"{row.threads}{' (best)' * (row is best)}", row) for row in timings]
        grids.append(grid("threads", rows, f"{_name(device)}, {bundle}: threads"))
    return grids


# Scores


def _scores_grid(devices: Sequence[DeviceResult]) -> Grid:
    rows = []
    for device in devices:
        for record in device.scores:
            task, metric = str(record["task"]), str(record["metric"])
            name = task if metric in task else f"{task}, {metric}"
            rows.append((f"{_prefix(device, devices)}{record['label']}: {name}", _score_texts(record)))
    return grid("device_scores", rows)


def _score_texts(record: Json) -> dict[str, str]:
    """Shares are shown as percent, their differences as points."""
    is_share = record["higher_is_better"] and 0 <= record["full"]["value"] <= 1
    scale = 100.0 if is_share else 1.0

    def score(part: str) -> str:
        if not record.get(part):
            return MISSING
        return format_estimate(from_json(Estimate, record[part]), scale) + " %" * is_share

    difference, verdict = MISSING, MISSING
    alike, apart = record.get("agreement"), record.get("logprob")
    if record.get("difference"):
        row = comparison_of("", "", str(record["task"]), from_json(Difference, record["difference"]))
        difference = format_estimate(row.estimate, scale, signs=True)
        if not row.estimate.has_interval:
            verdict = "cannot tell"
        elif row.value == 0 and (alike or {}).get("share") == 1:
            verdict = "the same"
        elif row.is_clear:
            verdict = f"{row.direction} on the device (p = {fmt.p_value(row.p)})"
        else:
            verdict = "no measurable difference"
    agreement = format_estimate(Estimate(alike["share"], alike["low"], alike["high"]), 100) if alike else ""
    return {
        "items": f"{fmt.count(record['answered'])} of {fmt.count(record['of'])}",
        "on the device": score("device"),
        "here, same items": score("here"),
        "device - here": difference,
        "verdict": verdict,
        "answered alike": f"{agreement} %" if alike else MISSING,
        "nats apart (most)": f"{fmt.small(apart['mean'])} ({fmt.small(apart['max'])})" if apart else MISSING,
        "all here": score("full"),
    }


def _name(device: DeviceResult) -> str:
    """As the user named it, with the model of a phone."""
    model = (device.machine.get("phone") or {}).get("model")
    return f"{device.device} ({model})" if model else device.device


def _facts(device: DeviceResult) -> list[tuple[str, str]]:
    machine, state = device.machine, device.machine.get("state") or {}

    def over(key: str, unit: str = "") -> str:
        """What a phone said before and after."""
        moments = [state.get(moment) or {} for moment in ("before", "after")]
        values = [f"{moment[key]}{unit}" for moment in moments if moment.get(key) is not None]
        return " → ".join(dict.fromkeys(values))

    minutes = [time[:16].replace("T", " ") for time in (*device.measured[:1], *device.measured[-1:])]
    row = {"device": device, "machine": machine, "phone": machine.get("phone") or {}, "over": over}
    return facts("device", {**row, "load": device.load_average, "minutes": minutes})
