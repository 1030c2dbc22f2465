"""How often intervals hold the truth, and how often the verdict claims what is not there: by simulation.

    python benchmarks/coverage.py [--repetitions 2000]

Every row draws items from a known truth, many times, and asks the statistics of `edgedisp.evaluate` for a
95 % interval. Losses are clustered by document and correlated between the models, as held-out losses are; a
document's difficulty has a standard deviation of 0.5 nats per token and the arms' difference one of 0.02.
Accuracies disagree on a share of the items, right and wrong alike. The verdict is that of a build without any
difference. Writes results/coverage.json. Numbers alone: no model is opened.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from record import write
from scipy import stats

from edgedisp.evaluate.means import mean_difference
from edgedisp.evaluate.result import TaskResult, compare_task, task_result
from edgedisp.evaluate.seeds import difference as over_seeds
from edgedisp.evaluate.statistics import ACCURACY, PERPLEXITY, Metric, paired
from edgedisp.evaluate.survival import loss_survival
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
    found: list[Items] = []
    for shift in models:
        own = rng.normal(shift, SPREAD / np.sqrt(2), (documents, 1))
        each = hard[:, None] + own + rng.normal(0, SPREAD / 4, tokens.shape)
        found.append(
            [
                {
                    "id": f"{d}.{k}",
                    "document": d,
                    "nll": float(each[d, k] * tokens[d, k]),
                    "tokens": int(tokens[d, k]),
                }
                for d in range(documents)
                for k in range(per_document)
            ]
        )
    return found


def answers(rng: Rng, items: int, differing: float) -> tuple[Items, Items]:
    """Right and wrong answers of two models alike but for a share of the items, where either may be right."""
    first = rng.random(items) < 0.6
    changed = rng.random(items) < differing
    second = np.where(changed, ~first, first)
    flip = rng.random(items) < 0.5  # which of the two is the one that changed
    a, b = np.where(flip, second, first), np.where(flip, first, second)
    return tuple([{"id": k, "document": k, "accuracy": int(x)} for k, x in enumerate(one)] for one in (a, b))  # type: ignore[return-value]


def a_result(items: Items, task: str, metric: Metric) -> TaskResult:
    return task_result(task, items, [metric], fingerprints=[str(one["id"]) for one in items], bootstrap=2)


def of_losses(documents: int, per_document: int) -> Callable[[Rng], dict[str, Any]]:
    def draw(rng: Rng) -> dict[str, Any]:
        pair = losses(rng, documents, [0.0, TRUTH], per_document)
        found = paired(*pair, LOSS, bootstrap=BOOTSTRAP, seed=int(rng.integers(2**31)))
        return {"holds": found["low"] <= TRUTH <= found["high"], "width": found["high"] - found["low"]}

    return draw


def of_accuracies(items: int, differing: float) -> Callable[[Rng], dict[str, Any]]:
    def draw(rng: Rng) -> dict[str, Any]:
        found = paired(
            *answers(rng, items, differing), ACCURACY, bootstrap=BOOTSTRAP, seed=int(rng.integers(2**31))
        )
        return {
            "holds": found["low"] <= 0 <= found["high"],
            "width": found["high"] - found["low"],
            "rejects": found["p_value"] <= 0.05,
        }

    return draw


def of_means(tasks: int, items: int) -> Callable[[Rng], dict[str, Any]]:
    def draw(rng: Rng) -> dict[str, Any]:
        pairs = {str(k): answers(rng, items, 0.1) for k in range(tasks)}
        before, after = (
            {task: a_result(pair[side], task, ACCURACY) for task, pair in pairs.items()} for side in (0, 1)
        )
        compared = {
            task: compare_task(before[task], after[task], bootstrap=BOOTSTRAP, seed=int(rng.integers(2**31)))
            for task in pairs
        }
        found = mean_difference(before, after, compared)
        if found is None:
            raise ValueError("no mean")
        return {"holds": found["low"] <= 0 <= found["high"], "width": found["high"] - found["low"]}

    return draw


def of_seeds(documents: int, seeds: int, luck: float) -> Callable[[Rng], dict[str, Any]]:
    """`luck`: the standard deviation between trainings, in nats per token."""

    def draw(rng: Rng) -> dict[str, Any]:
        shifts = [0.0, *(TRUTH + rng.normal(0, luck) for _ in range(seeds))]
        first, *others = losses(rng, documents, shifts)
        pairs = [(first, other) for other in others]
        found = over_seeds(pairs, LOSS, bootstrap=BOOTSTRAP, seed=int(rng.integers(2**31)))
        return {"holds": found["low"] <= TRUTH <= found["high"], "width": found["high"] - found["low"]}

    return draw


def of_survival(documents: int) -> Callable[[Rng], dict[str, Any]]:
    """The difference in differences: quantization takes a quarter of the arm's gain."""

    def draw(rng: Rng) -> dict[str, Any]:
        four = losses(rng, documents, [0.0, -0.02, 0.1, 0.085])
        results = tuple(a_result(items, "heldout_perplexity", PERPLEXITY) for items in four)
        found = loss_survival([results], bootstrap=BOOTSTRAP, seed=int(rng.integers(2**31)))["change"]  # type: ignore[list-item]
        return {"holds": found["low"] <= 0.005 <= found["high"], "width": found["high"] - found["low"]}

    return draw


def of_verdicts(documents: int) -> Callable[[Rng], dict[str, Any]]:
    """A build whose arms do not differ: held-out loss and two accuracies at three precisions."""

    def draw(rng: Rng) -> dict[str, Any]:
        comparison: dict[str, Any] = {}
        for precision in ("torch", "int8", "int4"):
            seed = int(rng.integers(2**31))
            pair = losses(rng, documents, [0.0, 0.0])
            by_task = {"heldout_perplexity": paired(*pair, PERPLEXITY, bootstrap=BOOTSTRAP, seed=seed)}
            for task in ("heldout_cloze", "heldout_continuation"):
                by_task[task] = paired(
                    *answers(rng, documents, 0.06), ACCURACY, bootstrap=BOOTSTRAP, seed=seed
                )
            comparison[precision] = by_task
        summary = {
            "arms": ["baseline", "dispersed"],
            "precisions": ["torch", "int8", "int4"],
            "comparison": {"dispersed": comparison},
        }
        return {"claims": verdict(summary)["label"] in ("helps", "hurts")}

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=2000)
    asked = parser.parse_args()
    rows, figures = [], {}
    for number, (name, draw) in enumerate(ROWS.items()):
        started = time.perf_counter()
        rng = np.random.default_rng([1, number])
        drawn = [draw(rng) for _ in range(asked.repetitions)]
        row: dict[str, Any] = {"name": name, "repetitions": asked.repetitions}
        for key in ("holds", "rejects", "claims"):
            if key in drawn[0]:
                hits = sum(one[key] for one in drawn)
                interval = stats.binomtest(hits, len(drawn)).proportion_ci(method="wilson")
                row |= {
                    key: hits / len(drawn),
                    f"{key}_low": float(interval.low),
                    f"{key}_high": float(interval.high),
                }
                figures[f"{key}: {name}"] = hits / len(drawn)
        if "width" in drawn[0]:
            row["mean_width"] = float(np.mean([one["width"] for one in drawn]))
        rows.append(row)
        shown = ", ".join(
            f"{key} {100 * row[key]:.1f} %" for key in ("holds", "rejects", "claims") if key in row
        )
        print(f"{name:46} {shown}")
        print(f"  {time.perf_counter() - started:.0f} s", file=sys.stderr)
    write("coverage", figures, rows)


if __name__ == "__main__":
    main()
