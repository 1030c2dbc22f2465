"""The before/after table: what a build is about.

Rows are precisions (torch fp32, onnx fp32, int8, int4), and in a comparison of runs they are grouped by
run. Columns come in groups, one group a metric: perplexity and each task with one column per arm and one
for the paired difference, then what it costs on the device (size, decode speed, time to first token). Of
more than two arms it shows the baseline and the one that the verdict is about; every_arm.py has the others.

A `Table` holds raw values in base units (shares, bytes, milliseconds); `Metric.scale` turns them into what is
shown. Left out on purpose: means over tasks, which hide which task moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgedisp.report.footnotes import at_chance, cut_short, missing, unlike
from edgedisp.report.reading import (
    BASELINE,
    DISPERSED,
    Summary,
    arms,
    at,
    branch,
    compared,
    focus,
    is_loss,
    label,
    number,
    precisions,
    run_title,
    tasks,
    whole,
)
from edgedisp.report.wording import MISSING, decimals_for, figure, fixed, megabytes, signed

DIFFERENCE = "difference"


@dataclass(frozen=True)
class Cell:
    """One figure. `low`, `high`: its 95 % interval; `n`, `documents`: what it was measured on.

    With several seeds: `item_low`, `item_high` are the interval without their spread, `by_seed` each one's.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    documents: int | None = None
    item_low: float | None = None
    item_high: float | None = None
    by_seed: tuple[float, ...] = ()

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width, None without an interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and 0 lies outside it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Metric:
    """A group of columns. `scale` multiplies raw values for display in `unit`."""

    key: str
    title: str
    unit: str = ""
    scale: float = 1.0
    higher_is_better: bool | None = None
    kind: str = "task"  # "loss", "task" or "cost"
    paired: bool = False  # whether a difference column is shown

    @property
    def heading(self) -> str:
        """Title, unit and the direction that is better: `heldout_cloze, % ↑`."""
        arrow = {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]
        return f"{self.title}{', ' + self.unit if self.unit else ''}{arrow}"

    @property
    def difference_unit(self) -> str:
        """Percent differ by points."""
        return "points" if self.unit == "%" else self.unit

    def better(self, cell: Cell) -> bool | None:
        """Whether a difference is a gain: None unless its interval excludes 0 and a direction is known."""
        if not cell.excludes_zero or cell.value is None or self.higher_is_better is None:
            return None
        return (cell.value > 0) == self.higher_is_better


@dataclass(frozen=True)
class Row:
    """One precision of one run.

    `cells[metric.key]` holds a cell for each arm, one for each arm's difference to the baseline
    (`difference_to(arm)`), and as `difference` that of the arm which the run's verdict is about.
    """

    run: str
    precision: str
    label: str
    cells: Mapping[str, Mapping[str, Cell]]

    def cell(self, metric: str, column: str) -> Cell:
        """The cell, empty where nothing was measured."""
        return self.cells.get(metric, {}).get(column, Cell())


@dataclass(frozen=True)
class Table:
    """The whole table. `runs` keeps the order asked for; `notes` are footnotes.

    `compared`: the arms that the column `difference` sets against the baseline, one for each run.
    """

    arms: tuple[str, ...]
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    runs: tuple[str, ...]
    notes: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()

    def columns(self, metric: Metric) -> tuple[str, ...]:
        """The columns of one group."""
        return (*self.arms, DIFFERENCE) if metric.paired else self.arms

    @property
    def minuend(self) -> str:
        """What the baseline is subtracted from: `dispersed`, or `dispersed or strong` over several runs."""
        return " or ".join(self.compared) or DISPERSED

    def as_json(self) -> dict[str, Any]:
        """JSON-able: the dataclasses as dicts."""
        return asdict(self)


COSTS = (
    Metric("size_bytes", "size", "MB", 1e-6, False, "cost"),
    Metric("decode_tokens_per_s", "decode", "tokens/s", 1.0, True, "cost"),
    Metric("ttft_ms", "first token", "ms", 1.0, False, "cost"),
)


def difference_to(arm: str) -> str:
    """The column of `Row.cells` with an arm's difference to the baseline; no arm can be called so."""
    return f"{DIFFERENCE}:{arm}"


def table(summary: Summary, every_arm: bool = False) -> Table:
    """The before/after table of one run; with `every_arm`, of all its arms."""
    return compare([summary], every_arm)


def compare(summaries: Sequence[Summary], every_arm: bool = False) -> Table:
    """The same table over several runs: rows grouped by run, columns the union, missing cells empty.

    Figures of runs that saw other text or another context are not comparable across runs; the notes say so.
    """
    titles = _distinct([run_title(summary) for summary in summaries])
    names = list(dict.fromkeys(arm for summary in summaries for arm in _shown(summary, every_arm)))
    names.sort(key=lambda arm: (arm != BASELINE, arm != DISPERSED))
    rows = [row for title, summary in zip(titles, summaries) for row in _rows(title, summary)]
    candidates = [*_task_metrics(summaries), *COSTS]
    metrics = tuple(metric for metric in candidates if _present(metric.key, rows))
    each = (
        note
        for summary in summaries
        for note in [*missing(summary), *at_chance(summary), *cut_short(summary)]
    )
    notes = [*unlike(summaries), *each]
    against = dict.fromkeys(arm for summary in summaries if (arm := focus(summary)))
    return Table(
        tuple(names), metrics, tuple(rows), tuple(titles), tuple(dict.fromkeys(notes)), tuple(against)
    )


def _shown(summary: Summary, every_arm: bool) -> list[str]:
    """One column each: all arms, or of more than two those that the verdict is about."""
    built, chosen = arms(summary), focus(summary)
    return built if every_arm or chosen is None else [BASELINE, chosen]


