"""Projected speeds: the bound of the bandwidth, times the shares of it that measured devices reached."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedisp import single
from edgedisp.bench.projection import Table, load_table, project, shares
from edgedisp.core.errors import BadInput
from edgedisp.core.paths import data_folder

TABLE = Table.model_validate(
    {
        "socs": [
            {"name": "Slow", "devices": "a", "bandwidth_gb_per_s": 10, "source": "a data sheet"},
            {"name": "Fast", "devices": "b", "bandwidth_gb_per_s": 50, "source": "a data sheet"},
        ],
        "measured": [
            {
                "soc": "Slow",
                "model": "m",
                "decode_tokens_per_s": 20,
                "bytes_read_per_token": 100_000_000,
                "source": "a benchmark",
            }
        ],
    }
)


def test_the_packaged_table_can_be_read_and_every_figure_has_a_source() -> None:
    table = load_table(data_folder("export") / "socs.yaml")
    assert len({soc.name for soc in table.socs}) == len(table.socs) >= 10
    assert all(0.05 < one["share"] < 0.6 for one in shares(table))  # more than a chip has is a wrong figure


def test_one_measured_device_gives_its_own_share() -> None:
    # 20 tokens/s x 100 MB = 2 GB/s of 10: a fifth. 50 GB/s / 200 MB = 250 tokens/s at most.
    fast, slow = project(200_000_000, TABLE)
    assert (fast["soc"], fast["bound"], fast["low"], fast["high"]) == pytest.approx(("Fast", 250, 50, 50))
    assert slow["bound"] == pytest.approx(50)


def test_own_measurements_widen_the_range_and_unknown_chips_tell_nothing() -> None:
    own = [
        {"soc": "Fast", "label": "x", "decode_tokens_per_s": 200, "bytes_read_per_token": 100_000_000},
        {"soc": "Other", "label": "y", "decode_tokens_per_s": 1, "bytes_read_per_token": 1},
    ]
    fast = project(200_000_000, TABLE, own)[0]
    assert (fast["low"], fast["high"]) == pytest.approx((50, 100))
    assert [one["source"] for one in shares(TABLE, own)] == ["a benchmark", "measured here"]


@given(st.integers(1, 10**10))
def test_a_projection_never_passes_the_bound(size: int) -> None:
    for row in project(size, TABLE):
        assert 0 < row["low"] <= row["high"] <= row["bound"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("socs: []\nmeasured: []", "socs"),
        (
            "socs: [{name: a, devices: b, bandwidth_gb_per_s: -1, source: a data sheet}]\nmeasured: []",
            "greater",
        ),
        ("socs: [{name: a, devices: b, bandwith: 1, source: a data sheet}]\nmeasured: []", "bandw"),
        ("[", "cannot be read"),
        (
            "socs: [{name: a, devices: b, bandwidth_gb_per_s: 1, source: a data sheet}]\nmeasured: [{soc: c, "
            "model: m, decode_tokens_per_s: 1, bytes_read_per_token: 1, source: a data sheet}]",
            "'c' is none of the socs",
        ),
    ],
)
def test_a_faulty_table_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "socs.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as found:
        load_table(path)
    assert str(path) in str(found.value)


def test_the_device_that_reads_the_fewest_bytes_is_projected_and_one_that_tells_none_is_not() -> None:
    read = [{"label": "a", "bytes_read_per_token": size} for size in (None, 200_000_000, 100_000_000)]
    found = single.project({"devices": [{"rows": [row]} for row in read]})
    table = load_table(data_folder("export") / "socs.yaml")
    assert found["bundles"] == {"a": project(100_000_000, table)}
    with pytest.raises(BadInput, match="--device local"):
        single.project({"devices": [{"rows": read[:1]}, {"logits": {}}]})
