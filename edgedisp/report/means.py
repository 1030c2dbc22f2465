"""The mean over tasks: what published tables show, with its interval and with what it leaves out."""

from __future__ import annotations

from edgedisp.report.comparisons import detectable
from edgedisp.report.reading import BASELINE, Summary, arms, at, branch, label, number, precisions
from edgedisp.report.section import Grid
from edgedisp.report.wording import MISSING, decimals_for, fixed, signed


def mean_grid(summary: Summary) -> Grid:
    """A row for each arm and precision; empty where fewer than two tasks can be averaged."""
    rows = []
    left_out: dict[str, None] = {}
    for arm in arms(summary):
        for precision in precisions(summary):
            found = branch(summary, "means", arm, precision)
            ends = [number(found.get(key)) for key in ("difference", "low", "high")]
            if arm == BASELINE or None in ends:
                continue
            difference, low, high = (100 * value for value in ends if value is not None)
            half = (high - low) / 2
            decimals = decimals_for(half, 1)
            scores = [fixed(_percent(found.get(key)), 1) for key in ("baseline", "arm")]
            texts = signed(difference, decimals), f"{signed(low, decimals)}, {signed(high, decimals)}"
            tasks = at(found, "tasks")
            counted = str(len(tasks)) if isinstance(tasks, list) else MISSING
            rows.append((f"{arm}, {label(precision)}", counted, *scores, *texts, fixed(detectable(half), 1)))
            left_out |= dict.fromkeys(f"{task} ({why})" for task, why in branch(found, "left_out").items())
    without = f"; without {', '.join(left_out)} where it is so" if left_out else ""
    caption = f"Mean over the tasks that count right answers, each task once{without}"
    head = ("mean of tasks", "tasks", "baseline, %", "arm, %", "difference, points", "95 % interval")
    return Grid((*head, "could be seen, points"), tuple(rows), caption)


def _percent(value: object) -> float | None:
    found = number(value)
    return None if found is None else 100 * found
