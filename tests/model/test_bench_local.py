"""Timing in turns: the order, the rows, memory, and workers that die, hang or are interrupted."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import RUNNER, copy_with, tiny_bundles

from edgedisp.bench.devices import DeviceLost
from edgedisp.bench.local import Local
from edgedisp.bench.summary import FIGURES, warn_about_bits
from edgedisp.bench.timing import expected_memory_bytes, group_by_memory, measure, turns
from edgedisp.core.errors import BadInput, BuildFailed


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_bundles(tmp_path_factory.getbasetemp())


def quick(bundles: dict[str, Path], **options: Any) -> dict[str, Any]:
    chosen = {"prompt": 6, "generate": 5, "repetitions": 2, "threads": 1, **options}
    return measure(bundles, Local(chosen.pop("runner", RUNNER)), **chosen)


def workers() -> list[psutil.Process]:
    """Runner processes that this process has started and that live."""
    return [p for p in psutil.Process().children() if RUNNER.name in " ".join(p.cmdline())]


def gone() -> bool:
    """No worker is left, or the last one is just ending."""
    deadline = time.monotonic() + 5
    while workers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not workers()


@pytest.fixture(scope="module")
def timed(bundles: dict[str, Path]) -> dict[str, Any]:
    return quick(bundles, repetitions=3, pairs=[("fp32", "twin"), ("fp32", "int4")])


def test_turns_are_reversed_every_second_round(timed: dict[str, Any]) -> None:
    assert timed["order"] == ["fp32", "twin", "int4", "int4", "twin", "fp32", "fp32", "twin", "int4"]
    assert [r["turn"] for r in timed["repetitions"]] == list(range(9))


@given(st.integers(1, 5), st.integers(0, 4))
def test_after_an_even_number_of_rounds_all_labels_met_the_same_mean_turn(count: int, half: int) -> None:
    order = [label for _, label in turns([str(i) for i in range(count)], 2 * half)]
    places = {label: [i for i, other in enumerate(order) if other == label] for label in order}
    assert len({sum(p) for p in places.values()}) <= 1


def test_rows_are_medians_of_their_own_repetitions(timed: dict[str, Any]) -> None:
    assert [row["label"] for row in timed["rows"]] == ["fp32", "twin", "int4"]
    for row in timed["rows"]:
        own = [r for r in timed["repetitions"] if r["label"] == row["label"]]
        assert row["repetitions"] == len(own) == 3
        for name in FIGURES:
            assert row[name] == statistics.median([r[name] for r in own])
            assert row["spread"][name]["low"] <= row[name] <= row["spread"][name]["high"]
        for one in own:
            assert one["decode_tokens_per_s"] == pytest.approx(1000 * 4 / sum(one["token_ms"]))


def test_a_row_says_what_its_speed_means_in_memory_traffic(timed: dict[str, Any]) -> None:
    fp32, _, int4 = timed["rows"]
    assert (fp32["weight_bits"], int4["weight_bits"]) == (32, 4)
    assert int4["bytes_read_per_token"] < fp32["bytes_read_per_token"] < fp32["weights_bytes"]
    for row in (fp32, int4):
        bandwidth = row["bytes_read_per_token"] * row["decode_tokens_per_s"] / 1e9
        assert row["implied_bandwidth_gb_per_s"] == pytest.approx(bandwidth)


def test_the_cache_read_grows_with_prompt_and_answer(bundles: dict[str, Path], timed: dict[str, Any]) -> None:
    longer = quick({"fp32": bundles["fp32"]}, prompt=16, generate=9, repetitions=1)["rows"][0]
    per_position = 2 * 2 * 2 * 16 * 4
    more = (16 + 9 / 2) - (6 + 5 / 2)
    assert longer["bytes_read_per_token"] - timed["rows"][0]["bytes_read_per_token"] == per_position * more


def test_arms_are_checked_for_one_graph(timed: dict[str, Any]) -> None:
    arms, precisions = timed["pairs"]
    assert arms["same_graph"]["same"]
    assert arms["fault"] is None  # three repetitions are too few to call a difference real
    assert arms["decode"]["differs"] is None
    assert "different graphs" in precisions["fault"]


def test_the_result_is_plain_json_with_the_machine_in_it(timed: dict[str, Any]) -> None:
    again = json.loads(json.dumps(timed, allow_nan=False))
    assert again["machine"]["physical_cores"] >= 1
    assert again["options"]["threads"] == 1
    assert set(again["load_average"]) == {"before", "after"}


def test_no_worker_is_left_behind(bundles: dict[str, Path]) -> None:
    alive = []
    quick(bundles, progress=lambda done, total, note: alive.append(len(workers())))
    assert max(alive) == 3
    assert gone()


def test_progress_counts_loads_and_repetitions(bundles: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    quick({"a": bundles["fp32"]}, progress=lambda done, total, note: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_bundles_that_do_not_fit_together_are_open_one_after_another(bundles: dict[str, Path]) -> None:
    alive = []
    room = expected_memory_bytes(bundles["fp32"]) + 1
    found = quick(bundles, memory_bytes=room, progress=lambda *_: alive.append(len(workers())))
    assert found["groups"] == [["fp32"], ["twin"], ["int4"]]
    assert max(alive) == 1


def test_bundles_of_equal_size_stay_together_when_memory_is_short(tmp_path: Path) -> None:
    sizes = {"a-fp32": 500, "a-int4": 90, "b-fp32": 500, "b-int4": 90}
    made = {label: tmp_path / label for label in sizes}
    for label, folder in made.items():
        folder.mkdir()
        with (folder / "model.onnx").open("wb") as file:
            file.truncate(sizes[label] << 20)  # sparse: takes no disk
    mib = 1 << 20
    fp32, int4 = (expected_memory_bytes(made[f"a-{p}"]) for p in ("fp32", "int4"))
    assert fp32 == 256 * mib + int(1.6 * 500 * mib)
    assert group_by_memory(made, None) == [list(sizes)]
    assert group_by_memory(made, 2 * fp32 + 2 * int4) == [list(sizes)]
    assert group_by_memory(made, 2 * fp32) == [["a-fp32", "b-fp32"], ["a-int4", "b-int4"]]
    assert group_by_memory(made, fp32) == [["a-fp32"], ["b-fp32"], ["a-int4", "b-int4"]]


def test_a_worker_that_is_killed_fails_the_measurement_and_takes_the_others_along(
    bundles: dict[str, Path],
) -> None:
    def kill_the_second(done: int, total: int, note: str) -> None:
        if done == 3:  # all loaded, nothing timed yet
            next(p for p in workers() if str(bundles["twin"]) in p.cmdline()).kill()

    with pytest.raises(BuildFailed, match="twin: the measuring process ended with code -9"):
        quick(bundles, progress=kill_the_second)
    assert gone()


def test_what_was_timed_before_a_worker_died_is_kept(bundles: dict[str, Path]) -> None:
    def kill_the_second(done: int, total: int, note: str) -> None:
        if done == 3 + 2:
            next(p for p in workers() if str(bundles["twin"]) in p.cmdline()).kill()

    with pytest.raises(DeviceLost, match=r"local: lost in the middle: twin: .* code -9") as caught:
        quick(bundles, repetitions=3, pairs=[("fp32", "twin")], progress=kill_the_second)
    partial = caught.value.partial
    assert partial["order"] == ["fp32", "twin", "int4", "int4"]
    assert {row["label"]: row["repetitions"] for row in partial["rows"]} == {"fp32": 1, "twin": 1, "int4": 2}
    assert json.dumps(partial, allow_nan=False) and gone()


def test_a_cold_load_is_told_only_where_the_files_had_left_the_memory(timed: dict[str, Any]) -> None:
    for row in timed["rows"]:
        assert row["load_s"] > 0 and (row["load_cold_s"] is None or row["load_cold_s"] > 0)
    assert timed["warnings"] == ["3 repetitions are too few to tell a difference from chance; 5 or more can"]


def test_energy_is_the_counters_median_or_the_battery_of_a_bundle_alone() -> None:
    from edgedisp.bench.summary import _energy_j

    counted = [{"energy_j": value, "battery_j": None} for value in (3.0, 1.0, 2.0)]
    assert _energy_j(counted, alone=False) == 2.0
    drained = [{"energy_j": None, "battery_j": value} for value in (100.0, 97.0, 92.0)]
    assert _energy_j(drained, alone=True) == 4.0
    assert _energy_j(drained, alone=False) is None
    assert _energy_j([{"energy_j": None, "battery_j": None}] * 2, alone=True) is None


def test_an_interrupt_ends_the_workers(bundles: dict[str, Path]) -> None:
    def interrupt(done: int, total: int, note: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick(bundles, progress=interrupt)
    assert gone()


def program(path: Path, text: str) -> Path:
    path.write_text("import sys, time\n" + text)
    return path


def test_what_a_dying_worker_said_last_is_in_the_message(bundles: dict[str, Path], tmp_path: Path) -> None:
    dying = program(tmp_path / "r.py", "print('out of memory, sorry', file=sys.stderr)\nsys.exit(9)")
    with pytest.raises(BuildFailed, match=r"a: .* code 9:\nout of memory, sorry"):
        quick({"a": bundles["fp32"]}, runner=dying)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("time.sleep(60)", "no answer within 0.5 s"),
        ("print('hello', flush=True)\ntime.sleep(60)", "not JSON: 'hello'"),
        ('print(\'{"error": "no"}\', flush=True)\ntime.sleep(60)', "error"),
    ],
)
def test_a_worker_that_hangs_or_babbles_fails_and_is_ended(
    bundles: dict[str, Path], tmp_path: Path, text: str, reason: str
) -> None:
    with pytest.raises(BuildFailed, match=reason):
        quick({"a": bundles["fp32"]}, runner=program(tmp_path / RUNNER.name, text), timeout_s=0.5)
    assert gone()


def test_a_bundle_that_cannot_be_timed_is_bad_input(bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no bundle"):
        quick({})
    with pytest.raises(BadInput, match=r"a: .*holds no model\.onnx"):
        quick({"a": tmp_path})
    with pytest.raises(BadInput, match="runner program is missing"):
        quick({"a": bundles["fp32"]}, runner=tmp_path / "none.py")
    with pytest.raises(BadInput, match="b is not among the bundles"):
        quick({"a": bundles["fp32"]}, pairs=[("a", "b")])
    with pytest.raises(BadInput, match="context is 256"):
        quick({"a": bundles["fp32"]}, prompt=300)
    headless = copy_with(bundles["fp32"], tmp_path / "h", model__decoder__head_size=None)
    with pytest.raises(BadInput, match=r"a: .*code 2:\nerror: .*head_size"):
        quick({"a": headless})


def made_row(label: str, bits: int, low: float, high: float, layers: int = 2) -> dict[str, Any]:
    speed = {"median": (low + high) / 2, "low": low, "high": high}
    shape = {"layers": layers}
    return {
        "label": label,
        "weight_bits": bits,
        "shape": shape,
        "spread": {"decode_tokens_per_s": speed},
        "warnings": [],
    }


def test_fewer_bits_that_are_slower_get_a_warning() -> None:
    rows = [made_row("fp32", 32, 50, 55), made_row("int8", 8, 90, 99), made_row("int4", 4, 20, 30)]
    warn_about_bits(rows, {})
    assert [len(row["warnings"]) for row in rows] == [0, 0, 2]
    assert (
        "4-bit weights decode slower than the 8-bit ones of int8 (25.0 against 94.5" in rows[2]["warnings"][1]
    )


def test_overlapping_intervals_and_other_models_get_none() -> None:
    rows = [made_row("a", 32, 50, 55), made_row("b", 4, 40, 51), made_row("c", 4, 1, 2, layers=9)]
    warn_about_bits(rows, {})
    assert [row["warnings"] for row in rows] == [[], [], []]
