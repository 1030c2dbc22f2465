"""What devices scored, held against this machine: one table, a row for each device, bundle and task.

A result's `scores` are records of `evaluate/device_sample.py`. A difference is called one by the rule of
every comparison here: the interval leaves 0 out and the test agrees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgedisp.report.comparisons import LEVEL
from edgedisp.report.reading import at, branch, number
from edgedisp.report.section import Grid, Section
from edgedisp.report.wording import (
    MISSING,
    count,
    decimals_for,
    figure,
    fixed,
    p_value,
    percent,
    plural,
    signed,
    small,
)

HEAD = (
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
MEANING = (
    "The same bundle and the same token ids, on the device and here. Items are drawn at random; brackets are "
    "95 % intervals. device - here: paired by item (perplexities: nats per token); answered alike: the same "
    "choice or, where there is none, both right or both wrong; nats apart: log-likelihoods, by item. all "
    "here: the whole set that they were drawn from, on this machine."
)


def section(devices: Sequence[Mapping[str, Any]]) -> Section | None:
    """The table; None where nothing was scored."""
    several = len(devices) > 1
    rows = [
        ((str(device["device"]),) if several else ()) + _texts(branch(record))
        for device in devices
        for record in device.get("scores") or ()
    ]
    if not rows:
        return None
    head = ("device", *HEAD) if several else HEAD
    grid = Grid(head, tuple(rows), text_columns=(0, 1, 2) if several else (0, 1))
    return Section("scores", "Scored on the device", MEANING, grids=(grid,))


def warnings(device: Mapping[str, Any]) -> list[str]:
    """What to beware of: items that were not answered, or lost the beginning of their context."""
    said = []
    for record in device.get("scores") or ():
        which = f"{record['label']}: {record['task']}"
        if record["answered"] < record["drawn"]:
            said.append(f"{which}: {record['answered']} of {plural(record['drawn'], 'item')} answered")
        if record.get("reason") and record["answered"]:
            said.append(f"{which}: {record['reason']}")
        if record["truncated"]:
            cut = plural(record["truncated"], "item")
            said.append(f"{which}: {cut} longer than the context, cut on the left, here as there")
    return said


def _texts(record: dict[str, Any]) -> tuple[str, ...]:
    shares = number(at(record, "full", "high")) is not None and _is_share(record)
    return (
        str(record["label"]),
        _named(str(record["task"]), str(record["metric"])),
        f"{count(number(record['answered']))} of {count(number(record['of']))}",
        _with_ends(branch(record, "device"), shares),
        _value(number(at(record, "here", "value")), shares),
        _difference(record, shares),
        verdict(record),
        _share(branch(record, "agreement")),
        _apart(branch(record, "logprob")),
        _value(number(at(record, "full", "value")), shares),
    )


def _named(task: str, metric: str) -> str:
    """The task, with its metric where the name does not tell it."""
    return task if metric in task else f"{task}, {metric}"


def _apart(found: Mapping[str, Any]) -> str:
    """`0.645 (2.53)`."""
    mean, most = (number(found.get(key)) for key in ("mean", "max"))
    return MISSING if mean is None else f"{small(mean)} ({small(most)})"


def verdict(record: Mapping[str, Any]) -> str:
    """`no measurable difference`, `better`, `worse`; an en dash where nothing was answered."""
    found = branch(record, "difference")
    low, high, p = (number(found.get(key)) for key in ("low", "high", "p_value"))
    if not found:
        return MISSING
    if found.get("identical"):
        return "the same"
    if low is None or high is None or p is None:
        return "cannot tell"
    if low <= 0 <= high or p >= LEVEL:
        return "no measurable difference"
    better = (low > 0) == bool(record["higher_is_better"])
    return f"{'better' if better else 'worse'} on the device (p = {p_value(p)})"


def _is_share(record: Mapping[str, Any]) -> bool:
    return bool(record["higher_is_better"]) and 0 <= record["full"]["value"] <= 1


def _value(value: float | None, share: bool) -> str:
    return percent(value) if share else figure(value)


def _with_ends(ends: Mapping[str, Any], share: bool) -> str:
    """`42.0 % [38.1 %, 46.0 %]`."""
    value = _value(number(ends.get("value")), share)
    between = _range(ends, share)
    return value if between == MISSING else f"{value} {between}"


def _range(ends: Mapping[str, Any], share: bool) -> str:
    low, high = number(ends.get("low")), number(ends.get("high"))
    return MISSING if low is None or high is None else f"[{_value(low, share)}, {_value(high, share)}]"


def _share(found: Mapping[str, Any]) -> str:
    """`98.5 % [95.7 %, 99.5 %]`."""
    return _with_ends({**found, "value": found["share"]}, share=True) if found else MISSING


def _difference(record: Mapping[str, Any], share: bool) -> str:
    """In points for shares, in nats for perplexities, else in the metric's own unit."""
    found = branch(record, "difference")
    nats = branch(found, "nats")
    ends = {**nats, "difference": nats["value"]} if nats else found
    value, low, high = (number(ends.get(key)) for key in ("difference", "low", "high"))
    if value is None:
        return MISSING
    scale = 100.0 if share else 1.0
    if low is None or high is None:
        return signed(scale * value, 2)
    decimals = min(4, decimals_for(scale * (high - low) / 2, 4))
    shown = ", ".join(fixed(scale * end, decimals) for end in (low, high))
    return f"{signed(scale * value, decimals)} [{shown}]"
