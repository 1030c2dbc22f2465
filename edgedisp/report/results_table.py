"""The before/after table: precisions down, one group of columns a metric across.

A group has one column a model and one for the paired difference of the main arm; the last groups are costs.
The table holds raw values (shares, bytes, milliseconds); `Metric.scale` turns them into what is shown.
"""

from __future__ import annotations

import itertools
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgedisp.core.progress import printable
from edgedisp.core.results import ANSWERS_TASK, BASE, BASELINE, Estimate, Score, TaskScore
from edgedisp.core.run import Run
from edgedisp.report.comparisons import NOT_CLEAR, comparisons, is_loss, is_share
from edgedisp.report.formatting import format_estimate, label, megabytes, significant
from edgedisp.report.layout import Grid, column_widths, escape_markdown, grid_markdown, grid_text, notes


@dataclass(frozen=True)
class Metric:
    """A group of columns. `scale` multiplies raw values for display in `unit`; kind: loss, task or cost."""

    key: str
    title: str
    unit: str = ""
    scale: float = 1.0
    higher_is_better: bool = False
    kind: str = "task"

    @property
    def heading(self) -> str:
        """`heldout_cloze, % ↑`."""
        return f"{self.title}{', ' + self.unit if self.unit else ''} {'↑' if self.higher_is_better else '↓'}"


SIZE = Metric("size_bytes", "size", "MB", 1e-6, False, "cost")
SPEED = Metric("decode_tokens_per_s", "decode", "tokens/s", 1.0, True, "cost")
COSTS = (SIZE, SPEED, Metric("ttft_ms", "first token", "ms", 1.0, False, "cost"))


@dataclass(frozen=True)
class Cell:
    """A figure of an arm, or of its difference, whose outcome is better, worse or not clear."""

    estimate: Estimate
    outcome: str = ""


@dataclass(frozen=True)
class Row:
    """One precision. cells: metric -> column, which is an arm or `difference(arm)`."""

    precision: str
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return label(self.precision)

    def cell(self, metric: Metric, column: str) -> Cell:
        return self.cells.get(metric.key, {}).get(column, Cell(Estimate(None)))

    def text(self, metric: Metric, column: str, short: bool = False) -> str:
        """What a column of a metric shows; a star marks a difference that counts."""
        cell = self.cell(metric, column)
        if metric.key == "size_bytes":
            return megabytes(cell.estimate.value)
        if metric.kind == "cost":
            return significant(cell.estimate.value, 3)
        text = format_estimate(cell.estimate, metric.scale, signs=bool(cell.outcome), short=short)
        return text + "*" * (cell.outcome not in ("", NOT_CLEAR))


@dataclass(frozen=True)
class Table:
    """The whole table; `arms` may begin with the base; `notes` are footnotes."""

    arms: tuple[str, ...]
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def columns(self, metric: Metric) -> list[str]:
        """The arms, then their differences as far as there are any."""
        columns = (*self.arms, *map(difference, self.arms))
        return [name for name in columns if any(name in row.cells.get(metric.key, {}) for row in self.rows)]

    @property
    def legend(self) -> list[str]:
        """What brackets and stars mean, then the footnotes."""
        text = "Brackets, ±: 95 % intervals. Differences: paired; *: better or worse by the verdict's rule."
        return [text, *self.notes]


def difference(arm: str) -> str:
    """The column of an arm's difference."""
    return f"{arm} - {BASELINE}"


def table(run: Run, all_arms: bool = False) -> Table:
    """The table of a run: the base, the baseline and the main arm, or all arms."""
    base = [BASE] if run.has_base else []
    arms = base + (run.arms if all_arms or run.main_arm is None else [BASELINE, run.main_arm])
    outcomes = {(row.arm, row.precision, row.task): row.outcome for row in comparisons(run)}
    scores: dict[str, list[TaskScore]] = {}
    rows = [Row(precision) for precision in run.precisions]
    for row, arm in itertools.product(rows, [*base, *run.arms]):
        for task, score in run.measured(arm, row.precision).scores.items():
            scores.setdefault(task, []).append(score)
            row.cells.setdefault(task, {})[arm] = Cell(score.main.estimate)
        for key, cost in _costs(run, arm, row.precision).items():
            row.cells.setdefault(key, {})[arm] = Cell(Estimate(cost))
        for task, compared in run.comparisons.get(arm, {}).get(row.precision, {}).items():
            cell = Cell(compared.main.estimate, outcomes.get((arm, row.precision, task), NOT_CLEAR))
            row.cells.setdefault(task, {})[difference(arm)] = cell
    metrics = [_metric(task, of_models[0].main) for task, of_models in scores.items()]
    metrics = sorted(metrics, key=lambda metric: (metric.key != ANSWERS_TASK, metric.kind != "loss"))
    whole = Table(tuple(arms), (*metrics, *COSTS), tuple(rows), tuple(notes("table", run, scores)))
    return replace(whole, metrics=tuple(metric for metric in whole.metrics if whole.columns(metric)))


