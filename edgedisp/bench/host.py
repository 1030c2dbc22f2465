"""A machine that bundles can be timed on: what it is, what it is doing, and a pipe to the runner there.

Everything else (turns, drift, pairs, rows) is one piece of code for all of them, `timing.py`. A new kind of
machine with a Python on it is a `Host` of its own in one file and one line in `devices.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedisp.core.progress import Progress


class Host(ABC):
    """One machine, reached and ready. Where it needs closing, whoever opens it gives a context manager."""

    name: str
    """As it is shown: `local`, `ssh://pi@192.0.2.7`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The machine, as `machine.describe` gives it."""

    @abstractmethod
    def readings(self) -> dict[str, float | None]:
        """What the machine is doing now, as `hardware.readings` gives it. Not asked for during a run."""

    @abstractmethod
    def command(self, bundle: Path, options: Sequence[str]) -> list[str]:
        """The program to start HERE whose standard streams are those of the runner THERE, for `bundle`.

        `bundle` is the folder on this machine, `options` the runner's. The program's exit code is the
        runner's.
        """

    @abstractmethod
    def place(self, bundles: Mapping[str, Path], progress: Progress) -> None:
        """Put there what the runner needs and is not there yet."""
