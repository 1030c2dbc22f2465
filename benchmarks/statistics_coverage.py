"""How often intervals contain the truth, and how often the verdict claims what is not there: by simulation.

    python benchmarks/statistics_coverage.py [--repetitions 2000]

Every row draws items from a known truth, many times, and asks `edgedisp.evaluate` for a 95 % interval. Losses
are clustered by document and correlated between the models: a document's difficulty has a standard deviation
of 0.5 nats per token, the arms' difference one of 0.02. Accuracies differ on a share of the items, either way
alike. The verdict is that of a build without any difference. Writes results/statistics_coverage.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from _results_file import write
from scipy import stats

from edgedisp.core.results import Estimate, TaskDifference, TaskScore
from edgedisp.core.run import Run
from edgedisp.evaluate.comparison import TaskResult, compare_task, loss_survival, mean_difference, task_result
from edgedisp.evaluate.statistics import ACCURACY, PERPLEXITY, Metric, Resampling, difference
from edgedisp.report import verdict

BOOTSTRAP = 500
DIFFICULTY, SPREAD, TRUTH = 0.5, 0.02, 0.004
LOSS = Metric("loss", "nll", "tokens")
Rng = np.random.Generator
Items = list[dict[str, Any]]


def losses(rng: Rng, documents: int, models: list[float], per_document: int = 1) -> list[Items]:
    """The same items under several models, whose true losses are 3 + each value, in nats per token."""
    hard = rng.normal(3, DIFFICULTY, documents)
    tokens = rng.integers(60, 256, (documents, per_document))
    models_items: list[Items] = []
    for shift in models:
        own = rng.normal(shift, SPREAD / np.sqrt(2), (documents, 1))
        nll = (hard[:, None] + own + rng.normal(0, SPREAD / 4, tokens.shape)) * tokens
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
    a, b = np.where(flip, second, first), np.where(flip, first, second)
    return tuple([{"id": k, "document": k, "accuracy": int(x)} for k, x in enumerate(one)] for one in (a, b))  # type: ignore[return-value]


def a_result(items: Items, task: str, metric: Metric) -> TaskResult:
    asked = [{**item, "asked": str(item["id"])} for item in items]
    return task_result(TaskScore(task, {}), asked, [metric], Resampling(2))


def resampling(rng: Rng) -> Resampling:
    return Resampling(BOOTSTRAP, int(rng.integers(2**31)))


def held(found: Estimate, truth: float) -> dict[str, Any]:
    """Whether an interval holds the truth, and how wide it is."""
    if found.low is None or found.high is None:
        raise ValueError("no interval")
    return {"holds": found.low <= truth <= found.high, "width": found.high - found.low}


def of_losses(documents: int, per_document: int) -> Callable[[Rng], dict[str, Any]]:
    def draw(rng: Rng) -> dict[str, Any]:
        first, second = losses(rng, documents, [0.0, TRUTH], per_document)
        return held(difference([(first, second)], LOSS, resampling(rng)).estimate, TRUTH)

    return draw


def of_accuracies(items: int, differing: float) -> Callable[[Rng], dict[str, Any]]:
    def draw(rng: Rng) -> dict[str, Any]:
        pair = answers(rng, items, differing)
        found = difference([pair], ACCURACY, resampling(rng)).estimate
        return {**held(found, 0), "rejects": (found.p or 0) <= 0.05}

    return draw


def of_means(tasks: int, items: int) -> Callable[[Rng], dict[str, Any]]:
    def draw(rng: Rng) -> dict[str, Any]:
        pairs = {str(k): answers(rng, items, 0.1) for k in range(tasks)}
        before, after = (
            {task: a_result(pair[side], task, ACCURACY) for task, pair in pairs.items()} for side in (0, 1)
        )
        compared = {task: compare_task([(before[task], after[task])], resampling(rng)) for task in pairs}
        scores = [{task: one.score for task, one in side.items()} for side in (before, after)]
        found = mean_difference(*scores, compared)
        if found is None:
            raise ValueError("no mean")
        return held(found.estimate, 0)

    return draw


def of_seeds(documents: int, seeds: int, luck: float) -> Callable[[Rng], dict[str, Any]]:
    """`luck`: the standard deviation between trainings, in nats per token."""

    def draw(rng: Rng) -> dict[str, Any]:
        shifts = [0.0, *(TRUTH + rng.normal(0, luck) for _ in range(seeds))]
        first, *others = losses(rng, documents, shifts)
        pairs = [(first, other) for other in others]
        return held(difference(pairs, LOSS, resampling(rng)).estimate, TRUTH)

    return draw


def of_survival(documents: int) -> Callable[[Rng], dict[str, Any]]:
    """The difference in differences: quantization takes a quarter of the arm's gain."""

    def draw(rng: Rng) -> dict[str, Any]:
        four = losses(rng, documents, [0.0, -0.02, 0.1, 0.085])
        results = tuple(a_result(items, "heldout_perplexity", PERPLEXITY) for items in four)
        found = loss_survival([results], resampling(rng))  # type: ignore[list-item]
        return held(found.change, 0.005)

    return draw


