"""The before/after table: precisions down, one group of columns a metric across.

A group has one column an arm and one for the paired difference of the main arm; the last groups are costs.
The table holds raw values (shares, bytes, milliseconds); `Metric.scale` turns them into what is shown.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgedisp.core.progress import printable
from edgedisp.core.results import BASELINE, DISPERSED, Estimate
from edgedisp.core.run import Run, arms_in_order
from edgedisp.report.comparisons import MEAN, NOT_CLEAR, comparisons, headline, is_loss, is_share
from edgedisp.report.formatting import MISSING, bits, format_estimate, label, megabytes, percent, plural
from edgedisp.report.layout import Grid, column_widths, escape_markdown, grid_markdown, grid_text, notes

DIFFERENCE = "difference"
COMPARABLE = {  # what must be the same in two runs whose figures are compared
    "base models": ("model", "weights_sha256"),
    "training texts (and so held-out texts)": ("corpus", "tokens_sha256"),
    "context lengths": ("corpus", "context"),
    "numbers of held-out documents": ("corpus", "heldout_documents"),
}


@dataclass(frozen=True)
class Metric:
    """A group of columns. `scale` multiplies raw values for display in `unit`; kind: loss, task or cost."""

    key: str
    title: str
    unit: str = ""
    scale: float = 1.0
    higher_is_better: bool = False
    kind: str = "task"
    is_paired: bool = False

    @property
    def heading(self) -> str:
        """`heldout_cloze, % ↑`."""
        return f"{self.title}{', ' + self.unit if self.unit else ''} {'↑' if self.higher_is_better else '↓'}"


COSTS = (
    Metric("size_bytes", "size", "MB", 1e-6, False, "cost"),
    Metric("decode_tokens_per_s", "decode", "tokens/s", 1.0, True, "cost"),
    Metric("ttft_ms", "first token", "ms", 1.0, False, "cost"),
)


@dataclass(frozen=True)
class Cell:
    """A difference from the baseline. outcome: better, worse or not clear."""

    estimate: Estimate
    outcome: str = NOT_CLEAR


@dataclass(frozen=True)
class Row:
    """One precision of one run. values, differences (arm - baseline): metric -> arm -> figure."""

    run: str
    precision: str
    label: str
    main_arm: str | None
    values: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Cell]]

    def value(self, metric: Metric, arm: str) -> Estimate | None:
        return self.values.get(metric.key, {}).get(arm)

    def difference(self, metric: Metric, arm: str | None = None) -> Cell | None:
        """The arm's difference; without `arm` the main arm's."""
        return self.differences.get(metric.key, {}).get(arm or self.main_arm or "")

    def texts(self, metric: Metric, columns: Sequence[str], style: str = "full") -> list[str]:
        """What the columns of a metric show: figures of arms, or the main arm's difference."""
        return [self._text(metric, column, style) for column in columns]

    def _text(self, metric: Metric, column: str, style: str) -> str:
        if column == DIFFERENCE:
            cell = self.difference(metric) or Cell(Estimate(None))
            star = "" if cell.outcome == NOT_CLEAR else "*"
            return format_estimate(cell.estimate, metric.scale, signs=True, style=style) + star
        value = self.value(metric, column)
        if metric.key == "size_bytes":
            return megabytes(None if value is None else value.value)
        return format_estimate(value, metric.scale, style=style)


@dataclass(frozen=True)
class Table:
    """The whole table. `runs` keeps their order; `notes` are footnotes."""

    arms: tuple[str, ...]
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    runs: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def columns(self, metric: Metric) -> tuple[str, ...]:
        return (*self.arms, DIFFERENCE) if metric.is_paired else self.arms

    @property
    def compared(self) -> str:
        """`dispersed`, or over several runs `dispersed or strong`."""
        return " or ".join(dict.fromkeys(row.main_arm for row in self.rows if row.main_arm)) or DISPERSED

    @property
    def legend(self) -> list[str]:
        """What brackets and stars mean, then the footnotes."""
        text = "[low, high]: 95 % interval."
        if any(row.difference(metric) for row in self.rows for metric in self.metrics):
            text += (
                f" Difference: {self.compared} - baseline, paired; *: better or worse by the verdict's rule."
            )
        return [text, *self.notes]


def table(run: Run, all_arms: bool = False) -> Table:
    """The table of one run: the baseline and the main arm, or all arms."""
    return compare([run], all_arms)


