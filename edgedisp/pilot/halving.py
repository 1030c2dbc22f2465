"""The rule of a pilot: what a setting does, in words, and who goes on to the next rung.

Two differences to the baseline are judged, each with a paired 95 % interval: the held-out loss (nats per
token) and the mean cosine of token vectors over all layers. A difference COUNTS if its interval lies on one
side of 0 and it is no smaller than a floor. The floor is needed because twins share text, order and start:
their paired intervals are so narrow that differences of no use to anybody are told apart from 0.

The better half of a rung goes on. The order:

1. What lowers the loss, and that counts: the lowest first.
2. Ties, whose loss did not move: what moved the mean cosine down furthest first.
3. What hurts (the loss rose, and that counts): the least harmful first. It goes on where places are left, as
   the price of a dispersion loss can shrink with longer training.
4. What diverged, which never goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgedisp.pilot.candidates import half

LOSS_FLOOR = 0.005
"""Nats per token: half a percent of perplexity."""

COSINE_FLOOR = 0.005
"""Of the mean cosine. For scale: it is 0.54 in SmolLM2-135M, where 80,000 tokens changed it by 0.017 at
weight 1, and at weight 0.1 by 0.001, which is to be called nothing."""

NOTHING, HURTS, DIVERGES = "nothing measurable", "hurts", "diverges"
WORDS = {
    ("down", "down"): "disperses, loss better",
    ("down", "still"): "disperses, loss unchanged",
    ("still", "down"): "loss better, not dispersed",
    ("still", "still"): NOTHING,
    ("up", "down"): "condenses, loss better",
    ("up", "still"): "condenses, loss unchanged",
}
"""(cosine, loss) -> what the setting does. A loss that went up is `hurts`, whatever the cosine did."""


@dataclass(frozen=True)
class Difference:
    """Candidate - baseline, with the ends of its interval; they are None where there is none."""

    value: float
    low: float | None
    high: float | None

    def moved(self, floor: float) -> str:
        """`down`, `up`, or `still` where the difference does not count."""
        if self.low is None or self.high is None or abs(self.value) < floor:
            return "still"
        return "down" if self.high < 0 else "up" if self.low > 0 else "still"


@dataclass(frozen=True)
class Judged:
    """How a candidate fared in a rung; without differences if its training diverged."""

    name: str
    loss: Difference | None
    cosine: Difference | None

    @property
    def effect(self) -> str:
        """What the setting does, in words."""
        if self.loss is None or self.cosine is None:
            return DIVERGES
        loss = self.loss.moved(LOSS_FLOOR)
        return HURTS if loss == "up" else WORDS[self.cosine.moved(COSINE_FLOOR), loss]


def ranked(rung: Sequence[Judged]) -> list[Judged]:
    """Best first; equals stay in the order given."""
    return sorted(rung, key=_rank)


def survivors(rung: Sequence[Judged]) -> list[str]:
    """Names of those that go on, best first: half, rounded up, or fewer if too many diverged."""
    going = [judged.name for judged in ranked(rung) if judged.effect != DIVERGES]
    return going[: half(len(rung))]


def _rank(judged: Judged) -> tuple[int, float]:
    if judged.loss is None or judged.cosine is None:
        return 3, 0.0
    place = {"down": 0, "still": 1, "up": 2}[judged.loss.moved(LOSS_FLOOR)]
    return place, judged.cosine.value if place == 1 else judged.loss.value
