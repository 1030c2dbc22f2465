"""Limits on the tests themselves: processor seconds by folder, and runtimes that must not be skipped.

`EDGEDISP_REQUIRE=chromium,node,sshd` turns a skip whose reason names one of them into a failure.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

LIMITS_S = {"unit": 5.0, "model": 60.0}
"""Folder -> processor seconds that one test may take, children included. Processor time, because a loaded
machine must not turn a test red."""

REQUIRED = [name for name in os.environ.get("EDGEDISP_REQUIRE", "").split(",") if name]


def _processor_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    folder = pyfuncitem.path.parent.name
    before, started = _processor_s(), time.perf_counter()
    result = yield
    seconds = min(_processor_s() - before, time.perf_counter() - started)
    if seconds > (limit := LIMITS_S.get(folder, float("inf"))):
        pytest.fail(f"took {seconds:.1f} s, the limit in {folder}/ is {limit:g} s")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        if missing := [name for name in REQUIRED if name in reason.lower()]:
            report.outcome = "failed"
            report.longrepr = f"EDGEDISP_REQUIRE names {', '.join(missing)}, but: {reason}"
    return report
