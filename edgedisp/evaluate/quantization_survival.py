"""Whether a difference between two models is still there after quantization: differences of differences.

Four models answer the same items: baseline and arm, in full precision and quantized. Of each document, the
loss difference arm - baseline is taken in both precisions (nats per token):

    full = arm - baseline,   quantized = Q(arm) - Q(baseline),   change = quantized - full

All are ratios of sums over the same documents, which are resampled together, so what makes a document hard,
and what rounding costs both alike, cancels. Where `full` cannot be told from 0 there is nothing to survive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from edgedisp.core.results import Estimate, LossSurvival
from edgedisp.evaluate.seeds_and_means import averaged, combined
from edgedisp.evaluate.statistics import DEFAULT, Floats, Metric, Parts, Resampling, Sums, interval
from edgedisp.evaluate.task_result import TaskResult, check_same_items

Four = tuple[TaskResult, TaskResult, TaskResult, TaskResult]
"""One task's results: baseline and arm in full precision, then both quantized."""


def is_loss(result: TaskResult) -> bool:
    """Whether a task is a loss per token, the only kind that differences are fine enough for."""
    metric = result.definitions.get(result.score.main.metric)
    return metric is not None and metric.scale == "exp" and metric.denominator is not None


def loss_survival(results: Sequence[Four], resampling: Resampling = DEFAULT) -> LossSurvival:
    """What quantization leaves of the difference in loss; results: one four of each seed.

    With several seeds the differences are of the items' means and carry `seeds`. Raises ValueError when the
    four do not hold the same items, or for a metric that is no loss per token.
    """
    check_same_items([result for four in results for result in four])
    first = results[0][0]
    if not is_loss(first):
        raise ValueError(f"{first.task}: {first.score.main.metric} is no loss per token")
    metric = first.definitions[first.score.main.metric]
    sums = _sums(results, metric)
    by_seed = [_sums([four], metric) for four in results]

    def estimate(statistic: Callable[..., Floats]) -> Estimate:
        value, *values = (float(statistic(*(part.sum() for part in one))) for one in (sums, *by_seed))
        result = replace(interval(sums, statistic, value, resampling), n=len(first.items))
        return result if len(results) == 1 else combined(result, values)

    full, quantized, change = (estimate(statistic) for statistic in (_full, _quantized, _change))
    return LossSurvival(full, quantized, change, verdict(full, quantized, change))


def verdict(full: Estimate, quantized: Estimate, change: Estimate) -> str:
    """`nothing` (full is not clear), `unclear` (quantized is not), `reversed`, `kept` (the change is not
    clear), `weaker` or `stronger`. An estimate whose interval leaves 0 out is clear."""
    before, after, moved = (
        0 if not one.excludes_zero else 1 if (one.low or 0) > 0 else -1 for one in (full, quantized, change)
    )
    if not before:
        return "nothing"
    if not after:
        return "unclear"
    if after != before:
        return "reversed"
    return "kept" if not moved else "stronger" if moved == before else "weaker"


def _sums(results: Sequence[Four], metric: Metric) -> Sums:
    """Losses by document of the four models (means over seeds), then the tokens, which are the same for
    all."""
    means = [averaged([four[place].items for four in results], metric) for place in range(4)]
    parts = [Parts(items, metric).by_document() for items in means]
    return (*(losses for losses, _ in parts), parts[0][1])


def _full(baseline: Floats, arm: Floats, q_baseline: Floats, q_arm: Floats, tokens: Floats) -> Floats:
    return (arm - baseline) / tokens


def _quantized(baseline: Floats, arm: Floats, q_baseline: Floats, q_arm: Floats, tokens: Floats) -> Floats:
    return (q_arm - q_baseline) / tokens


def _change(baseline: Floats, arm: Floats, q_baseline: Floats, q_arm: Floats, tokens: Floats) -> Floats:
    return ((q_arm - q_baseline) - (arm - baseline)) / tokens
