"""What a random sample says of the finite set that it was drawn from.

The items are drawn without replacement, so the variance shrinks by 1 - n/N (Cochran, Sampling Techniques,
1977, chapters 2 and 6), whatever documents they come from. Shares: Wilson's interval at the size
n (N-1)/(N-n), which has that variance. Ratios such as a loss per token: linearised, t with n-1 degrees of
freedom.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from edgedisp.evaluate.statistics import Metric, Record


def sampled(items: Sequence[Mapping[str, Any]], metric: Metric, of: int, confidence: float = 0.95) -> Record:
    """What a random sample says of the `of` items that it was drawn from: {value, low, high, n, of}.

    low and high hold the whole set's value in `confidence` of draws; both are the value where all were drawn,
    and None for a single item.
    """
    top = np.array([item[metric.numerator] for item in items], np.float64)
    bottom = np.ones(len(top))
    if metric.denominator is not None:
        bottom = np.array([item[metric.denominator] for item in items], np.float64)
    n, ratio = len(top), float(top.sum() / bottom.sum())
    ends: tuple[float, float] | None = None
    if n == of:
        ends = ratio, ratio
    elif metric.denominator is None and metric.scale == "mean" and np.isin(top, (0.0, 1.0)).all():
        ends = wilson_of(ratio, n * (of - 1) / (of - n), confidence)
    elif n > 1:
        spread = float(np.std(top - ratio * bottom, ddof=1)) / float(bottom.mean())
        half = math.sqrt((1 - n / of) / n) * spread * float(stats.t.ppf((1 + confidence) / 2, n - 1))
        ends = ratio - half, ratio + half
    value, *both = (
        None if one is None else float(metric.of(np.asarray(one), np.asarray(1.0)))
        for one in (ratio, *(ends or (None, None)))
    )
    return {"value": value, "low": both[0], "high": both[1], "n": n, "of": of}


def wilson_of(share: float, size: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share seen in `size` items, which need not be a whole number."""
    z = float(stats.norm.ppf((1 + confidence) / 2))
    middle = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    return max(0.0, middle - half), min(1.0, middle + half)