def of_verdicts(documents: int) -> Callable[[Rng], dict[str, Any]]:
    """A build whose arms do not differ: held-out loss and two accuracies at three precisions."""

    def draw(rng: Rng) -> dict[str, Any]:
        compared: dict[str, dict[str, TaskDifference]] = {}
        for precision in ("torch", "int8", "int4"):
            draws = resampling(rng)
            first, second = losses(rng, documents, [0.0, 0.0])
            by_task = {"heldout_perplexity": difference([(first, second)], PERPLEXITY, draws)}
            for task in ("heldout_cloze", "heldout_continuation"):
                by_task[task] = difference([answers(rng, documents, 0.06)], ACCURACY, draws)
            compared[precision] = {t: TaskDifference(t, {one.metric: one}) for t, one in by_task.items()}
        run = Run("simulated", ["baseline", "dispersed"], [*compared], comparisons={"dispersed": compared})
        return {"claims": verdict(run).label in ("helps", "hurts", "better", "worse")}

    return draw


ROWS: dict[str, Callable[[Rng], dict[str, Any]]] = {
    "loss, 20 documents": of_losses(20, 1),
    "loss, 60 documents": of_losses(60, 1),
    "loss, 200 documents": of_losses(200, 1),
    "loss, 40 documents of 3 windows": of_losses(40, 3),
    "accuracy, 100 items, 10 % differ": of_accuracies(100, 0.1),
    "accuracy, 500 items, 6 % differ": of_accuracies(500, 0.06),
    "accuracy, 2000 items, 6 % differ": of_accuracies(2000, 0.06),
    "mean of 6 tasks of 200 items": of_means(6, 200),
    "loss, 100 documents, 3 seeds without luck": of_seeds(100, 3, 0.0),
    "loss, 100 documents, 3 seeds, luck 0.004": of_seeds(100, 3, 0.004),
    "survival of quantization, 100 documents": of_survival(100),
    "verdict without a difference, 24 documents": of_verdicts(24),
    "verdict without a difference, 100 documents": of_verdicts(100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--only", nargs="*", help="rows; nothing is recorded")
    options = parser.parse_args()
    rows, figures = [], {}
    for number, (name, draw) in enumerate(ROWS.items()):
        if options.only is not None and name not in options.only:
            continue
        rng = np.random.default_rng([1, number])
        drawn = [draw(rng) for _ in range(options.repetitions)]
        row: dict[str, Any] = {"name": name, "repetitions": options.repetitions}
        for key in [key for key in ("holds", "rejects", "claims") if key in drawn[0]]:
            hits = sum(one[key] for one in drawn)
            interval = stats.binomtest(hits, len(drawn)).proportion_ci(method="wilson")
            row |= {key: hits / len(drawn), f"{key}_low": interval.low, f"{key}_high": interval.high}
            figures[f"{key}: {name}"] = hits / len(drawn)
            print(f"{name:46} {key} {100 * row[key]:.1f} %")
        if "width" in drawn[0]:
            row["mean_width"] = float(np.mean([one["width"] for one in drawn]))
        rows.append(row)
    if options.only is None:
        write("statistics_coverage", figures, rows)


if __name__ == "__main__":
    main()
