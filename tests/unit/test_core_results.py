"""Results survive JSON, and JSON of the wrong shape is refused with the place of the fault."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedisp.core.files import from_json, to_json
from edgedisp.core.results import Estimate, Seeds
from edgedisp.core.run import Run

FINITE = st.floats(allow_nan=False, allow_infinity=False)
LIMIT = st.none() | FINITE
SEEDS = st.none() | st.builds(Seeds, st.tuples(FINITE, FINITE))


@given(st.builds(Estimate, FINITE, LIMIT, LIMIT, p=LIMIT, seeds=SEEDS))
def test_an_estimate_survives_json(estimate: Estimate) -> None:
    assert from_json(Estimate, json.loads(json.dumps(to_json(estimate)))) == estimate


def test_a_figure_that_is_not_finite_becomes_null() -> None:
    assert to_json(Estimate(math.nan, -math.inf, 1.0))["value"] is None


def test_json_of_the_wrong_shape_is_refused_with_its_place() -> None:
    whole = {"name": "a", "arms": [], "precisions": []}
    training = {"training": {"x": {"steps": "many"}}}
    faults = {"dictionary": [], "arms": whole | {"arms": "b"}, "training.x.steps": whole | training}
    for place, data in faults.items():
        with pytest.raises(ValueError, match=place):
            from_json(Run, data)


def test_a_difference_excludes_zero_only_with_both_ends_on_one_side() -> None:
    assert Estimate(1.0, 0.1, 2.0).excludes_zero and Estimate(-1.0, -2.0, -0.1).excludes_zero
    assert not Estimate(1.0, -0.1, 2.0).excludes_zero and not Estimate(1.0).excludes_zero
