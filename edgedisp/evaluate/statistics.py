"""How sure a score is, and whether two models differ: intervals and tests over the items of a task.

Documents are resampled (a clustered bootstrap), since items of one document depend on one another, and all
models together (paired), since what makes an item hard is common to them. With n training seeds an item's
score is its mean over them; half-widths of items and of seeds, t(n - 1) * sd / sqrt(n), are combined on each
side as the root of the sum of their squares (MOVER: Zou and Donner, Statistics in Medicine 27, 2008).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from edgedisp.core.results import Z95, Difference, Estimate, Seeds

Items = Sequence[Mapping[str, Any]]
"""The items of one training: {id, document, and the fields that a metric names}."""
Floats = NDArray[np.float64]

POWER = 0.8  # with which a detectable difference is found
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
    numerator: str
    denominator: str | None = None
    scale: Literal["mean", "exp", "bits"] = "mean"
    higher_is_better: bool = True

    def of(self, numerators: Any, denominators: Any) -> Any:
        """The metric from sums of both parts, 0 of a resample without any. exp stops at e^700, near the end
        of float64."""
        ratio: Any = np.asarray(numerators) / np.maximum(denominators, 1e-300)
        if self.scale == "exp":
            ratio = np.exp(np.minimum(ratio, 700.0))
        return ratio / math.log(2) if self.scale == "bits" else ratio

    @property
    def is_mean(self) -> bool:
        """Whether it is a plain mean of items, such as a share of 0/1 items."""
        return self.denominator is None and self.scale == "mean"


ACCURACY = Metric("accuracy", "accuracy")
PERPLEXITY = Metric("perplexity", "nll", "tokens", "exp", higher_is_better=False)
BITS_PER_BYTE = Metric("bits_per_byte", "nll", "bytes", "bits", higher_is_better=False)
GOLD_BITS_PER_BYTE = Metric("gold_bits_per_byte", "nll", "bytes", "bits", higher_is_better=False)


class PairedItems:
    """A metric's parts of one or more models over the same items; each model with its trainings' items.

    numerators: float64 [models, trainings, items]; denominators: float64 [items]. Raises ValueError for no
    items, and for models or trainings that do not hold the same ones.
    """

    def __init__(self, models: Sequence[Sequence[Items]], metric: Metric) -> None:
        self.metric, weight = metric, metric.denominator
        items = models[0][0]
        keys = [
            [(item["id"], item["document"], item.get("asked"), weight and item[weight]) for item in training]
            for trainings in models
            for training in trainings
        ]
        if not items or any(other != keys[0] for other in keys):
            raise ValueError(f"{metric.name}: only the same items in the same order can be paired")
        part = metric.numerator
        tables = [[[item[part] for item in training] for training in model] for model in models]
        self.numerators: Floats = np.array(tables, np.float64)
        self.denominators: Floats = np.array([item[weight] if weight else 1.0 for item in items], np.float64)
        indices: dict[Any, int] = {}
        self._document = [indices.setdefault(item["document"], len(indices)) for item in items]
        self.items, self.documents = len(items), len(indices)
        self.is_binary = metric.is_mean and bool(np.isin(self.numerators, (0.0, 1.0)).all())

    def by_document(self, values: Floats) -> Floats:
        """Values of items, summed by document."""
        return np.bincount(self._document, values).astype(np.float64)

    def contrast(
        self, weights: Sequence[int], resampling: Resampling, least: tuple[float, float] | None = None
    ) -> Estimate:
        """The sum of weight x metric over the models, with its interval over documents and trainings: that of
        the first model by (1,), second - first by (-1, 1). least: an interval that the items' one contains.

        The percentiles of the bootstrap are moved outwards for few documents (Hesterberg, The American
        Statistician 69, 2015): plain ones of 20 documents cover 92 %, not 95 %.
        """

        def statistic(numerators: Any, denominators: Any) -> Any:
            return np.dot(weights, self.metric.of(numerators, denominators))

        def over_documents(*samples: Floats, axis: int) -> Any:
            *numerators, denominators = (part.sum(axis=axis) for part in samples)
            return statistic(np.stack(numerators), denominators)

        means, total, documents = self.numerators.mean(axis=1), self.denominators.sum(), self.documents
        value = float(statistic(means.sum(axis=-1), total))
        estimate = Estimate(value, n=self.items, documents=documents, reason=ONE_DOCUMENT)
        if documents > 1:
            stretch = math.sqrt(documents / (documents - 1)) * float(stats.t.ppf(0.975, documents - 1))
            low, high = stats.bootstrap(
                [self.by_document(part) for part in (*means, self.denominators)],
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
            least = least or (low, high)
            low, high = float(min(low, least[0])), float(max(high, least[1]))
            estimate = replace(estimate, low=low, high=high, reason=None)
        return combined(estimate, statistic(self.numerators.sum(axis=-1), total).tolist())


def score(trainings: Sequence[Items], metric: Metric, resampling: Resampling = DEFAULT) -> Estimate:
    """One model's score; `trainings`: the items of each of its seeds. The interval is Wilson's for one
    training's 0/1 items, else the bootstrap's, and None, with `reason`, of one document."""
    paired = PairedItems([trainings], metric)
    if not paired.is_binary or len(trainings) > 1:
        return paired.contrast((1,), resampling)
    low, high = wilson(round(paired.numerators.sum()), paired.items)
    estimate = paired.contrast((1,), resampling, least=(low, high))
    if paired.documents == paired.items:
        estimate = replace(estimate, low=low, high=high, reason=None)
    return estimate


def difference(
    pairs: Sequence[tuple[Items, Items]], metric: Metric, resampling: Resampling = DEFAULT
) -> Difference:
    """The paired difference second - first over the same items; one pair (first, second) a training seed.

    `nats`, for a perplexity, is the difference of the mean loss. The test is McNemar's for 0/1 items with a
    document each, else random swaps by document; over seeds that of `combined_p`.
    """
    models = list(zip(*pairs))
    paired = PairedItems(models, metric)
    least = counts = nats = None
    if paired.is_binary:
        # The mean of the trainings' Tango intervals, as if the seeds shared all of their luck with the items:
        # the bootstrap of a handful of disagreements is too sure of itself.
        disagreements = [(int((a > b).sum()), int((b > a).sum())) for a, b in zip(*paired.numerators)]
        low, high = np.mean([tango(*pair, paired.items) for pair in disagreements], axis=0)
        least, counts = (low, high), disagreements[0] if len(pairs) == 1 else None
    estimate = paired.contrast((-1, 1), resampling, least)
    if metric.scale == "exp":
        nats = with_power(PairedItems(models, replace(metric, scale="mean")).contrast((-1, 1), resampling))
    means = paired.numerators.mean(axis=1)
    values = metric.of(means.sum(axis=-1), paired.denominators.sum())
    p, test = combined_p(nats or estimate), "items_and_seeds"
    if p is None and counts is not None and paired.documents == paired.items:
        p, test = mcnemar(*counts), "mcnemar"
    elif p is None:
        p, test = swap_test(paired.by_document(means[1] - means[0]), resampling), "document_swap"
    return Difference(
        metric.name,
        float(values[0]),
        float(values[1]),
        estimate=with_power(replace(estimate, p=p)),
        higher_is_better=metric.higher_is_better,
        nats=nats,
        per=None if nats is None else metric.denominator or "item",
        only_first=counts and counts[0],
        only_second=counts and counts[1],
        test=test,
    )


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


def swap_test(differences: Floats, resampling: Resampling = DEFAULT) -> float:
    """Two-sided p: share of random swaps of two models, document by document, that differ at least as much as
    `differences`, float64 [documents]. Where none does, ten times as many are drawn: to survive a
    correction over a hundred comparisons, p must be able to fall below 0.0005."""
    rng = np.random.default_rng([resampling.seed, 1])
    observed = abs(float(differences.sum())) * (1 - 1e-9) - 1e-15
    block = max(1, _CELLS // len(differences))
    first = max(resampling.bootstrap, _LEAST_SWAPS)
    count = swaps = 0
    for more in (first, 9 * first):
        for start in range(0, more, block):
            signs = rng.integers(0, 2, (min(block, more - start), len(differences)), np.int8) * 2.0 - 1.0
            count += int((np.abs(signs @ differences) >= observed).sum())
        swaps += more
        if count:
            break
    return (1 + count) / (1 + swaps)


def combined(estimate: Estimate, values: Sequence[float]) -> Estimate:
    """The estimate with its interval widened by the spread of the trainings' `values`, which it carries as
    `seeds`; unchanged for one training."""
    if len(values) == 1:
        return estimate
    sd, low, high, value = float(np.std(values, ddof=1)), estimate.low, estimate.high, estimate.value
    estimate = replace(estimate, seeds=Seeds(tuple(values), sd, low, high))
    if low is None or high is None or value is None:
        return estimate
    spread = float(stats.t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    low, high = value - math.hypot(value - low, spread), value + math.hypot(high - value, spread)
    return replace(estimate, low=low, high=high)


def combined_p(estimate: Estimate) -> float | None:
    """Two-sided p at which the combined interval would just touch 0, from 1e-12 to 1, the items' errors taken
    as t-distributed; None without seeds or without an interval."""
    seeds, items, value = estimate.seeds, estimate.over_items, estimate.value
    if seeds is None or items is None or items.half_width is None or value is None:
        return None
    n, freedom = len(seeds.values), (estimate.documents or 2) - 1
    item_se, seed_se = items.half_width / stats.t.ppf(0.975, freedom), (seeds.sd or 0.0) / math.sqrt(n)

    def excess(log_p: float) -> float:
        tail = math.exp(log_p) / 2
        half_width = math.hypot(stats.t.isf(tail, freedom) * item_se, stats.t.isf(tail, n - 1) * seed_se)
        return half_width - abs(value)

    least = math.log(1e-12)
    if value == 0 or excess(least) <= 0:
        return 1.0 if value == 0 else 1e-12
    return math.exp(optimize.brentq(excess, least, 0.0))


def with_power(estimate: Estimate) -> Estimate:
    """The estimate of a difference with what a comparison like it detects with at least 80 % power: the
    half-widths of items and seeds, each times its `power_factor`, combined as the interval combines them."""
    half_width, over_items, seeds = estimate.half_width, estimate.over_items, estimate.seeds
    if half_width is None:
        return estimate
    item_half = half_width if over_items is None else over_items.half_width or 0.0
    detectable = power_factor(max(1, (estimate.documents or 2) - 1)) * item_half
    if seeds is not None:
        seed_half = math.sqrt(max(0.0, half_width**2 - item_half**2))
        detectable = math.hypot(detectable, power_factor(len(seeds.values) - 1) * seed_half)
    return replace(estimate, detectable=detectable)


@cache
def power_factor(freedom: int) -> float:
    """A difference that is detected with 80 % power, in half-widths of a 95 % interval of so many degrees of
    freedom: 1.43 for many of them, 1.48 for 19, 2.04 for 2.

    Another sample is tested, so the power is averaged over the standard errors s that this one may show:
    mean over s of P(|T'| > t), T' noncentral t with mean factor * t * s.
    """
    t = stats.t.ppf(0.975, freedom)
    errors = np.sqrt(stats.chi2.ppf((np.arange(200) + 0.5) / 200, freedom) / freedom)
    return float(
        optimize.brentq(lambda k: stats.nct.sf(t, freedom, k * t * errors).mean() - POWER, 1.0, 10.0)
    )
