"""The knapsack against every combination there is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedisp.quantize.knapsack import Option, frontier, hull, least_cost, least_loss, solution

# Whole numbers add up exactly, so equality means equality.
OPTION = st.builds(Option, st.integers(0, 60).map(float), st.integers(0, 60).map(float))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def every(items: list[list[Option]]) -> list[tuple[float, float]]:
    """(cost, loss) of every combination."""
    return [
        (sum(option.cost for option in chosen), sum(option.loss for option in chosen))
        for chosen in itertools.product(*items)
    ]


def largest_step(items: list[list[Option]]) -> float:
    lines = [[options[index].loss for index in hull(options)] for options in items]
    return max((a - b for line in lines for a, b in itertools.pairwise(line)), default=0.0)


@settings(deadline=None)
@given(ITEMS)
def test_no_combination_beats_a_point_of_the_frontier(items: list[list[Option]]) -> None:
    combinations = every(items)
    points = frontier(items)
    for point in points:
        assert solution(items, point.picks) == point
        assert point.loss == min(loss for cost, loss in combinations if cost <= point.cost)
    assert points[0].cost == min(cost for cost, _ in combinations)
    assert points[-1].loss == min(loss for _, loss in combinations)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(points))


@settings(deadline=None)
@given(ITEMS, st.integers(0, 300))
def test_a_budget_is_held_and_the_loss_is_within_one_step_of_the_least(
    items: list[list[Option]], budget: int
) -> None:
    possible = [loss for cost, loss in every(items) if cost <= budget]
    found = least_loss(items, budget)
    if found is None:
        assert not possible
        return
    assert found.cost <= budget
    assert min(possible) <= found.loss <= min(possible) + largest_step(items)
    again = least_loss(items, budget)
    assert again == found


@settings(deadline=None)
@given(ITEMS, st.integers(0, 300))
def test_a_limit_on_the_loss_is_held_at_a_cost_near_the_least(items: list[list[Option]], limit: int) -> None:
    possible = [cost for cost, loss in every(items) if loss <= limit]
    found = least_cost(items, limit)
    if found is None:
        assert not possible
        return
    turned = [[Option(o.loss, o.cost) for o in options] for options in items]
    assert found.loss <= limit
    assert min(possible) <= found.cost <= min(possible) + largest_step(turned)


def test_what_is_left_of_a_budget_goes_to_options_off_the_hull() -> None:
    items = [[Option(0, 10), Option(6, 6), Option(10, 0)]]
    assert hull(items[0]) == [0, 2]
    found = least_loss(items, 7)
    assert found is not None and found.picks == (1,)


@pytest.mark.parametrize("seed", range(3))
def test_with_many_items_the_rest_is_small(seed: int) -> None:
    """120 items as a model has them: the relaxation's bound is met to a few thousandths."""
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(120):
        size, sensitivity = rng.integers(1, 9) * 1000, math.exp(rng.normal(0, 1.5))
        options = [(4.5, 1.0), (4.25, 1.15), (5.0, 0.9), (8.5, 0.004), (4.125, 1.4)]
        items.append([Option(size * bits, sensitivity * loss) for bits, loss in options])
    points = frontier(items)
    budget = (points[0].cost + points[-1].cost) / 2
    found = least_loss(items, budget)
    assert found is not None and found.cost <= budget
    after = next(point for point in points if point.cost > budget)
    before = [point for point in points if point.cost <= budget][-1]
    share = (budget - before.cost) / (after.cost - before.cost)
    bound = before.loss + share * (after.loss - before.loss)  # no solution can lie below the hull
    assert bound <= found.loss <= bound * 1.01
