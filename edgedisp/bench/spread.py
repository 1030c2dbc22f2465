"""How sure a handful of timings is: median with an exact interval, drift, difference between two bundles.

Timings on a busy machine have long tails in one direction, so nothing here assumes a normal distribution. The
interval of a median comes from order statistics: for n values, the k-th smallest and the k-th largest enclose
the true median with a probability that depends on n and k alone (binomial with p = 1/2), whatever the
distribution. Five values cannot do better than smallest to largest, 93.75 %, and the coverage that was
reached is part of the answer. Drift is Theil and Sen's: the median of all pairwise slopes, which one bad
value cannot move.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import Any

LEVEL = 0.95
LEAST_COVERAGE = 0.9  # below it (four values or fewer) no difference between bundles is called real
NOTABLE_DIFFERENCE = 0.03  # two bundles with the same graph: less than 3 % is not worth a warning


def spread(values: Sequence[float], level: float = LEVEL) -> dict[str, float]:
    """{median, low, high, coverage, p10, p50, p90} of one or more values; `low` to `high` is the interval.

    The narrowest pair of order statistics whose coverage reaches `level`; smallest and largest where none
    does. `coverage` is exact: 1 - 2 P(fewer than k of n values lie below the median).
    """
    ordered = sorted(values)
    n = len(ordered)
    k = 1
    while k + 1 <= n // 2 and _coverage(n, k + 1) >= level:
        k += 1
    return {
        "median": statistics.median(ordered),
        "low": ordered[k - 1],
        "high": ordered[n - k],
        "coverage": _coverage(n, k),
        "p10": percentile(ordered, 0.1),
        "p50": percentile(ordered, 0.5),
        "p90": percentile(ordered, 0.9),
    }


def _coverage(n: int, k: int) -> float:
    """Probability that the k-th smallest and k-th largest of n values enclose the true median."""
    outside: float = sum(math.comb(n, i) for i in range(k)) / 2**n
    return max(0.0, 1.0 - 2.0 * outside)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linear between neighbours (numpy's default)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def drift_percent(values: Sequence[float]) -> float | None:
    """Change from the first to the last value along the Theil-Sen line, in % of the median; None below 3."""
    if len(values) < 3:
        return None
    slopes = [(values[j] - values[i]) / (j - i) for i, j in combinations(range(len(values)), 2)]
    middle = statistics.median(values)
    return 100.0 * statistics.median(slopes) * (len(values) - 1) / middle if middle else None


def compare(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Ratio b / a of figures timed in turns: {ratio, low, high, coverage, differs}.

    Values are paired by repetition, because what disturbs a repetition mostly disturbs its neighbour too.
    `differs` is None where too few repetitions were made to tell, and true only where the whole interval lies
    on one side of 1 and the median is off by more than 3 %.
    """
    ratios = [right / left for left, right in zip(a, b)]
    found = spread(ratios)
    low, high, middle = found["low"], found["high"], found["median"]
    differs = None
    if found["coverage"] >= LEAST_COVERAGE:
        differs = not low <= 1.0 <= high and abs(middle - 1.0) > NOTABLE_DIFFERENCE
    return {"ratio": middle, "low": low, "high": high, "coverage": found["coverage"], "differs": differs}
