"""How sure a score is, and whether two models differ: intervals and tests over the items of a task.

Documents are resampled (a clustered bootstrap), since items of one document depend on one another, and both
models together (paired), since what makes an item hard is common to both. With n training seeds an item's
score is its mean over the trainings; the items' interval and the spread of the n values are combined on each
side (MOVER: Zou and Donner, Statistics in Medicine 27, 2008):

    half-width = sqrt(items^2 + seeds^2),   seeds = t(n - 1) * sd / sqrt(n)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from edgedisp.core.results import Z95, Difference, Estimate, Seeds

Items = Sequence[Mapping[str, Any]]
"""The items of one training: {id, document, and the fields that a metric names}."""
Floats = NDArray[np.float64]
Sums = tuple[Floats, ...]
"""Parts of a statistic by document, float64 [documents] each."""

ONE_DOCUMENT = "one document: no interval can be given"
_LEAST_SWAPS = 999  # of a swap test: its smallest p is one in so many
_CELLS = 4_000_000  # resamples x documents in memory at a time: 32 MB as float64


@dataclass(frozen=True)
class Resampling:
    """bootstrap: resamples behind an interval, and swaps behind a test; seed: of both."""

    bootstrap: int = 2000
    seed: int = 0


DEFAULT = Resampling()


@dataclass(frozen=True)
class Metric:
    """scale(sum of item[numerator] / sum of item[denominator]); denominator None counts the items.

    scale: `mean` leaves the ratio alone, `exp` is a perplexity, `bits` turns nats into bits.
    """

    name: str
    numerator: str = "value"
    denominator: str | None = None
    scale: Literal["mean", "exp", "bits"] = "mean"
    higher_is_better: bool = True

    def of(self, numerators: Any, denominators: Any) -> Any:
        """The metric from sums of both parts. exp stops at e^700, near the end of float64."""
        ratio = np.asarray(numerators) / denominators
        if self.scale == "exp":
            return np.exp(np.minimum(ratio, 700.0))
        return ratio / math.log(2) if self.scale == "bits" else ratio

    @property
    def is_mean(self) -> bool:
        """Whether it is a plain mean of items, such as a share of 0/1 items."""
        return self.denominator is None and self.scale == "mean"


VALUE = Metric("value")
ACCURACY = Metric("accuracy", "accuracy")
PERPLEXITY = Metric("perplexity", "nll", "tokens", "exp", higher_is_better=False)
BITS_PER_BYTE = Metric("bits_per_byte", "nll", "bytes", "bits", higher_is_better=False)
GOLD_BITS_PER_BYTE = Metric("gold_bits_per_byte", "nll", "bytes", "bits", higher_is_better=False)


class Parts:
    """Both parts of a metric by item, float64 [n]; the numerator is the mean over the trainings.

    Raises ValueError for no items and for parts that are not finite or weigh 0.
    """

    def __init__(self, trainings: Sequence[Items], metric: Metric) -> None:
        items, weight = trainings[0], metric.denominator
        if not items:
            raise ValueError(f"no items to compute {metric.name} from")
        self.n = len(items)
        tables = [[item[metric.numerator] for item in training] for training in trainings]
        self.by_training: Floats = np.array(tables, dtype=np.float64)
        self.numerator: Floats = np.array([fmean(values) for values in zip(*tables)])
        self.denominator: Floats = np.array([item[weight] if weight else 1.0 for item in items], np.float64)
        finite = np.isfinite(self.numerator).all() and np.isfinite(self.denominator).all()
        if not (finite and (self.denominator > 0).all()):
            raise ValueError(f"{metric.name}: a part of an item is not a finite number, or weighs 0")
        indices: dict[Any, int] = {}
        index = [indices.setdefault(item["document"], len(indices)) for item in items]
        self.documents = len(indices)
        both = self.numerator, self.denominator
        self.by_document: Sums = tuple(np.bincount(index, part).astype(np.float64) for part in both)
        self.is_binary = metric.is_mean and bool(np.isin(self.numerator, (0.0, 1.0)).all())

    def value(self, metric: Metric) -> float:
        return float(metric.of(self.numerator.sum(), self.denominator.sum()))

    def values(self, metric: Metric) -> list[float]:
        """The metric of each training."""
        return [float(metric.of(part.sum(), self.denominator.sum())) for part in self.by_training]


def _check_same_items(lists: Sequence[Items], metric: Metric) -> None:
    weight = metric.denominator or "document"
    keys = [[(item["id"], item["document"], item[weight]) for item in items] for items in lists]
    for other in keys[1:]:
        if unlike := sorted({str(key[0]) for key in set(other) ^ set(keys[0])}):
            examples = ", ".join(unlike[:5])
            raise ValueError(f"{metric.name}: only the same items can be paired; these differ: {examples}")
        if other != keys[0]:
            raise ValueError(f"{metric.name}: items can only be paired in the same order")


def score(trainings: Sequence[Items], metric: Metric = VALUE, resampling: Resampling = DEFAULT) -> Estimate:
    """One model's score; `trainings`: the items of each of its training seeds.

    The interval is Wilson's for 0/1 items, else the bootstrap's, and None, with `reason`, of one document.
    Raises ValueError for no items and for trainings that do not hold the same ones.
    """
    _check_same_items(trainings, metric)
    parts = Parts(trainings, metric)
    estimate = interval(parts.by_document, metric.of, parts.value(metric), resampling)
    estimate = replace(estimate, n=parts.n)
    if parts.is_binary:
        low, high = wilson(round(parts.numerator.sum()), parts.n)
        if parts.documents == parts.n:
            estimate = replace(estimate, low=low, high=high, reason=None)
        estimate = no_narrower(estimate, low, high)
    return combined(estimate, parts.values(metric))


def difference(
    pairs: Sequence[tuple[Items, Items]], metric: Metric = VALUE, resampling: Resampling = DEFAULT
) -> Difference:
    """The paired difference second - first over the same items; one pair (first, second) a training seed.

    `nats`, for a perplexity, is the difference of the mean loss. The test is McNemar's for 0/1 items with a
    document each, else random swaps by document. Raises ValueError when the lists do not hold the same items.
    """
    _check_same_items([items for pair in pairs for items in pair], metric)
    before, after = (Parts([pair[side] for pair in pairs], metric) for side in (0, 1))
    sums = (*before.by_document, *after.by_document)

    def change(of: Metric, *least: tuple[float, float]) -> Estimate:
        value = after.value(of) - before.value(of)
        estimate = interval(sums, lambda a, b, c, d: of.of(c, d) - of.of(a, b), value, resampling)
        for low, high in least:
            estimate = no_narrower(estimate, low, high)
        by_seed = [second - first for first, second in zip(before.values(of), after.values(of))]
        return combined(replace(estimate, n=before.n), by_seed)

    estimate = change(metric, *(_mean_tango(before, after) if metric.is_mean else ()))
    nats = change(replace(metric, scale="mean")) if metric.scale == "exp" else None
    counts = None
    if before.is_binary and after.is_binary:
        counts = disagreements(before.numerator, after.numerator)
    p, test = combined_p(nats or estimate), "items_and_seeds"
    if p is None and counts is not None and before.documents == before.n:
        p, test = mcnemar(*counts), "mcnemar"
    elif p is None:
        p, test = swap_test(sums[2] - sums[0], resampling), "document_swap"
    return Difference(
        metric=metric.name,
        first=before.value(metric),
        second=after.value(metric),
        estimate=replace(estimate, p=p),
        higher_is_better=metric.higher_is_better,
        nats=nats,
        per=None if nats is None else metric.denominator or "item",
        only_first=counts and counts[0],
        only_second=counts and counts[1],
        test=test,
    )


def disagreements(first: Floats, second: Floats) -> tuple[int, int]:
    """How many 0/1 items the first alone got right, and how many the second."""
    return int((first > second).sum()), int((second > first).sum())


def _mean_tango(before: Parts, after: Parts) -> list[tuple[float, float]]:
    """For 0/1 items the mean of the trainings' Tango intervals, as if the seeds shared all of their luck with
    the items: the bootstrap of a handful of disagreements is too sure of itself."""
    both = [*zip(before.by_training, after.by_training)]
    if not np.isin(both, (0.0, 1.0)).all():
        return []
    lows, highs = zip(*(tango(*disagreements(*pair), before.n) for pair in both))
    return [(fmean(lows), fmean(highs))]


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for a share of 0/1 items."""
    result = stats.binomtest(successes, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(result.low), float(result.high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p for paired 0/1 items from the counts that only one model got right; 1 for 0 and 0."""
    differing = only_first + only_second
    return float(stats.binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0


def tango(only_first: int, only_second: int, n: int) -> tuple[float, float]:
    """Tango's 95 % score interval for the difference second - first of two paired shares of n items
    (Statistics in Medicine 17, 1998). Where no item differs it is +-z^2/(n + z^2), not "exactly zero"."""
    observed = (only_second - only_first) / n

    def standardized(delta: float) -> float:
        half = (2 * n - only_second + only_first) * delta - only_second - only_first
        root = math.sqrt(max(0.0, half * half + 8 * n * only_first * delta * (1 - delta)))
        share = (root - half) / (4 * n)  # likeliest P(only first right) if the difference were delta
        spread = math.sqrt(max(n * (2 * share + delta * (1 - delta)), 1e-300))
        return (n * observed - n * delta) / spread

    edge, low, high = 1 - 1e-9, -1.0, 1.0
    if standardized(-edge) > Z95:
        low = optimize.brentq(lambda delta: standardized(delta) - Z95, -edge, observed - 1e-12)
    if standardized(edge) < -Z95:
        high = optimize.brentq(lambda delta: standardized(delta) + Z95, observed + 1e-12, edge)
    return float(low), float(high)


def interval(
    sums: Sums, statistic: Callable[..., Any], value: float, resampling: Resampling = DEFAULT
) -> Estimate:
    """`value` with the percentile interval of `statistic`, documents drawn with replacement.

    The statistic takes the arrays of `sums`, summed over each resample: float64 [resamples]. The percentiles
    are moved outwards for few documents (Hesterberg, The American Statistician 69, 2015): plain ones of 20
    documents cover 92 %, not 95 %.
    """
    documents = len(sums[0])
    if documents < 2:
        return Estimate(value, documents=documents, reason=ONE_DOCUMENT)
    stretch = math.sqrt(documents / (documents - 1)) * float(stats.t.ppf(0.975, documents - 1))

    def over_documents(*samples: Floats, axis: int) -> Any:
        return statistic(*(part.sum(axis=axis) for part in samples))

    result = stats.bootstrap(
        sums,
        over_documents,
        n_resamples=resampling.bootstrap,
        batch=max(1, _CELLS // documents),
        vectorized=True,
        paired=True,
        axis=0,
        confidence_level=1 - 2 * float(stats.norm.sf(stretch)),
        method="percentile",
        rng=np.random.default_rng(resampling.seed),
    ).confidence_interval
    return Estimate(value, float(result.low), float(result.high), documents=documents)


def swap_test(differences: Floats, resampling: Resampling = DEFAULT) -> float:
    """Two-sided p: share of random swaps of the two models, document by document, that differ at least as
    much. `differences`: of the numerators, float64 [documents].

    Where no swap does, ten times as many are drawn: to survive a correction over a hundred comparisons, p
    must be able to fall below 0.0005.
    """
    rng = np.random.default_rng([resampling.seed, 1])
    observed = abs(float(differences.sum())) * (1 - 1e-9) - 1e-15

    def reached(swaps: int) -> int:
        block = max(1, _CELLS // len(differences))
        count = 0
        for start in range(0, swaps, block):
            signs = rng.integers(0, 2, (min(block, swaps - start), len(differences)), np.int8) * 2.0 - 1.0
            count += int((np.abs(signs @ differences) >= observed).sum())
        return count

    swaps = max(resampling.bootstrap, _LEAST_SWAPS)
    count = reached(swaps)
    if not count:
        count, swaps = reached(9 * swaps), 10 * swaps
    return (1 + count) / (1 + swaps)


def no_narrower(estimate: Estimate, low: float, high: float) -> Estimate:
    """The estimate with its interval widened to reach from low to high."""
    if estimate.low is None or estimate.high is None:
        return estimate
    return replace(estimate, low=min(estimate.low, low), high=max(estimate.high, high))


def combined(estimate: Estimate, values: Sequence[float]) -> Estimate:
    """The estimate with its interval widened by the spread of the trainings' `values`, which it carries as
    `seeds`; unchanged for one training."""
    if len(values) == 1:
        return estimate
    sd, low, high, value = float(np.std(values, ddof=1)), estimate.low, estimate.high, estimate.value
    if low is None or high is None or value is None:
        return replace(estimate, seeds=Seeds(tuple(values), sd, low, high))
    spread = float(stats.t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    item_se = (high - low) / (2 * float(stats.t.ppf(0.975, (estimate.documents or 2) - 1)))
    return replace(
        estimate,
        low=value - math.hypot(value - low, spread),
        high=value + math.hypot(high - value, spread),
        seeds=Seeds(tuple(values), sd, low, high, item_se),
    )


def combined_p(estimate: Estimate) -> float | None:
    """Two-sided p at which the combined interval would just touch 0, from 1e-12 to 1, the items' errors taken
    as t-distributed; None without seeds or without an interval."""
    seeds, value = estimate.seeds, estimate.value
    if seeds is None or seeds.item_se is None or seeds.sd is None or value is None:
        return None
    if value == 0:
        return 1.0
    n, sd, item_se, freedom = len(seeds.values), seeds.sd, seeds.item_se, (estimate.documents or 2) - 1

    def beyond(log_p: float) -> float:
        tail = math.exp(log_p) / 2
        spread = stats.t.isf(tail, n - 1) * sd / math.sqrt(n)
        return float(value**2 - (stats.t.isf(tail, freedom) * item_se) ** 2 - spread**2)

    least = math.log(1e-12)
    return 1e-12 if beyond(least) >= 0 else math.exp(optimize.brentq(beyond, least, 0.0))
