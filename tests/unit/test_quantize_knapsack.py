"""The knapsack against every combination there is."""

from __future__ import annotations

import itertools

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