def _metric(task: str, score: Score) -> Metric:
    """A share is shown as percent, a perplexity as it is."""
    if is_loss(score.metric):
        title = "perplexity" if task in ("heldout_perplexity", "perplexity") else f"{task} perplexity"
        return Metric(task, title, kind="loss")
    unit, scale = ("%", 100.0) if is_share(score.metric) else ("", 1.0)
    title = "exact answers" if task == ANSWERS_TASK else task
    return Metric(task, title, unit, scale, score.higher_is_better)


def _costs(run: Run, arm: str, precision: str) -> dict[str, float | None]:
    bundle = run.bundles.get(arm, {}).get(precision)
    timing = run.latency.timing(f"{arm}/{precision}") if run.latency else None
    speeds = {key: getattr(timing, key, None) for key in ("decode_tokens_per_s", "ttft_ms")}
    costs = {"size_bytes": bundle.size_bytes} if bundle else {}
    return costs | {key: speed.value for key, speed in speeds.items() if speed}


# Forms


def table_text(table: Table, width: int = 80) -> str:
    """The table for a terminal: one block a metric, the costs in one; `±` where intervals do not fit."""
    if not table.rows or not table.metrics:
        return "No figures."
    costs = [metric for metric in table.metrics if metric.kind == "cost"]
    blocks = [[metric] for metric in table.metrics if metric not in costs] + [costs]
    texts = []
    for metrics in filter(None, blocks):
        heading = "{metric.title}, {column}" if metrics == costs else "{column}"
        caption = "; ".join(metric.heading for metric in metrics)
        full, short = (_grid(table, metrics, heading, caption, short) for short in (False, True))
        texts.append(grid_text(full if sum(column_widths(full)) <= width else short, width))
    legend = [textwrap.fill(printable(note), width, subsequent_indent="  ") for note in table.legend]
    return "\n\n".join([*texts, "\n".join(legend)])


def table_markdown(table: Table) -> str:
    """One Markdown table and its notes."""
    grid = _grid(table, table.metrics, "{metric.heading}: {column}")
    return "\n\n".join([grid_markdown(grid), *map(escape_markdown, table.legend)]) + "\n"


def _grid(
    table: Table, metrics: Sequence[Metric], heading: str, caption: str = "", short: bool = False
) -> Grid:
    """Some metrics' columns."""
    columns = [(metric, column) for metric in metrics for column in table.columns(metric)]
    head = [heading.format(metric=metric, column=column) for metric, column in columns]
    rows = [(row.label, *(row.text(*column, short) for column in columns)) for row in table.rows]
    return Grid(("precision", *head), tuple(rows), caption)


# The last lines of a build that was scored by its answers


def answers_text(run: Run, width: int = 80) -> str:
    """Exact answers in percent of the base and every arm, a line for each bundle; empty without that task.
    Difference, size and speed are the main arm's: the others have the same graph."""
    whole, shipped = table(run, all_arms=True), run.main_arm or run.arms[-1]
    exact = next((metric for metric in whole.metrics if metric.key == ANSWERS_TASK), None)
    rows = [row for row in whole.rows if row.precision in run.bundles.get(shipped, {})]
    if exact is None or not rows:
        return ""
    names = [name for name in whole.columns(exact) if name in (*whole.arms, difference(shipped))]
    columns = [*((exact, name) for name in names), (SIZE, shipped), (SPEED, shipped)]
    texts = [(row.label, *(row.text(*column).rstrip("*") for column in columns)) for row in rows]
    return grid_text(Grid(("exact answers, %", *names, SIZE.unit, SPEED.unit), tuple(texts)), width)


def chat_command(run: Run, folder: Path) -> str:
    """The command that asks the main arm's smallest bundle a held-out prompt."""
    words = ["edgedisp", "chat", str(folder / (run.main_arm or run.arms[-1]) / run.precisions[-1])]
    return shlex.join([*words, *(["--prompt", run.prompt] if run.prompt else [])])