def compare(runs: Sequence[Run], all_arms: bool = False) -> Table:
    """The same table over several runs: rows grouped by run, columns the union, missing cells empty."""
    titles = numbered([run.title for run in runs])
    pairs = [run.arms if all_arms or run.main_arm is None else [BASELINE, run.main_arm] for run in runs]
    arms = arms_in_order(list(dict.fromkeys(arm for names in pairs for arm in names)))
    rows = [row for title, run in zip(titles, runs) for row in _rows(title, run)]
    present = {key for row in rows for key in row.values}
    metrics = [metric for metric in (*_task_metrics(runs), *COSTS) if metric.key in present]
    remarks = dict.fromkeys([*_incomparable(runs), *(note for run in runs for note in footnotes(run))])
    return Table(tuple(arms), tuple(metrics), tuple(rows), tuple(titles), tuple(remarks))


def numbered(names: Sequence[str]) -> list[str]:
    """The names, a repeated one numbered: `a`, `b`, `a (2)`."""
    repeats = [names[:index].count(name) for index, name in enumerate(names)]
    return [f"{name} ({times + 1})" if times else name for name, times in zip(names, repeats)]


def _task_metrics(runs: Sequence[Run]) -> list[Metric]:
    """Losses first. A share is shown as percent, a perplexity as it is."""
    compared = [arms for run in runs for arms in run.comparisons.values()]
    paired = {task for arms in compared for tasks in arms.values() for task in tasks}
    measured = [model for run in runs for arms in run.measurements.values() for model in arms.values()]
    metrics: dict[str, Metric] = {}
    for task, score in ((task, score.main) for model in measured for task, score in model.scores.items()):
        metric = Metric(task, task, higher_is_better=score.higher_is_better, is_paired=task in paired)
        if is_loss(score.metric):
            title = "perplexity" if task in ("heldout_perplexity", "perplexity") else f"{task} perplexity"
            metric = replace(metric, title=title, kind="loss")
        elif is_share(score.metric):
            metric = replace(metric, unit="%", scale=100.0)
        metrics[task] = metric
    return sorted(metrics.values(), key=lambda metric: metric.kind != "loss")


def _rows(title: str, run: Run) -> list[Row]:
    outcomes = {(row.arm, row.precision, row.task): row.outcome for row in comparisons(run)}
    rows = []
    for precision in run.precisions:
        differences: dict[str, dict[str, Cell]] = {}
        for arm in run.compared_arms:
            for task, difference in run.comparisons.get(arm, {}).get(precision, {}).items():
                outcome = outcomes.get((arm, precision, task), NOT_CLEAR)
                differences.setdefault(task, {})[arm] = Cell(difference.main.estimate, outcome)
        values = _values(run, precision)
        rows.append(Row(title, precision, label(precision), run.main_arm, values, differences))
    return rows


def _values(run: Run, precision: str) -> dict[str, dict[str, Estimate]]:
    """metric -> arm -> figure."""
    values: dict[str, dict[str, Estimate]] = {}
    for arm in run.arms:
        for task, score in run.measured(arm, precision).scores.items():
            values.setdefault(task, {})[arm] = score.main.estimate
        if (bundle := run.bundles.get(arm, {}).get(precision)) is not None:
            values.setdefault("size_bytes", {})[arm] = Estimate(bundle.size_bytes)
        timing = run.latency.timing(f"{arm}/{precision}") if run.latency else None
        for key in ("decode_tokens_per_s", "ttft_ms"):
            if timing is not None and (estimate := getattr(timing, key)) is not None:
                values.setdefault(key, {})[arm] = Estimate(estimate.value)
    return values


def _incomparable(runs: Sequence[Run]) -> list[str]:
    """What differs between runs so that their figures must not be compared with each other."""
    values = {
        what: {str(value) for run in runs if (value := getattr(run, part).get(key)) is not None}
        for what, (part, key) in COMPARABLE.items()
    }
    different = ", ".join(what for what, unique in values.items() if len(unique) > 1)
    text = f"The runs have different {different}: compare arms within a run, not across these runs."
    return [text] if different else []