def _distinct(titles: Iterable[str]) -> list[str]:
    """The titles, a repeated one numbered."""
    seen: dict[str, int] = {}
    out = []
    for title in titles:
        seen[title] = seen.get(title, 0) + 1
        out.append(title if seen[title] == 1 else f"{title} ({seen[title]})")
    return out


def _present(key: str, rows: Sequence[Row]) -> bool:
    return any(cell.value is not None for row in rows for cell in row.cells.get(key, {}).values())


def _task_metrics(summaries: Sequence[Summary]) -> list[Metric]:
    """One metric a task, perplexities first; paired where any run compared it."""
    found: dict[str, Metric] = {}
    for summary in summaries:
        for task, result in tasks(summary).items():
            paired = focus(summary) is not None or (task in found and found[task].paired)
            found[task] = task_metric(task, result, paired)
    return sorted(found.values(), key=lambda metric: metric.kind != "loss")


def task_metric(task: str, result: Mapping[str, Any], paired: bool = True) -> Metric:
    """How a task's figures are shown: a share as percent, a perplexity as it is."""
    direction = result.get("higher_is_better")
    if is_loss(result):
        title = "perplexity" if task in ("heldout_perplexity", "perplexity") else f"{task} perplexity"
        return Metric(task, title, "", 1.0, False if direction is None else bool(direction), "loss", paired)
    share = str(result.get("metric") or "").startswith(("acc", "exact_match", "f1"))
    better = direction if isinstance(direction, bool) else (True if share else None)
    return Metric(task, task, "%" if share else "", 100.0 if share else 1.0, better, "task", paired)


def _rows(title: str, summary: Summary) -> list[Row]:
    return [_row(title, summary, precision) for precision in precisions(summary)]


def _row(title: str, summary: Summary, precision: str) -> Row:
    cells: dict[str, dict[str, Cell]] = {}
    for arm in arms(summary):
        for task, result in branch(summary, "accuracy", arm, precision).items():
            cells.setdefault(task, {})[arm] = _cell(result, "value")
        size = number(at(summary, "bundles", arm, precision, "size_bytes"))
        cells.setdefault("size_bytes", {})[arm] = Cell(size)
        timing = latency_row(summary, arm, precision)
        for key in ("decode_tokens_per_s", "ttft_ms"):
            cells.setdefault(key, {})[arm] = Cell(number(timing.get(key)))
    chosen = focus(summary)
    for arm, by_precision in {**{arm: {} for arm in arms(summary)}, **compared(summary)}.items():
        if arm == BASELINE:
            continue
        for task in {**branch(by_precision.get(precision)), **cells}:
            paired = branch(by_precision, precision, task)
            # Of items that are not the same, plain differences say nothing.
            known = {} if at(summary, "apart") else cells.get(task, {})
            difference = _difference(paired, task, arm, known)
            if difference is not None:
                own = cells.setdefault(task, {})
                own[difference_to(arm)] = difference
                if arm == chosen:
                    own[DIFFERENCE] = difference
    return Row(title, precision, label(precision), cells)


def _difference(paired: Mapping[str, Any], task: str, arm: str, by_arm: Mapping[str, Cell]) -> Cell | None:
    """The paired difference, or the plain one without interval where no pairing was recorded."""
    if number(paired.get("difference")) is not None:
        return _cell(paired, "difference")
    if task in {metric.key for metric in COSTS}:
        return None
    before, after = by_arm.get(BASELINE, Cell()).value, by_arm.get(arm, Cell()).value
    return None if before is None or after is None else Cell(after - before)


def _cell(result: Any, key: str) -> Cell:
    return Cell(
        number(at(result, key)),
        number(at(result, "low")),
        number(at(result, "high")),
        whole(at(result, "n")),
        whole(at(result, "documents")),
        number(at(result, "seeds", "item_low")),
        number(at(result, "seeds", "item_high")),
        _numbers(at(result, "seeds", "values")),
    )


def _numbers(listed: Any) -> tuple[float, ...]:
    values = [number(value) for value in listed] if isinstance(listed, list | tuple) else []
    return tuple(value for value in values if value is not None)


def latency_row(summary: Summary, arm: str, precision: str) -> dict[str, Any]:
    """The timing of one bundle, empty when it was not timed."""
    rows = at(summary, "latency", "rows")
    for row in rows if isinstance(rows, list) else []:
        if at(row, "arm") == arm and at(row, "precision") == precision:
            return branch(row)
    return {}


def value_text(metric: Metric, value: float | None) -> str:
    """A score, size or rate in the metric's unit."""
    if value is None:
        return MISSING
    if metric.key == "size_bytes":
        return megabytes(value)
    shown = value * metric.scale
    return fixed(shown, 1) if metric.unit == "%" else figure(shown)


def interval_text(metric: Metric, cell: Cell) -> str:
    """`11.10, 12.80`; empty without an interval."""
    if cell.low is None or cell.high is None:
        return ""
    return f"{value_text(metric, cell.low)}, {value_text(metric, cell.high)}"


def difference_texts(metric: Metric, cell: Cell) -> tuple[str, str, str]:
    """A difference, its interval (`-0.05, +0.01`) and its half-width, with equally many decimals."""
    half = cell.half_width
    decimals = decimals_for(None if half is None else half * metric.scale, 1 if metric.unit == "%" else 3)
    value = None if cell.value is None else cell.value * metric.scale
    if cell.low is None or cell.high is None or half is None:
        return signed(value, decimals), "", ""
    ends = f"{signed(cell.low * metric.scale, decimals)}, {signed(cell.high * metric.scale, decimals)}"
    return signed(value, decimals), ends, fixed(half * metric.scale, decimals)
