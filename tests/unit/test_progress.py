"""Progress lines on stderr: the time left is that of the part that is being done."""

from __future__ import annotations

import pytest

from edgedisp.core import progress as console


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock: its last entry is now."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[-1])
    return now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_time_left_is_told_by_the_speed_so_far(
    times: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.Screen("a build") as screen:
        screen.started("train", 1, 2)
        screen.progress(0, 100, "")
        times.append(20.0)
        screen.progress(10, 100, "loss 2.5")
    assert lines(capsys)[-1] == "[ 1/2] train: 10/100, loss 2.5, 3:00 left"


def test_a_resumed_stage_counts_what_it_did_itself(
    times: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.Screen("a build") as screen:
        screen.started("train", 1, 2)
        screen.progress(50, 100, "")
        times.append(20.0)
        screen.progress(60, 100, "")
    assert lines(capsys)[-1] == "[ 1/2] train: 60/100, 1:20 left"


def test_the_next_part_of_a_stage_has_a_clock_of_its_own(
    times: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with console.Screen("a build") as screen:
        screen.started("bits", 1, 2)
        for second in range(0, 1000, 100):
            times.append(float(second))
            screen.progress(second // 100 + 1, 10, "first")
        screen.progress(1, 10, "second")
        times.append(times[-1] + 20.0)
        screen.progress(2, 10, "second")
    assert lines(capsys)[-1] == "[ 1/2] bits: 2/10, second, 2:40 left"
