"""What a comparison can see: the minimum detectable effect, and how many items it would take to see less.

A two-sided test at 5 % finds a true difference of `effect` in 4 of 5 repetitions when

    effect = (z(0.975) + z(0.8)) * SE = 2.80 * SE

(Cohen, Statistical Power Analysis, 1988; Miller, Adding Error Bars to Evals, arXiv 2411.00640, for evals).
A 95 % interval of half-width h has SE = h / 1.96, so its comparison sees 1.43 h. SE shrinks with the root of
the items, so half the effect takes four times as many.

For paired 0/1 items SE follows from the share of items that only one of the two models gets right:
SE = sqrt(share / n). Before anything is measured that share is a guess: `DIFFERING`.

Left out: the luck of training. It can be told only from several seeds, and no number of items shrinks it.
"""

from __future__ import annotations

import math

from scipy import stats

POWER = 0.8
CONFIDENCE = 0.95

DIFFERING = 0.06
"""Share of 0/1 items that two models trained alike answer differently: of 0.5 to 7 % measured on
SmolLM2-135M and the quickstart's text (benchmarks/results/before_after.json), a high one."""

DOCUMENT_SD = {"fp32": 0.0023, "int8": 0.0105, "int4": 0.052}
"""By how much documents of 100 tokens differ in what the arms' difference in loss is on them: the standard
deviation in nats per token, measured in the same study. Rounding falls differently in each arm: that is what
most of it is at int4."""


def factor(power: float = POWER, confidence: float = CONFIDENCE) -> float:
    """Detectable effect in standard errors: 2.80 at the usual power and confidence."""
    return float(stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power))


def of_items(items: int, differing: float = DIFFERING) -> float:
    """The difference between two accuracies, in [0, 1], that so many paired items show."""
    return min(1.0, factor() * math.sqrt(differing / items))


def of_documents(documents: int, precision: str) -> float:
    """The difference in held-out loss, nats per token, that so many documents show."""
    return factor() * DOCUMENT_SD[precision] / math.sqrt(documents)


def items_for(effect: float, differing: float = DIFFERING) -> int:
    """Paired 0/1 items that it takes to see a difference of `effect`."""
    return math.ceil(differing * (factor() / effect) ** 2)
