"""How sure a score is, and whether two models differ: intervals and tests over the items of a task.

A metric is a sum over items divided by another sum, then perhaps exponentiated: accuracy, perplexity and bits
per byte have that shape. Items of one document are not independent, so documents are resampled (a clustered
bootstrap), and both models together (paired): what makes an item hard is common to both and cancels.

- One score: Wilson's interval for accuracies, the bootstrap for everything else.
- A difference: the paired bootstrap; for 0/1 items never narrower than Tango's score interval, since the
  bootstrap of a handful of disagreements is too sure of itself.
- A test: exact McNemar for 0/1 items with a document each; else the models are swapped at random by document.

Power: a two-sided test at 5 % finds a true difference of (z(0.975) + z(0.8)) * SE = 2.80 * SE in 4 of 5
repetitions (Cohen, Statistical Power Analysis, 1988; Miller, Adding Error Bars to Evals, arXiv 2411.00640).
For paired 0/1 items SE = sqrt(share / n), share being the items that one of the two models alone gets right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from edgedisp.core.results import Z95, Difference, Estimate

Item = Mapping[str, Any]
Floats = NDArray[np.float64]
Sums = tuple[Floats, ...]
"""Numerator and denominator of the first model by document, then of the next; float64 [documents]."""

ONE_DOCUMENT = "one document: no interval can be given"
_LEAST_SWAPS = 999  # of a swap test: its smallest p is one in so many
_CELLS = 4_000_000  # resamples x documents held at a time: 32 MB as float64


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
    def may_be_share(self) -> bool:
        """Whether it can be a share of 0/1 items."""
        return self.denominator is None and self.scale == "mean"


VALUE = Metric("value")
ACCURACY = Metric("accuracy", "accuracy")
PERPLEXITY = Metric("perplexity", "nll", "tokens", "exp", higher_is_better=False)
BITS_PER_BYTE = Metric("bits_per_byte", "nll", "bytes", "bits", higher_is_better=False)
GOLD_BITS_PER_BYTE = Metric("gold_bits_per_byte", "nll", "bytes", "bits", higher_is_better=False)


def metric_of(items: Sequence[Item], metric: Metric) -> float:
    """The metric over some items. Raises ValueError for no items or for parts that are not finite."""
    return Parts(items, metric).value


def score(items: Sequence[Item], metric: Metric = VALUE, resampling: Resampling = DEFAULT) -> Estimate:
    """One model's score. Items carry `document` and the fields that the metric names.

    The interval is None, with `reason`, where there is a single document. Raises ValueError for no items.
    """
    parts = Parts(items, metric)
    estimate = replace(interval(parts.by_document(), metric.of, parts.value, resampling), n=parts.n)
    if not parts.is_binary:
        return estimate
    low, high = wilson(round(parts.top.sum()), parts.n)
    if parts.documents == parts.n:
        return replace(estimate, low=low, high=high, reason=None)
    return no_narrower(estimate, low, high)


def difference(
    first: Sequence[Item], second: Sequence[Item], metric: Metric = VALUE, resampling: Resampling = DEFAULT
) -> Difference:
    """The paired difference second - first over the same items, aligned by id.

    Raises ValueError when the two lists do not hold the same items, naming some that are missing, or weigh
    one differently.
    """
    before, after = _align(first, second, metric)
    sums = (*before.by_document(), *after.by_document())

    def change(of: Metric) -> Estimate:
        first, second = (float(of.of(parts.top.sum(), parts.bottom.sum())) for parts in (before, after))
        estimate = interval(sums, lambda a, b, c, d: of.of(c, d) - of.of(a, b), second - first, resampling)
        return replace(estimate, n=before.n)

    estimate = change(metric)
    nats = change(replace(metric, scale="mean")) if metric.scale == "exp" else None
    counts = {}
    p, test = None, "document_swap"
    if before.is_binary and after.is_binary:
        only_first = int((before.top > after.top).sum())
        only_second = int((after.top > before.top).sum())
        counts = {"only_first": only_first, "only_second": only_second}
        estimate = no_narrower(estimate, *tango(only_first, only_second, before.n))
        if before.documents == before.n:
            p, test = mcnemar(only_first, only_second), "mcnemar"
    if p is None:
        p = swap_test(sums[2] - sums[0], resampling)
    return Difference(
        metric=metric.name,
        first=before.value,
        second=after.value,
        estimate=replace(estimate, p=p),
        higher_is_better=metric.higher_is_better,
        nats=nats,
        per=None if nats is None else metric.denominator or "item",
        test=test,
        **counts,
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

    def over_documents(*drawn: Floats, axis: int) -> Any:
        return statistic(*(part.sum(axis=axis) for part in drawn))

    ends = stats.bootstrap(
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
    return Estimate(value, float(ends.low), float(ends.high), documents=documents)


def swap_test(differences: Floats, resampling: Resampling = DEFAULT) -> float:
    """Two-sided p: share of random swaps of the two models, document by document, that differ at least as
    much. `differences`: of the numerators, float64 [documents]; exact at any size where nothing differs.

    Where none does, ten times as many are drawn: to survive a correction over a hundred comparisons, p must
    be able to fall below 0.0005.
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


