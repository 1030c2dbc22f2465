"""Why fewer bits may be slower: a kernel that is missing, threads, heat."""

from __future__ import annotations

from typing import Any

import pytest

from edgedisp.bench.causes import causes, clock_fell_percent, missing_kernel
from edgedisp.bench.summary import arms_to_compare

X86 = {"architecture": "x86_64", "features": ["avx2", "fma"], "physical_cores": 4}
VNNI = {**X86, "features": ["avx2", "fma", "avx512_vnni"]}


@pytest.mark.parametrize(
    ("machine", "missing"),
    [
        (X86, "no VNNI"),
        (VNNI, None),
        ({**X86, "features": ["avx2", "avx_vnni"]}, None),
        ({"architecture": "aarch64", "features": ["neon"]}, "neither dotprod nor i8mm"),
        ({"architecture": "aarch64", "features": ["neon", "dotprod"]}, None),
        ({"architecture": "arm64", "features": ["dotprod"]}, None),
        ({"architecture": "x86_64", "features": []}, None),  # a system that tells nothing
        ({}, None),
    ],
)
def test_the_missing_kernel_is_named(machine: dict[str, Any], missing: str | None) -> None:
    found = missing_kernel(machine)
    assert found is None if missing is None else missing in str(found)


def test_all_known_causes_are_named() -> None:
    row = {"threads": 1, "clock_fell_percent": 30.0, "drift_percent": -20.0}
    said = causes(row, X86)
    assert "kernel missing" in said and "too few threads: 1 on 4 cores" in said
    assert "throttling: the clock fell by 30 %" in said
    slow = {"threads": 4, "clock_fell_percent": None, "drift_percent": -20.0}
    assert causes(slow, VNNI) == "throttling is likely: decode slowed down by 20 % over the repetitions"
    assert "too many threads: 8 on 4 cores" in causes({"threads": 8}, VNNI)


def test_without_a_known_cause_it_says_what_to_look_at() -> None:
    assert causes({"threads": 4}, VNNI).startswith("look for a missing kernel")


def test_the_fall_of_the_clock_is_that_from_first_to_last() -> None:
    assert clock_fell_percent([{"clock_mhz": 2000.0}, {"clock_mhz": 9.0}, {"clock_mhz": 1500.0}]) == 25.0
    assert clock_fell_percent([{"clock_mhz": None}, {"clock_mhz": 1500.0}]) is None


def test_arms_of_one_precision_are_compared_with_the_baseline() -> None:
    labels = ["baseline/int4", "dispersed/int4", "dispersed/int8", "other", "neftune/int4"]
    expected = [("baseline/int4", "dispersed/int4"), ("baseline/int4", "neftune/int4")]
    assert arms_to_compare(labels) == expected
