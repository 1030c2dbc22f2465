"""Several trainings of each arm: what is shared by the items, and what is the luck of a seed.

With n seeds an arm's score on an item is the mean over its n trainings, and everything of `statistics` is
computed from these means: a score, a paired difference, its interval over the choice of items. That interval
says nothing of the luck of training, which shows in how the n differences (one per seed, over the same items)
spread. Both are kept apart in the record, and combined:

    half-width = sqrt(items^2 + seeds^2),   seeds = t(n - 1) * sd / sqrt(n)

on each side, where `items` is the distance to that end of the items' interval. This adds the intervals of two
independent sources (MOVER: Zou and Donner, Statistics in Medicine 27, 2008), keeps the bootstrap's asymmetry
and is never narrower than either part. Simulated for 2, 3 and 5 seeds and a seed spread of 0 to 20 times the
items' error, it covers 95 to 99 %. Left out: one t interval with Satterthwaite's degrees of freedom, which is
narrower, but covers only 87 % for two seeds whose spread outweighs the items'.

What an item's trainings do not share is in both parts, which errs on the careful side. Two seeds give a wide
interval (t = 12.7): they show that luck matters, and three or more how much.

The mean of a loss over seeds is a geometric mean of perplexities.
"""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

from edgedisp.evaluate.result import TaskResult, compare_task
from edgedisp.evaluate.statistics import Item, Metric, Record, paired, single, tango

Items = Sequence[Item]


def average_task(results: Sequence[TaskResult], *, bootstrap: int = 2000, seed: int = 0) -> dict[str, Any]:
    """One task's results of one arm with n seeds as one result; its metrics carry `seeds` (see `score`).

    Items are left out. Raises ValueError when the results do not hold the same items.
    """
    first = results[0]
    if len(results) == 1:
        return {name: value for name, value in first.items() if name != "items"}
    _same_items(results)
    metrics = {
        name: score([one["items"] for one in results], Metric(**definition), bootstrap=bootstrap, seed=seed)
        for name, definition in first["definitions"].items()
    }
    values = [one["value"] for one in results]
    unpaired = {"value": None if None in values else plain.fmean(v for v in values if v is not None)}
    main = metrics.get(first["metric"]) or {**unpaired, "low": None, "high": None}
    kept = {name: value for name, value in first.items() if name not in ("items", "metrics")}
    return {**kept, **main, "metrics": metrics}


