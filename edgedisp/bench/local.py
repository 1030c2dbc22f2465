"""This machine's CPU: the runner is started by the Python that runs this program."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgedisp.bench.devices import Address, BenchOptions
from edgedisp.bench.interleaved_timing import Host, TimedHost
from edgedisp.bench.system import describe
from edgedisp.bench.worker import RUNNER


class Local(Host):
    """This machine."""

    def __init__(self, runner: Path = RUNNER) -> None:
        self.name, self.runner, self.machine = "local", runner, describe()

    def command(self, bundle: Path, options: Sequence[str]) -> list[str]:
        return [sys.executable, str(self.runner), *options, str(bundle)]


@contextmanager
def connect(address: Address, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[TimedHost]:
    """This machine as a device; see `devices.py`."""
    yield TimedHost(Local(), bundles, options)