class Parts:
    """Both parts of a metric by item, float64 [n], and which document (0 .. documents - 1) an item is of."""

    def __init__(self, items: Sequence[Item], metric: Metric) -> None:
        if not items:
            raise ValueError(f"no items to compute {metric.name} from")
        self.n, self.metric = len(items), metric
        self.top: Floats = np.array([item[metric.numerator] for item in items], dtype=np.float64)
        self.bottom: Floats = np.ones(self.n)
        if metric.denominator is not None:
            self.bottom = np.array([item[metric.denominator] for item in items], dtype=np.float64)
        if not (np.isfinite(self.top).all() and np.isfinite(self.bottom).all() and (self.bottom > 0).all()):
            raise ValueError(
                f"{metric.name}: an item has a part that is not a finite number, or a weight of 0"
            )
        names = [item["document"] for item in items]
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        self.index = np.array([places[name] for name in names])
        self.documents = len(places)
        self.is_binary = metric.may_be_share and bool(np.isin(self.top, (0.0, 1.0)).all())

    @property
    def value(self) -> float:
        return float(self.metric.of(self.top.sum(), self.bottom.sum()))

    def by_document(self) -> Sums:
        """Both parts summed over each document: float64 [documents] twice."""
        tops, bottoms = (np.bincount(self.index, part) for part in (self.top, self.bottom))
        return tops.astype(np.float64), bottoms.astype(np.float64)


def no_narrower(estimate: Estimate, low: float, high: float) -> Estimate:
    """The estimate with its interval widened to reach from low to high."""
    if estimate.low is None or estimate.high is None:
        return estimate
    return replace(estimate, low=min(estimate.low, low), high=max(estimate.high, high))


def _align(first: Sequence[Item], second: Sequence[Item], metric: Metric) -> tuple[Parts, Parts]:
    left, right = ({str(item["id"]): item for item in items} for items in (first, second))
    if len(left) != len(first) or len(right) != len(second):
        raise ValueError("two items of one list have the same id")
    for name, missing in (("second", left.keys() - right.keys()), ("first", right.keys() - left.keys())):
        if missing:
            shown = ", ".join(sorted(missing)[:5])
            raise ValueError(
                f"{len(missing)} items are missing from the {name} list: {shown}; "
                "only the same items can be paired"
            )
    if moved := [name for name in left if left[name]["document"] != right[name]["document"]]:
        raise ValueError(f"item {moved[0]} belongs to different documents in the two lists")
    parts = Parts([*left.values()], metric), Parts([right[name] for name in left], metric)
    if not np.array_equal(parts[0].bottom, parts[1].bottom):
        raise ValueError(f"{metric.name}: an item weighs differently in the two lists; score both alike")
    return parts


# ---------------------------------------------------------------- power

DIFFERING = 0.06
"""Share of 0/1 items that two models trained alike answer differently: a high one of the 0.5 to 7 % measured
on SmolLM2-135M and the quickstart's text (benchmarks/results/before_after.json)."""

DOCUMENT_SD = {"fp32": 0.0023, "int8": 0.0105, "int4": 0.052}
"""Standard deviation over documents of 100 tokens of the arms' difference in loss, nats per token, measured
in the same study. At int4 most of it is rounding, which falls differently in each arm."""


def power_factor(power: float = 0.8, confidence: float = 0.95) -> float:
    """Detectable effect in standard errors: 2.80 at the usual power and confidence."""
    return float(stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power))


def detectable_accuracy(items: int, differing: float = DIFFERING) -> float:
    """The difference between two accuracies, in [0, 1], that so many paired items show."""
    return min(1.0, power_factor() * math.sqrt(differing / items))


def detectable_loss(documents: int, precision: str) -> float:
    """The difference in held-out loss, nats per token, that so many documents show."""
    return power_factor() * DOCUMENT_SD[precision] / math.sqrt(documents)


def items_for(effect: float, differing: float = DIFFERING) -> int:
    """Paired 0/1 items that it takes to see a difference of `effect`."""
    return math.ceil(differing * (power_factor() / effect) ** 2)
