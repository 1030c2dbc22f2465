"""One option for each item at a bounded total cost: the multiple-choice knapsack, over plain numbers.

An item is a weight; its options are grids and methods, their cost is bytes and their loss KL divergence (or
the other way round, for the smallest file at a bounded loss). Losses add up over items.

Raising all items along their lower convex hulls, always by the step of most loss per cost, passes through
 every solution of the Lagrangian relaxation (`frontier`); each is optimal for its own cost (Sinha and
Zoltners 1979). What a budget leaves between two of them is filled greedily, also with options off the hulls.
So the loss exceeds the least possible one by less than the largest gain of a single step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """What one choice for an item costs and loses."""

    cost: float
    loss: float


@dataclass(frozen=True)
class Solution:
    """`picks[i]` is the index of item i's option; cost and loss are the totals."""

    picks: tuple[int, ...]
    cost: float
    loss: float


Items = Sequence[Sequence[Option]]


def hull(options: Sequence[Option]) -> list[int]:
    """Indices of the lower convex hull from the cheapest option on: cost rises, loss falls ever slower."""

    def is_above(first: int, middle: int, last: int) -> bool:
        """Whether `middle` lies on or above the line from `first` to `last`."""
        a, b, c = options[first], options[middle], options[last]
        return (a.loss - b.loss) * (c.cost - a.cost) <= (a.loss - c.loss) * (b.cost - a.cost)

    line: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: (options[index].cost, options[index].loss)):
        if line and options[index].loss >= options[line[-1]].loss:
            continue  # costs as much or more, and loses no less
        while len(line) > 1 and is_above(line[-2], line[-1], index):
            line.pop()
        line.append(index)
    return line


def frontier(items: Items) -> list[Solution]:
    """From the cheapest solution to the one with the least loss, every one optimal for its cost."""
    hulls = [hull(options) for options in items]
    steps = []
    for item, line in enumerate(hulls):
        for place, (before, after) in enumerate(pairwise(line), start=1):
            low, high = items[item][before], items[item][after]
            steps.append((-(low.loss - high.loss) / (high.cost - low.cost), item, place))
    picks = [line[0] for line in hulls]
    solutions = [solution(items, picks)]
    for _, item, place in sorted(steps):
        picks[item] = hulls[item][place]
        solutions.append(solution(items, picks))
    return solutions


def least_loss(items: Items, budget: float) -> Solution | None:
    """The least loss at a total cost of at most `budget`; None if even the cheapest is above it."""
    within = [point for point in frontier(items) if point.cost <= budget]
    return _fill(items, within[-1], budget) if within else None


def least_cost(items: Items, limit: float) -> Solution | None:
    """The least cost at a total loss of at most `limit`; None if even the least loss is above it."""
    swapped = [[Option(option.loss, option.cost) for option in options] for options in items]
    cheapest = least_loss(swapped, limit)
    return None if cheapest is None else solution(items, cheapest.picks)


def solution(items: Items, picks: Sequence[int]) -> Solution:
    """The totals of `picks`."""
    picked = [options[pick] for options, pick in zip(items, picks, strict=True)]
    return Solution(tuple(picks), sum(one.cost for one in picked), sum(one.loss for one in picked))


def _fill(items: Items, current: Solution, budget: float) -> Solution:
    """Single options exchanged for better ones while the budget lasts, the largest gain first."""
    while True:
        gains = []
        for item, options in enumerate(items):
            old = options[current.picks[item]]
            for index, new in enumerate(options):
                if old.loss > new.loss and current.cost - old.cost + new.cost <= budget:
                    gains.append((new.loss - old.loss, new.cost, item, index))
        if not gains:
            return current
        _, _, item, index = min(gains)
        better = solution(items, [*current.picks[:item], index, *current.picks[item + 1 :]])
        if not (better.loss < current.loss and better.cost <= budget):
            return current  # a gain below the precision of the totals
        current = better
