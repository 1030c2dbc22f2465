"""One option for each item, at a bounded total cost: the multiple-choice knapsack, over plain numbers.

An item is a weight, its options are grids and methods, the cost is bytes and the loss is KL divergence; or
the other way round, for the smallest file at a bounded loss. Losses are taken to add up over items.

Lagrangian relaxation: for a price per unit of cost, each item takes the option with the least loss + price *
cost. Options that win at some price form the item's lower convex hull. Raising all items along their hulls,
always by the step that lowers the loss most per unit of cost, passes through every solution of the relaxation
(`frontier`), and each of them is optimal for its own cost (Sinha and Zoltners 1979). Between two of them a
budget leaves a rest, smaller than one step. It is filled greedily, also with options off the hull.

So the loss found exceeds the least possible one by less than the largest gain of a single step; with a
hundred items and a budget of many steps that is far below what the losses themselves are known to.
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
    order = sorted(range(len(options)), key=lambda index: (options[index].cost, options[index].loss, index))
    found: list[int] = []
    for index in order:
        here = options[index]
        if found and here.loss >= options[found[-1]].loss:
            continue  # costs as much or more, and loses no less
        while len(found) > 1 and _bends_up(options[found[-2]], options[found[-1]], here):
            found.pop()
        found.append(index)
    return found


def _bends_up(first: Option, middle: Option, last: Option) -> bool:
    """Whether `middle` lies on or above the line from `first` to `last`."""
    gained = (first.loss - middle.loss) * (last.cost - first.cost)
    return gained <= (first.loss - last.loss) * (middle.cost - first.cost)


def frontier(items: Items) -> list[Solution]:
    """From the cheapest solution to the one with the least loss, every one optimal for its cost."""
    hulls = [hull(options) for options in items]
    steps = []
    for item, line in enumerate(hulls):
        for place, (before, after) in enumerate(pairwise(line), start=1):
            low, high = items[item][before], items[item][after]
            steps.append(((low.loss - high.loss) / (high.cost - low.cost), item, place))
    found = [solution(items, [line[0] for line in hulls])]
    picks = list(found[0].picks)
    for _, item, place in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        picks[item] = hulls[item][place]
        found.append(solution(items, picks))
    return found


def least_loss(items: Items, budget: float) -> Solution | None:
    """The least loss found at a total cost of at most `budget`; None if even the cheapest is above it."""
    within = [one for one in frontier(items) if one.cost <= budget]
    return _filled(items, within[-1], budget) if within else None


def least_cost(items: Items, limit: float) -> Solution | None:
    """The least cost found at a total loss of at most `limit`; None if even the least loss is above it."""
    turned = [[Option(option.loss, option.cost) for option in options] for options in items]
    found = least_loss(turned, limit)
    return None if found is None else solution(items, found.picks)


def solution(items: Items, picks: Sequence[int]) -> Solution:
    """The totals of `picks`."""
    chosen = [options[pick] for options, pick in zip(items, picks, strict=True)]
    return Solution(tuple(picks), sum(one.cost for one in chosen), sum(one.loss for one in chosen))


def _filled(items: Items, start: Solution, budget: float) -> Solution:
    """`start` with single options exchanged for better ones while the budget lasts, largest gain first."""
    now = start
    while True:
        best: tuple[float, float, int, int] | None = None
        for item, options in enumerate(items):
            held = options[now.picks[item]]
            for index, option in enumerate(options):
                gain = held.loss - option.loss
                fits = now.cost - held.cost + option.cost <= budget
                if gain > 0 and fits and (best is None or (gain, -option.cost) > best[:2]):
                    best = (gain, -option.cost, item, index)
        if best is None:
            return now
        picks = list(now.picks)
        picks[best[2]] = best[3]
        better = solution(items, picks)
        if not (better.loss < now.loss and better.cost <= budget):
            return now  # a gain below the precision of the totals
        now = better
