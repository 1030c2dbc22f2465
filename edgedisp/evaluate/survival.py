"""Whether a difference between two models is still there after quantization: differences of differences.

Four models answer the same items: baseline and arm, in full precision and quantized. Of each document, the
loss difference arm - baseline is taken in both precisions (nats per token):

    full = arm - baseline,   quantized = Q(arm) - Q(baseline),   change = quantized - full

All three are ratios of sums over the same documents, which are resampled together, so what makes a document
hard, and what rounding costs both arms alike, cancels. `change` is 0 when the difference came through whole.
Two more figures say whether it came through in each document: the correlation of both differences over the
documents, weighted by their tokens, and the slope of the quantized one upon the full one.

Where `full` itself cannot be told from 0, there is nothing measurable to survive, whatever the others say;
`verdict` says so. The figure `kept`, quantized / full, is given only where full is clear: a ratio to
something around 0 says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgedisp.evaluate.result import TaskResult
from edgedisp.evaluate.seeds import averaged, combined
from edgedisp.evaluate.statistics import Floats, Item, Metric, Record, Statistic, resample

Sums = list[tuple[Floats, Floats]]
Four = tuple[TaskResult, TaskResult, TaskResult, TaskResult]
"""One task's results: baseline and arm in full precision, then both quantized."""


def is_measured_by(result: TaskResult) -> bool:
    """Whether a task is a loss per token, the only kind that differences are fine enough for."""
    definition = result["definitions"].get(result["metric"])
    return definition is not None and definition["scale"] == "exp"


def loss_survival(
    results: Sequence[Four], *, bootstrap: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Record:
    """What is left of the difference in loss; results: one four of each seed.

    Returns {full, quantized, change: {difference, low, high} in nats per token; kept, correlation, slope:
    {value, low, high} or None; verdict, n, documents, reason}; with several seeds the three differences are
    of the items' means over seeds and carry `seeds` (evaluate/seeds.py). verdict: `nothing` (full is not
    clear), `kept` (quantized is clear, same sign, and the change is not), `weaker`, `stronger` (both are),
    `reversed`, `unclear` (quantized is not clear). ValueError when the four do not hold the same items, or
    for a metric that is no loss per token.
    """
    first = results[0][0]
    if len({(one["task"], one["items_sha256"]) for four in results for one in four}) > 1:
        raise ValueError(f"the results of {first['task']} do not all hold the same items")
    metric = Metric(**first["definitions"][first["metric"]])
    means = [averaged([four[place]["items"] for four in results], metric) for place in range(4)]
    sums = _by_document(means, metric)
    one_seed = [_by_document([one["items"] for one in four], metric) for four in results]
    documents = len(sums[0][0])

    def told(parts: Sums, statistic: Statistic, key: str) -> Record:
        with np.errstate(divide="ignore", invalid="ignore"):  # documents that do not differ at all
            low, high, _ = resample(parts, statistic, bootstrap, seed, confidence)
            return {key: float(statistic(_totals(parts))), "low": low, "high": high}

    record: Record = {"metric": metric.name, "n": len(means[0]), "documents": documents}
    for name, statistic in DIFFERENCES.items():
        found = told(sums, statistic, "difference")
        if len(results) > 1:
            values = [float(statistic(_totals(one))) for one in one_seed]
            found = combined(found, "difference", values, documents, confidence)
        record[name] = found
    record["kept"] = _known(told(sums, _kept, "value")) if _sign(record["full"]) else None
    for name, statistic in OVER_DOCUMENTS.items():
        record[name] = _known(told(_moments(sums), statistic, "value"))
    record["verdict"] = verdict(record)
    record["reason"] = None if documents > 1 else "one document: no interval can be given"
    return record


def verdict(record: Record) -> str:
    """The one word for a record of `loss_survival`; an interval that leaves 0 out is clear."""
    full, quantized, change = (_sign(record[name]) for name in DIFFERENCES)
    if not full:
        return "nothing"
    if not quantized:
        return "unclear"
    if quantized != full:
        return "reversed"
    return "kept" if not change else "stronger" if change == full else "weaker"


def _by_document(four: Sequence[Sequence[Item]], metric: Metric) -> Sums:
    """(loss, tokens) of each document for each of four models, items aligned by id: float64 [documents]."""
    places = {name: place for place, name in enumerate(dict.fromkeys(item["document"] for item in four[0]))}
    if metric.denominator is None:
        raise ValueError(f"{metric.name} is no loss per token")
    sums = []
    for items in four:
        index = [places[item["document"]] for item in items]
        loss, tokens = (
            np.bincount(index, [item[name] for item in items], len(places))
            for name in (metric.numerator, metric.denominator)
        )
        sums.append((loss.astype(np.float64), tokens.astype(np.float64)))
    return sums


def _moments(sums: Sums) -> Sums:
    """Of x, the full difference of a document in nats per token, y the quantized one, and w its tokens."""
    (full_0, w), (full_1, _), (quantized_0, _), (quantized_1, _) = sums
    x, y = (full_1 - full_0) / w, (quantized_1 - quantized_0) / w
    return [(w, w * x), (w * y, w * x * x), (w * x * y, w * y * y)]


def _totals(sums: Sums) -> Sums:
    return [(np.asarray(top.sum()), np.asarray(bottom.sum())) for top, bottom in sums]


def _difference(first: int) -> Statistic:
    return lambda parts: parts[first + 1][0] / parts[first + 1][1] - parts[first][0] / parts[first][1]


_full, _quantized = _difference(0), _difference(2)


def _change(parts: Sums) -> Floats:
    return _quantized(parts) - _full(parts)


def _kept(parts: Sums) -> Floats:
    return _quantized(parts) / _full(parts)


def _covariances(parts: Sums) -> tuple[Floats, Floats, Floats]:
    """Of x and y, of x, of y, over documents weighted by tokens."""
    (w, x), (y, xx), (xy, yy) = parts
    return xy / w - x * y / w**2, xx / w - (x / w) ** 2, yy / w - (y / w) ** 2


def _correlation(parts: Sums) -> Floats:
    both, full, quantized = _covariances(parts)
    return both / np.sqrt(full * quantized)


def _slope(parts: Sums) -> Floats:
    both, full, _ = _covariances(parts)
    return both / full


DIFFERENCES: dict[str, Statistic] = {"full": _full, "quantized": _quantized, "change": _change}
OVER_DOCUMENTS: dict[str, Statistic] = {"correlation": _correlation, "slope": _slope}


def _known(told: Record) -> Record | None:
    """The figure, or None where it or an end of it is no number."""
    return told if all(end is not None and np.isfinite(end) for end in told.values()) else None


def _sign(told: Record) -> int:
    """1 or -1 where the interval leaves 0 out on that side, else 0."""
    if told["low"] is None or told["low"] <= 0 <= told["high"]:
        return 0
    return 1 if told["low"] > 0 else -1