def compare_tasks(
    pairs: Sequence[tuple[TaskResult, TaskResult]], *, bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """`result.compare_task` over n seeds: pairs of (baseline, other arm), one for each seed.

    With one pair it is the same. With more, every metric carries `seeds` (see `difference`).
    Raises ValueError when the results come from different tasks or different items.
    """
    found = compare_task(*pairs[0], bootstrap=bootstrap, seed=seed)
    if len(pairs) == 1:
        return found
    _same_items([one for pair in pairs for one in pair])
    first = pairs[0][0]
    metrics = {
        name: difference(
            [(before["items"], after["items"]) for before, after in pairs],
            Metric(**definition),
            bootstrap=bootstrap,
            seed=seed,
        )
        for name, definition in first["definitions"].items()
    }
    if first["metric"] in metrics:
        return {**metrics[first["metric"]], "metrics": metrics}
    changes = [
        after["value"] - before["value"]
        for before, after in pairs
        if before["value"] is not None and after["value"] is not None
    ]
    mean = plain.fmean(changes) if changes else None
    return {**found, "difference": mean, "metrics": metrics}


def score(
    trainings: Sequence[Items],
    metric: Metric,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Record:
    """`statistics.single` of the items' means over n trainings, low and high combined with the seeds' spread.

    Adds `seeds`: {n, values, sd, item_low, item_high, item_se}. Raises ValueError for other items.
    """
    record = single(
        averaged(trainings, metric), metric, bootstrap=bootstrap, seed=seed, confidence=confidence
    )
    if len(trainings) == 1:
        return record
    values = [_value(items, metric) for items in trainings]
    return combined(record, "value", values, record["documents"], confidence) | {
        "interval": "items_and_seeds"
    }


def difference(
    pairs: Sequence[tuple[Items, Items]],
    metric: Metric,
    *,
    bootstrap: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Record:
    """`statistics.paired` of the items' means over n seeds, with the spread between seeds put in.

    Adds `seeds`: {n, values (the n differences), sd, item_low, item_high (the interval over items alone),
    item_se}; for perplexities the same in `nll_difference`. `p_value` belongs to the combined interval:
    the smallest error rate at which that would leave out 0 (item errors taken as t-distributed).
    Raises ValueError when two of the 2n lists do not hold the same items.
    """
    befores, afters = [before for before, _ in pairs], [after for _, after in pairs]
    record = paired(
        averaged(befores, metric),
        averaged(afters, metric),
        metric,
        bootstrap=bootstrap,
        seed=seed,
        confidence=confidence,
    )
    if len(pairs) == 1:
        return record
    record |= _no_narrower_than_tango(record, pairs, metric, confidence)
    documents = record["documents"]
    values = [_value(after, metric) - _value(before, metric) for before, after in pairs]
    found = combined(record, "difference", values, documents, confidence)
    tested, spread = found, values
    if "nll_difference" in record:
        loss = Metric(metric.name, metric.numerator, metric.denominator)
        spread = [_value(after, loss) - _value(before, loss) for before, after in pairs]
        tested = found["nll_difference"] = combined(
            record["nll_difference"], "difference", spread, documents, confidence
        )
    error = tested["seeds"]["item_se"]
    if error is not None:
        found["p_value"] = combined_p(
            tested["difference"], error, documents, tested["seeds"]["sd"], len(pairs)
        )
        found["test"] = "items_and_seeds"
    return found | {"interval": "items_and_seeds"}


def averaged(trainings: Sequence[Items], metric: Metric) -> list[dict[str, Any]]:
    """The items with the metric's numerator averaged over trainings, in the order of the first.

    Raises ValueError if an item is missing somewhere, or weighs differently.
    """
    tables = [{str(item["id"]): item for item in items} for items in trainings]
    weight = metric.denominator
    out = []
    for name, item in tables[0].items():
        held = [table.get(name) for table in tables]
        if None in held or any(len(table) != len(tables[0]) for table in tables):
            raise ValueError(f"item {name} and others are not in every training's results")
        same = [one for one in held if one is not None and (weight is None or one[weight] == item[weight])]
        if len(same) != len(held):
            raise ValueError(f"item {name} weighs differently in two trainings; score all with one tokenizer")
        out.append({**item, metric.numerator: plain.fmean(one[metric.numerator] for one in same)})
    return out


def combined_p(difference: float, item_se: float, documents: int, sd: float, n: int) -> float:
    """Two-sided p at which the combined interval would just touch 0; between 1e-12 and 1."""

    def beyond(log_p: float) -> float:
        tail = math.exp(log_p) / 2
        items, seeds = (
            stats.t.isf(tail, documents - 1) * item_se,
            stats.t.isf(tail, n - 1) * sd / math.sqrt(n),
        )
        return float(difference**2 - items**2 - seeds**2)

    least = math.log(1e-12)
    if difference == 0:
        return 1.0
    return 1e-12 if beyond(least) >= 0 else math.exp(optimize.brentq(beyond, least, 0.0))


def combined(
    record: Mapping[str, Any], key: str, values: Sequence[float], documents: int, confidence: float
) -> Record:
    """`record` with its interval widened by the spread of `values`, and both parts told under `seeds`."""
    low, high, centre = record["low"], record["high"], record[key]
    sd = float(np.std(values, ddof=1))
    told: Record = {"n": len(values), "values": list(values), "sd": sd, "item_low": low, "item_high": high}
    if low is None or high is None:
        return {**record, "seeds": {**told, "item_se": None}}
    tail = (1 + confidence) / 2
    seeds = float(stats.t.ppf(tail, len(values) - 1)) * sd / math.sqrt(len(values))
    told["item_se"] = (high - low) / (2 * float(stats.t.ppf(tail, documents - 1)))
    ends = {
        "low": centre - math.hypot(centre - low, seeds),
        "high": centre + math.hypot(high - centre, seeds),
    }
    return {**record, **ends, "seeds": told}


def _no_narrower_than_tango(
    record: Record, pairs: Sequence[tuple[Items, Items]], metric: Metric, confidence: float
) -> Record:
    """For 0/1 items: the interval over items, at least as wide as the mean of the seeds' Tango intervals.

    That mean is what would hold if the seeds shared all of their luck with the items.
    """
    if metric.denominator is not None or metric.scale != "mean" or record["low"] is None:
        return {}
    ends = []
    for before, after in pairs:
        first, second = (
            {str(item["id"]): item[metric.numerator] for item in items} for items in (before, after)
        )
        if not {*first.values(), *second.values()} <= {0, 1}:
            return {}
        only_first = sum(first[name] > second[name] for name in first)
        only_second = sum(second[name] > first[name] for name in first)
        ends.append(tango(only_first, only_second, len(first), confidence))
    lows, highs = zip(*ends)
    return {"low": min(record["low"], plain.fmean(lows)), "high": max(record["high"], plain.fmean(highs))}


def _value(items: Items, metric: Metric) -> float:
    """The metric of one training's items."""
    top = np.array([item[metric.numerator] for item in items], dtype=np.float64).sum()
    bottom = len(items)
    if metric.denominator is not None:
        bottom = np.array([item[metric.denominator] for item in items], dtype=np.float64).sum()
    return float(metric.of(np.asarray(top), np.asarray(bottom, dtype=np.float64)))


def _same_items(results: Sequence[TaskResult]) -> None:
    if len({(one["task"], one["items_sha256"]) for one in results}) > 1:
        raise ValueError(
            f"the results of {results[0]['task']} do not all hold the same items; score every training with "
            "one recipe, tokenizer and seed"
        )
