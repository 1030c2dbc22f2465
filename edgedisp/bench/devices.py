"""Devices: what `--device` accepts, how bundles are measured on all of them, and the module of each kind.

A kind's module has `connect(name, bundles, options)`, a context manager that gives a `Device` or raises
BadInput.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress
from edgedisp.core.results import DeviceResult

FORMS = {
    "local": "local",
    "llama_cpp": "llama.cpp",
    "ssh": "ssh://USER@HOST[:PORT]",
    "adb": "adb[:SERIAL]",
    "browser": "browser",
}
"""Kind -> how it is written."""
NAME = re.compile(  # no part may look like an option; an IPv6 address stands in brackets; no password
    r"(?P<local>local)|(?P<llama_cpp>llama\.cpp)|(?P<browser>browser)|(?P<adb>adb(:[A-Za-z0-9_\[][\w.:%\[\]-]*)?)"
    r"|(?P<ssh>ssh://([\w.%][\w.%+-]*@)?(\[[\w.:%]+\]|[\w.%][\w.%+-]*)(:\d{1,5})?)",
    re.ASCII,
)
MODULES = {kind: kind for kind in FORMS} | {"local": "interleaved_timing"}
MIB = 1 << 20

Item = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Requests of one item to score: (context ids, continuation ids)."""


@dataclass(frozen=True)
class DeviceTasks:
    """What is scored on devices after the timing: the first `items` of each task.

    text: documents for the held-out tasks; None: those of the run that the first bundle lies in. tasks_path:
    a folder of lm-eval tasks, whose Python runs if trust_task_code.
    """

    tasks: tuple[str, ...]
    items: int = 200
    text: Path | None = None
    tasks_path: Path | None = None
    trust_task_code: bool = False
    seed: int = 0


@dataclass(frozen=True)
class BenchOptions:
    """How bundles are timed, on every device.

    threads: None is the count written into a bundle, else the device's physical cores (a browser: 1); "sweep"
    finds the best count of each bundle first. remote_python: the program on the device. memory_bytes: what
    open bundles may take together; None: 80 % of what is available. tasks: what is scored, too; requests: its
    items, by bundle.
    """

    prompt: int = 128
    generate: int = 128
    repetitions: int = 5
    threads: int | Literal["sweep"] | None = None
    seed: int = 0
    warmup: int = 1
    pause_s: float = 0.0
    remote_python: str | None = None
    timeout_s: float = 900.0
    memory_bytes: int | None = None
    tasks: DeviceTasks | None = None
    requests: Mapping[str, Sequence[Item]] = field(default_factory=dict)


class Device(ABC):
    """A device that has been reached."""

    @abstractmethod
    def measure(self, progress: Progress) -> DeviceResult:
        """Time the bundles, then score. Raises BadInput for a bundle that cannot be timed.

        Where the device ends, is gone or silent for `timeout_s` in the middle, the result so far says why in
        `lost`; BuildFailed where nothing was timed.
        """


def connect(name: str, bundles: Mapping[str, Path], options: BenchOptions) -> AbstractContextManager[Device]:
    """Reach a device; its module is imported now. Raises BadInput where it cannot be used."""
    module = import_module(f"edgedisp.bench.{MODULES[kind_of(name)]}")
    device: AbstractContextManager[Device] = module.connect(name, bundles, options)
    return device


def kind_of(name: str) -> str:
    """The kind of device that a name stands for. Raises BadInput with what would work."""
    match = NAME.fullmatch(name)
    if match is not None:
        return next(kind for kind in FORMS if match[kind])
    guess = difflib.get_close_matches(name.partition(":")[0].lower(), FORMS, n=1, cutoff=0.5)
    meant = f"write '{FORMS[guess[0]]}' " if guess else ""
    raise BadInput(f"--device {name!r}: is no device; {meant}(choices: {', '.join(FORMS.values())})")


def external_program(device: str, variable: str, default: str, advice: str) -> tuple[str, ...]:
    """The words of the command in $`variable`, else `default`. BadInput where its program is missing."""
    words = tuple(shlex.split(os.environ.get(variable, default)))
    if not words or shutil.which(words[0]) is None:
        raise BadInput(f"{device}: there is no `{words[0] if words else f'${variable}'}` here; {advice}")
    return words


def check_memory(device: str, available: int | None, label: str, needed: int) -> None:
    """Raise BadInput where a bundle certainly does not fit into a device's free memory (None: not known)."""
    if available is not None and needed > available:
        raise BadInput(
            f"{device}: {available / MIB:.0f} MiB of memory are free there, and {label} takes at least "
            f"{needed / MIB:.0f}; a bundle of fewer bits takes less"
        )
