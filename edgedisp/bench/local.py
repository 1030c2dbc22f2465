"""This machine's CPU: the runner is started by the Python that runs this program."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgedisp.bench import machine
from edgedisp.bench.devices import Address, Wanted
from edgedisp.bench.host import Host
from edgedisp.bench.timing import Timed
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress


class Local(Host):
    """This machine, with the runner program at `runner`."""

    name = "local"

    def __init__(self, runner: Path) -> None:
        if not runner.is_file():
            raise BadInput(f"{runner}: the runner program is missing; install edgedisp again")
        self.runner = runner

    def describe(self) -> dict[str, Any]:
        return machine.describe()

    def readings(self) -> dict[str, float | None]:
        return machine.readings()

    def place(self, bundles: Mapping[str, Path], progress: Progress) -> None:
        """Everything is here already."""

    def command(self, bundle: Path, options: Sequence[str]) -> list[str]:
        return [sys.executable, str(self.runner), *options, str(bundle)]


@contextmanager
def opened(address: Address, bundles: Mapping[str, Path], wanted: Wanted) -> Iterator[Timed]:
    """This machine as a device; see `devices.py`."""
    yield Timed(Local(wanted.runner), bundles, wanted)
