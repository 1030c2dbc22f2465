"""Timing in turns: the order, the rows, memory, and workers that die, hang or are interrupted."""

from __future__ import annotations

import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundle import RUNNER, Bundles, copy_with, order

from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.interleaved_timing import (
    Local,
    expected_memory_bytes,
    group_by_memory,
    thread_counts,
    turns,
)
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import from_json, to_json
from edgedisp.core.progress import silent
from edgedisp.core.results import DeviceResult


def quick(bundles: Bundles, runner: Path = RUNNER, progress: Any = silent, **options: Any) -> DeviceResult:
    sizes = {"prompt": 6, "generate": 5, "repetitions": 2, "threads": 1, **options}
    return Local(bundles, BenchOptions(**sizes), runner).measure(progress)


def workers() -> list[psutil.Process]:
    """Runner processes that this process has started and that live."""
    return [p for p in psutil.Process().children() if RUNNER.name in " ".join(p.cmdline())]


def gone() -> bool:
    """No worker is left, or the last one is just ending."""
    deadline = time.monotonic() + 5
    while workers() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not workers()


THREADS = "intra_op_num_threads"
LABELS = {"fp32": "baseline/x", "twin": "twin/x", "int4": "other/x"}


@pytest.fixture(scope="module")
def timed(bundles: Bundles) -> DeviceResult:
    return quick({label: bundles[name] for name, label in LABELS.items()}, repetitions=3)


def test_turns_are_reversed_every_second_round(timed: DeviceResult) -> None:
    a, b, c = LABELS.values()
    assert order(timed) == [a, b, c, c, b, a, a, b, c]
    assert [r["turn"] for r in timed.repetitions] == list(range(9))


@given(st.integers(1, 5), st.integers(0, 4))
def test_after_an_even_number_of_rounds_all_labels_met_the_same_mean_turn(count: int, half: int) -> None:
    sums: dict[str, int] = {}
    for turn, (_, label) in enumerate(turns([str(i) for i in range(count)], 2 * half)):
        sums[label] = sums.get(label, 0) + turn
    assert len(set(sums.values())) <= 1


def test_rows_are_medians_of_their_own_repetitions(timed: DeviceResult) -> None:
    assert [row.label for row in timed.rows] == [*LABELS.values()]
    for row in timed.rows:
        repetitions = [turn for turn in timed.repetitions if turn["label"] == row.label]
        assert row.repetitions == len(repetitions) == 3
        for name in ("ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s"):
            estimate = getattr(row, name)
            assert estimate.value == statistics.median([turn[name] for turn in repetitions])
        for turn in repetitions:
            assert turn["decode_tokens_per_s"] == pytest.approx(1000 * 4 / sum(turn["token_ms"]))
    fp32, _, int4 = timed.rows
    assert int4.bytes_read_per_token < fp32.bytes_read_per_token < fp32.weights_bytes  # type: ignore[operator]
    for row in (fp32, int4):
        bandwidth = row.bytes_read_per_token * row.decode_tokens_per_s.value / 1e9  # type: ignore
        assert row.bandwidth_gb_per_s == pytest.approx(bandwidth)
        assert row.bandwidth_share == pytest.approx(bandwidth / timed.machine["memory_gb_per_s"])


def test_arms_are_checked_for_one_graph_and_the_result_survives_json(timed: DeviceResult) -> None:
    arms, precisions = timed.pairs
    # three repetitions are too few to call a difference real
    assert arms["same_graph"] and arms["fault"] is None and arms["decode"]["differs"] is None
    assert "different graphs" in precisions["fault"]
    assert from_json(DeviceResult, json.loads(json.dumps(to_json(timed), allow_nan=False))) == timed
    assert timed.machine["physical_cores"] >= 1 and timed.options["groups"] == [[*LABELS.values()]]


def test_bundles_are_open_together_or_in_turn_and_progress_counts_steps(bundles: Bundles) -> None:
    for memory_bytes, groups, count in (
        (None, [["fp32", "twin", "int4"]], 3),
        (expected_memory_bytes(bundles["fp32"]) + 1, [["fp32"], ["twin"], ["int4"]], 1),
    ):
        steps: list[tuple[int, int]] = []
        alive: list[int] = []

        def progress(done: int, total: int, note: str, steps: Any = steps, alive: Any = alive) -> None:
            steps.append((done, total))
            alive.append(len(workers()))

        result = quick(bundles, memory_bytes=memory_bytes, progress=progress)
        assert result.options["groups"] == groups and max(alive) == count and gone()
        assert steps == [(step, 9) for step in range(1, 10)]


