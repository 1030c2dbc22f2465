"""What can be seen: the formula against simulation, and its inverse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedisp.evaluate import power
from edgedisp.evaluate.statistics import mcnemar


def test_the_factor_is_the_textbooks() -> None:
    assert power.factor() == pytest.approx(2.8016, abs=1e-4)


def test_five_hundred_items_see_three_points_and_the_published_gain_takes_thousands() -> None:
    assert 100 * power.of_items(500) == pytest.approx(3.07, abs=0.01)
    assert power.items_for(0.007) == pytest.approx(9600, rel=0.01)


@given(st.integers(20, 10**6), st.floats(0.01, 0.5))
def test_items_for_an_effect_see_it(items: int, differing: float) -> None:
    effect = power.of_items(items, differing)
    if effect < 1:
        assert power.items_for(effect, differing) == pytest.approx(items, abs=1)


def test_the_detectable_difference_is_found_four_times_out_of_five() -> None:
    items, differing, repetitions = 2000, 0.1, 2000
    effect = power.of_items(items, differing)
    rng = np.random.default_rng(3)
    better, worse = (differing + effect) / 2, (differing - effect) / 2
    counts = rng.multinomial(items, [better, worse, 1 - differing], size=repetitions)
    found = np.mean([mcnemar(int(first), int(second)) <= 0.05 for first, second, _ in counts])
    assert found == pytest.approx(0.8, abs=0.02 + 3 * math.sqrt(0.16 / repetitions))
