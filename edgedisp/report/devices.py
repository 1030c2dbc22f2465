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
from edgedisp.report.sections import by_model, models


def cost_section(run: Run) -> Section:
    """What each bundle takes on this machine, and quality against cost."""
    latency, rows = run.latency or DeviceResult("local"), []
    for name, arm, precision in models(run):
        if bundle := run.bundles.get(arm, {}).get(precision):
            rows.append((name, {"bundle": bundle, "timing": latency.timing(f"{arm}/{precision}")}))
    sizes = [bundle.size_bytes for _, bundle in by_model(run, run.bundles)]
    return section("cost", [grid("cost", rows, bars=sizes)], plots=("tradeoff",))


def latency_section(run: Run) -> Section:
    """Every bundle's timing on this machine, and the measurement's own noise."""
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
    return section("latency", [grid("timings", rows)], notes=remarks if rows else [])


def devices_section(devices: Sequence[DeviceResult], outdated: Sequence[str] = ()) -> Section:
    """One table of timings and one of scores over all devices, their sweeps, and their facts in a line each.
    outdated: measurements that are not shown."""
    timings, scores = _timing_grid(devices), _scores_grid(devices)
    about = [
        (_name(device), ", ".join(f"{name} {text}" for name, text in _facts(device)) or MISSING)
        for device in devices
    ]
    remarks = [f"{_name(device)}: {note}" for device in devices for note in notes("device", device)]
    if outdated:
        number, names = fmt.plural(len(outdated), "measurement"), "; ".join(outdated)
        remarks.append(f"Not shown, as the bundles were made anew since: {number} ({names}).")
    lead = " ".join([TERMS["timing"], *([TERMS["device_scores"]] if scores.rows else [])])
    sweeps = [sweep for device in devices for sweep in _sweep_grids(device)]
    return section("devices", [timings, scores, *sweeps], lead, facts=about, notes=remarks)


def devices_text(devices: Sequence[DeviceResult], width: int = 80) -> str:
    """The tables and notes for a terminal."""
    part = devices_section(devices)
    blocks = [grid_text(table, width) for table in part.grids]
    blocks.append("\n".join(f"note: {note}" for note in part.notes))
    return "\n\n".join(filter(None, blocks)) or "No figures."


def _prefix(device: DeviceResult, devices: Sequence[DeviceResult]) -> str:
    return f"{_name(device)}, " if len(devices) > 1 else ""


def _timing_grid(devices: Sequence[DeviceResult]) -> Grid:
    """Of several devices, the rows of one bundle below one another."""
    rows = [
        (f"{_prefix(device, devices)}{row.label}{' (partial)' * bool(row.partial or device.lost)}", row)
        for device in devices
        for row in device.rows
    ]
    labels = list(dict.fromkeys(row.label for _, row in rows))
    return grid("timings", sorted(rows, key=lambda entry: labels.index(entry[1].label)), "All timings")


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
    scale, unit = (100.0, " %") if record["is_share"] else (1.0, "")
    scores = [
        format_estimate(from_json(Estimate, record[side]), scale) + unit if record[side] else MISSING
        for side in ("device", "here")
    ]
    difference, alike, apart = record["difference"], record["agreement"], record["logprob"]
    change = None
    if difference:
        change = comparison_of("", "", str(record["task"]), from_json(Difference, difference)).estimate
    share = Estimate(alike["share"], alike["low"], alike["high"]) if alike else None
    return {
        "items": f"{fmt.count(record['answered'])} of {fmt.count(record['drawn'])}",
        "on the device": scores[0],
        "here": scores[1],
        "device - here": format_estimate(change, scale, signs=True) if change else MISSING,
        "p": fmt.p_value(change.p) if change else MISSING,
        "answered alike": format_estimate(share, 100) + " %" if share else MISSING,
        "nats apart (most)": f"{fmt.small(apart['mean'])} ({fmt.small(apart['max'])})" if apart else MISSING,
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