def test_bundles_of_equal_size_stay_together_when_memory_is_short(tmp_path: Path) -> None:
    sizes = {"a-fp32": 500, "a-int4": 90, "b-fp32": 500, "b-int4": 90}
    folders = {label: tmp_path / label for label in sizes}
    for label, folder in folders.items():
        folder.mkdir()
        with (folder / "model.onnx").open("wb") as file:
            file.truncate(sizes[label] << 20)  # sparse: takes no disk
    fp32 = expected_memory_bytes(folders["a-fp32"])
    assert fp32 == (256 << 20) + int(1.6 * (500 << 20))
    for memory_bytes, groups in (
        (None, [list(sizes)]),
        (2 * fp32, [["a-fp32", "b-fp32"], ["a-int4", "b-int4"]]),
        (fp32, [["a-fp32"], ["b-fp32"], ["a-int4", "b-int4"]]),
    ):
        assert group_by_memory(folders, memory_bytes) == groups


def test_a_worker_that_is_killed_ends_the_others_and_leaves_what_was_timed(bundles: Bundles) -> None:
    def measure(label: str, steps: int) -> DeviceResult:
        def kill(done: int, total: int, note: str) -> None:
            if done == steps:
                next(p for p in workers() if str(bundles[label]) in p.cmdline()).kill()

        return quick(bundles, repetitions=3, progress=kill)

    with pytest.raises(BuildFailed, match="fp32: the measuring process ended with code -9"):
        measure("fp32", 3)  # all loaded, nothing timed yet
    assert gone()
    partial = measure("twin", 3 + 2)
    assert order(partial) == ["fp32", "twin", "int4", "int4"]
    assert {row.label: row.repetitions for row in partial.rows} == {"fp32": 1, "twin": 1, "int4": 2}
    assert re.match(r"twin: .* code -9", str(partial.lost)) and gone()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("print('out of memory', file=sys.stderr)\nsys.exit(9)", r"a: .* code 9:\nout of memory"),
        ("time.sleep(60)", "no answer within 0.5 s"),
        ("print('hello', flush=True)\ntime.sleep(60)", "not an answer: b'hello"),
    ],
)
def test_a_worker_that_ends_or_hangs_is_an_error(
    bundles: Bundles, tmp_path: Path, text: str, reason: str
) -> None:
    runner = tmp_path / RUNNER.name
    runner.write_text("import sys, time\n" + text)
    with pytest.raises(BuildFailed, match=reason):
        quick({"a": bundles["fp32"]}, runner, timeout_s=0.5)
    assert gone()


def test_a_bundle_that_cannot_be_timed_is_bad_input(bundles: Bundles, tmp_path: Path) -> None:
    headless = copy_with(bundles["fp32"], tmp_path / "h", model__decoder__head_size=None)
    for named, prompt, message in (
        ({"a": bundles["fp32"]}, 300, "context is 256"),
        ({"a": headless}, 6, r"a: .*code 2:\nerror: .*head_size"),
    ):
        with pytest.raises(BadInput, match=message):
            quick(named, prompt=prompt)


def test_a_sweep_tries_counts_and_times_the_fastest(bundles: Bundles) -> None:
    assert thread_counts(1, 2) == [1, 2] and thread_counts(4, 8) == [1, 2, 3, 4, 8]
    assert thread_counts(64, 128) == [*range(1, 9), 16, 32, 64, 128]
    host = Local({"a": bundles["fp32"]}, BenchOptions(4, 4, 1, threads="sweep"))
    host.machine |= {"physical_cores": 2, "logical_cpus": 4}
    result = host.measure()
    rows = result.sweeps["a"]
    assert [row.threads for row in rows] == [1, 2, 4]
    best = max(rows, key=lambda row: row.decode_tokens_per_s.value)  # type: ignore
    assert result.rows[0].threads == best.threads


def test_threads_of_the_bundle_are_the_default(bundles: Bundles, tmp_path: Path) -> None:
    session = {THREADS: 3, "log_id": "x"}
    three = copy_with(bundles["int4"], tmp_path / "three", model__decoder__session_options=session)
    result = quick({"three": three, "plain": bundles["twin"]}, threads=None)
    assert [row.threads for row in result.rows] == [3, physical_cores()]
    assert quick({"three": three}, threads=1).rows[0].threads == 1
    for wrong in ("3", -1, 10**7):
        many = copy_with(three, tmp_path / str(wrong), model__decoder__session_options={THREADS: wrong})
        with pytest.raises(BadInput, match=rf"asks for {wrong!r} threads; export it again"):
            quick({"many": many}, threads=None)


def test_items_are_scored_after_the_timing_and_kept_when_the_worker_is_killed(bundles: Bundles) -> None:
    items = [[([3, 4, 5], [9, 10]), ([3, 4, 5], [11])]] * 3

    def kill(done: int, total: int, note: str) -> None:
        if note == "fp32: scored" and done == 2:
            workers()[0].kill()

    host = Local(bundles, BenchOptions(4, 4, 1, threads=1, requests={"fp32": items}))
    answers = host.measure().answers["fp32"]
    assert len(answers) == 3 and [len(item) for item in answers] == [2, 2, 2]
    lost = host.measure(kill)
    assert lost.lost and lost.answers == {"fp32": answers[:2]} and len(lost.rows) == 3
