"""How often intervals contain the truth, and how often the verdict claims what is not there: by simulation.

    python benchmarks/statistics_coverage.py [--repetitions 2000]

Every row draws items from a known truth, many times, and asks `edgedisp.evaluate` for a 95 % interval. Losses
are clustered by document and correlated between the models: a document's difficulty has a standard deviation
of 0.5 nats per token, the arms' difference one of 0.02. Accuracies differ on a share of the items, either way
alike. The verdict is that of a build without any difference. Writes results/statistics_coverage.json
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from _results_file import write
from scipy import stats

from edgedisp.core.results import Estimate, TaskDifference, TaskScore
from edgedisp.core.run import Run
from edgedisp.evaluate.comparison import TaskResult, compare_task, loss_survival, mean_difference, task_result
from edgedisp.evaluate.statistics import ACCURACY, PERPLEXITY, Metric, Resampling, difference
from edgedisp.report.verdict import verdict

BOOTSTRAP = 500
DIFFICULTY, SPREAD, TRUTH = 0.5, 0.02, 0.004
LOSS = Metric("loss", "nll", "tokens")
Rng = np.random.Generator
Items = list[dict[str, Any]]
Outcome = dict[str, Any]  # of one repetition


def losses(rng: Rng, documents: int, models: list[float], per_document: int = 1) -> list[Items]:
    """The same items under several models, whose true losses are 3 + each value, in nats per token."""
    hard = rng.normal(3, DIFFICULTY, documents)
    tokens = rng.integers(60, 256, (documents, per_document))
    models_items: list[Items] = []
    for shift in models:
        by_document = rng.normal(shift, SPREAD / np.sqrt(2), (documents, 1))
        nll = (hard[:, None] + by_document + rng.normal(0, SPREAD / 4, tokens.shape)) * tokens
        items = np.ndindex(tokens.shape)
        models_items.append([
            {"id": f"{d}.{k}", "document": d, "nll": float(nll[d, k]), "tokens": int(tokens[d, k])}
            for d, k in items
        ])  # fmt: skip
    return models_items


def answers(rng: Rng, items: int, differing: float) -> tuple[Items, Items]:
    """Right and wrong answers of two models alike but for a share of the items, where either may be right."""
    first = rng.random(items) < 0.6
    changed = rng.random(items) < differing
    second = np.where(changed, ~first, first)
    flip = rng.random(items) < 0.5  # which of the two is the one that changed

    def items_of(right: np.ndarray) -> Items:
        return [{"id": k, "document": k, "accuracy": int(x)} for k, x in enumerate(right)]

    return items_of(np.where(flip, second, first)), items_of(np.where(flip, first, second))


def task_items(items: Items, task: str, metric: Metric) -> TaskResult:
    rows = [{**item, "asked": str(item["id"])} for item in items]
    return task_result(TaskScore(task, {}), rows, [metric], Resampling(2))


def resampling(rng: Rng) -> Resampling:
    return Resampling(BOOTSTRAP, int(rng.integers(2**31)))


def coverage(estimate: Estimate, truth: float) -> Outcome:
    """Whether an interval contains the truth, and how wide it is."""
    if estimate.low is None or estimate.high is None:
        raise ValueError("no interval")
    return {"holds": estimate.low <= truth <= estimate.high, "width": estimate.high - estimate.low}


def of_losses(rng: Rng, documents: int, per_document: int = 1) -> Outcome:
    first, second = losses(rng, documents, [0.0, TRUTH], per_document)
    return coverage(difference([(first, second)], LOSS, resampling(rng)).estimate, TRUTH)


def of_accuracies(rng: Rng, items: int, differing: float) -> Outcome:
    pair = answers(rng, items, differing)
    estimate = difference([pair], ACCURACY, resampling(rng)).estimate
    return {**coverage(estimate, 0), "rejects": (estimate.p or 0) <= 0.05}


def of_means(rng: Rng, tasks: int, items: int) -> Outcome:
    pairs = {str(k): answers(rng, items, 0.1) for k in range(tasks)}
    before, after = (
        {task: task_items(pair[side], task, ACCURACY) for task, pair in pairs.items()} for side in (0, 1)
    )
    compared = {task: compare_task([(before[task], after[task])], resampling(rng)) for task in pairs}
    scores = [{task: result.score for task, result in side.items()} for side in (before, after)]
    mean = mean_difference(*scores, compared)
    if mean is None:
        raise ValueError("no mean")
    return coverage(mean.estimate, 0)


def of_seeds(rng: Rng, documents: int, seeds: int, luck: float) -> Outcome:
    """`luck`: the standard deviation between trainings, in nats per token."""
    shifts = [0.0, *(TRUTH + rng.normal(0, luck) for _ in range(seeds))]
    first, *seeds_losses = losses(rng, documents, shifts)
    pairs = [(first, second) for second in seeds_losses]
    return coverage(difference(pairs, LOSS, resampling(rng)).estimate, TRUTH)


def of_survival(rng: Rng, documents: int) -> Outcome:
    """The difference in differences: quantization takes a quarter of the arm's gain."""
    models = losses(rng, documents, [0.0, -0.02, 0.1, 0.085])
    results = [[task_items(items, "heldout_perplexity", PERPLEXITY)] for items in models]
    return coverage(loss_survival(results, resampling(rng)).change, 0.005)