def footnotes(run: Run) -> list[str]:
    """The baseline's name, tasks not scored or paired, tasks at chance, and items longer than the context."""
    at_chance: dict[str, list[str]] = {}
    truncated: dict[str, dict[str, int]] = {}
    for precision in run.precisions:
        scores = {arm: run.measured(arm, precision).scores for arm in run.arms}
        for task in dict.fromkeys(task for by_task in scores.values() for task in by_task):
            by_arm = {arm: by_task[task] for arm, by_task in scores.items() if task in by_task}
            counts = truncated.setdefault(task, {})
            for arm, score in by_arm.items():
                counts[arm] = max(score.truncated, counts.get(arm, 0))
            lows = [(score.chance, score.main.estimate.low) for score in by_arm.values()]
            if all(chance is not None and low is not None and low <= chance for chance, low in lows):
                what = f"{task} is at chance ({percent(lows[0][0], 0)})"
                at_chance.setdefault(what, []).append(label(precision))
    return notes("table", run, at_chance, truncated)


# Forms


def table_text(table: Table, width: int = 80) -> str:
    """The table for a terminal: one block a metric, the costs in one; intervals as far as they fit."""
    if not table.rows or not table.metrics:
        return "No figures."
    blocks = [[metric] for metric in table.metrics if metric.kind != "cost"]
    costs = [metric for metric in table.metrics if metric.kind == "cost"]
    names, texts = 2 if len(table.runs) > 1 else 1, []
    for metrics in [*blocks, *([costs] if costs else [])]:
        heading, caption = "{column}", metrics[0].heading
        if metrics == costs:
            heading, caption = "{metric.title}, {column}", "; ".join(f"{m.title}, {m.unit}" for m in costs)
        grids = [_grid(table, metrics, heading, caption, style) for style in ("full", "short", "bare")]
        fitting = (grid for grid in grids if sum(column_widths(grid)) <= width)
        texts.append(grid_text(next(fitting, grids[-1]), width, names))
    legend = [textwrap.fill(printable(note), width, subsequent_indent="  ") for note in table.legend]
    return "\n\n".join([*texts, "\n".join(legend)])


def table_markdown(table: Table) -> str:
    """One Markdown table and its notes."""
    grid = _grid(table, table.metrics, "{metric.heading}: {column}")
    return "\n\n".join([grid_markdown(grid), *map(escape_markdown, table.legend)]) + "\n"


def _grid(
    table: Table, metrics: Sequence[Metric], heading: str, caption: str = "", style: str = "full"
) -> Grid:
    """Some metrics' columns; with several runs the first column names the run."""
    columns = {metric: table.columns(metric) for metric in metrics}
    head = [heading.format(metric=metric, column=name) for metric in metrics for name in columns[metric]]
    several, rows = len(table.runs) > 1, []
    for row in table.rows:
        texts = [text for metric in metrics for text in row.texts(metric, columns[metric], style)]
        rows.append((*[row.run] * several, row.label, *texts))
    return Grid((*["run"] * several, "precision", *head), tuple(rows), caption)


# All arms


def has_more_arms(run: Run) -> bool:
    """Whether there is more to report than the before/after table holds."""
    return run.main_arm is not None and (len(run.arms) > 2 or len(run.seeds) > 1)


def arms_grid(run: Run, task: str, precisions: Sequence[str], style: str = "short") -> Grid:
    """Arms down, precisions across: each arm's difference from the baseline on one task."""
    rows = [row for row in comparisons(run) if row.task == task]
    texts = {(row.arm, row.precision): row.text(style) + "*" * (row.outcome != NOT_CLEAR) for row in rows}
    names = [name for name in precisions if any(row.precision == name for row in rows)]
    body = [(arm, *(texts.get((arm, name), MISSING) for name in names)) for arm in run.compared_arms]
    unit = next((f", {row.unit_text}" for row in rows if row.unit_text), "")
    caption = f"{task}{unit}: arm - baseline (*: better or worse by the verdict's rule)"
    return Grid(("arm", *map(label, names)), tuple(body), caption)


def arms_text(run: Run, width: int = 80) -> str:
    """For a terminal: each arm at the fewest and the most bits; empty where the table says it all."""
    rows = comparisons(run)
    first = headline(rows)
    if not has_more_arms(run) or first is None or first.task == MEAN:
        return ""
    names = sorted({row.precision for row in rows if row.task == first.task}, key=bits)
    grid = arms_grid(run, first.task, list(dict.fromkeys((names[0], names[-1]))))
    seeds = f", {plural(len(run.seeds), 'seed')}" if len(run.seeds) > 1 else ""
    return f"All arms against the baseline{seeds}\n" + grid_text(grid, width)
