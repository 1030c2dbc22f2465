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


def test_the_time_left_follows_from_the_speed_of_the_part_that_is_being_done(
    times: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    def last_line() -> str:
        return capsys.readouterr().err.splitlines()[-1]

    with console.Screen("a build") as screen:
        screen.started("train", 1, 2)
        screen.progress(50, 100, "")  # a resumed stage counts what it did itself
        times.append(20.0)
        screen.progress(60, 100, "loss 2.5")
        assert last_line() == "[ 1/2] train: 60/100, loss 2.5, 1:20 left"
        screen.started("bits", 2, 2)
        for part, seconds in (("first", 1.0), ("second", 20.0)):  # each part has a clock of its own
            for step in range(1, 11):
                times.append(times[-1] + seconds)
                screen.progress(step, 10, part)
                if (part, step) == ("second", 2):
                    assert last_line() == "[ 2/2] bits: 2/10, second, 2:40 left"