def of_verdicts(rng: Rng, documents: int) -> Outcome:
    """A build whose arms do not differ: held-out loss and two accuracies at three precisions."""
    compared: dict[str, dict[str, TaskDifference]] = {}
    for precision in ("torch", "int8", "int4"):
        draws = resampling(rng)
        first, second = losses(rng, documents, [0.0, 0.0])
        tasks = {"heldout_perplexity": difference([(first, second)], PERPLEXITY, draws)}
        for task in ("heldout_cloze", "heldout_continuation"):
            tasks[task] = difference([answers(rng, documents, 0.06)], ACCURACY, draws)
        compared[precision] = {t: TaskDifference(t, {row.metric: row}) for t, row in tasks.items()}
    run = Run("simulated", ["baseline", "dispersed"], [*compared], comparisons={"dispersed": compared})
    return {"claims": verdict(run).label in ("helps", "hurts", "better", "worse")}


ROWS: dict[str, tuple[Any, ...]] = {  # name: (simulation, its arguments)
    "loss, 20 documents": (of_losses, 20),
    "loss, 60 documents": (of_losses, 60),
    "loss, 200 documents": (of_losses, 200),
    "loss, 40 documents of 3 windows": (of_losses, 40, 3),
    "accuracy, 100 items, 10 % differ": (of_accuracies, 100, 0.1),
    "accuracy, 500 items, 6 % differ": (of_accuracies, 500, 0.06),
    "accuracy, 2000 items, 6 % differ": (of_accuracies, 2000, 0.06),
    "mean of 6 tasks of 200 items": (of_means, 6, 200),
    "loss, 100 documents, 3 seeds without luck": (of_seeds, 100, 3, 0.0),
    "loss, 100 documents, 3 seeds, luck 0.004": (of_seeds, 100, 3, 0.004),
    "survival of quantization, 100 documents": (of_survival, 100),
    "verdict without a difference, 24 documents": (of_verdicts, 24),
    "verdict without a difference, 100 documents": (of_verdicts, 100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--only", nargs="*", help="rows; nothing is recorded")
    options = parser.parse_args()
    rows, figures = [], {}
    for number, (name, (simulate, *arguments)) in enumerate(ROWS.items()):
        if options.only is not None and name not in options.only:
            continue
        rng = np.random.default_rng([1, number])
        outcomes = [simulate(rng, *arguments) for _ in range(options.repetitions)]
        row: dict[str, Any] = {"name": name, "repetitions": options.repetitions}
        for key in [key for key in ("holds", "rejects", "claims") if key in outcomes[0]]:
            count = sum(outcome[key] for outcome in outcomes)
            interval = stats.binomtest(count, len(outcomes)).proportion_ci(method="wilson")
            row |= {key: count / len(outcomes), f"{key}_low": interval.low, f"{key}_high": interval.high}
            figures[f"{key}: {name}"] = row[key]
            print(f"{name:46} {key} {100 * row[key]:.1f} %")
        if "width" in outcomes[0]:
            row["mean_width"] = float(np.mean([outcome["width"] for outcome in outcomes]))
        rows.append(row)
    if options.only is None:
        write("statistics_coverage", figures, rows)


if __name__ == "__main__":
    main()
