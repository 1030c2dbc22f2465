"""Devices: what `--device` accepts, how bundles are measured on all of them, and the module of each kind.

A kind's module has `connect(address, bundles, options)`, a context manager that gives a `Device` or raises
BadInput.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress
from edgedisp.core.results import DeviceResult

FORMS = {"local": "local", "ssh": "ssh://USER@HOST[:PORT]", "adb": "adb[:SERIAL]", "browser": "browser"}
"""Kind -> how it is written."""
MODULES = {"local": "interleaved_timing"}
"""Kind -> module, where they differ."""
CHOICES = ", ".join(FORMS.values())

Item = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Requests of one item to score: (context ids, continuation ids)."""


@dataclass(frozen=True)
class Address:
    """A device as the user named it, and its parts where its kind has them."""

    name: str
    kind: str
    host: str = ""
    user: str | None = None
    port: int | None = None
    serial: str | None = None


@dataclass(frozen=True)
class BenchOptions:
    """How bundles are timed, on every device.

    threads: None is the count written into a bundle, else the device's physical cores (a browser: 1); "sweep"
    finds the best count of each bundle first. setup: install what the device lacks. keep: leave bundles and
    packages there. remote_python: the program on the device. pairs: labels (baseline, other arm) that must
    have one graph. requests: items of each bundle to score when the timing is done. memory_bytes: what open
    bundles may take together; None: 80 % of what is available.
    """

    prompt: int = 128
    generate: int = 128
    repetitions: int = 5
    threads: int | Literal["sweep"] | None = None
    seed: int = 0
    warmup: int = 1
    pause_s: float = 0.0
    setup: bool = False
    keep: bool = False
    remote_python: str | None = None
    timeout_s: float = 900.0
    memory_bytes: int | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    requests: Mapping[str, Sequence[Item]] = field(default_factory=dict)


class Device(ABC):
    """A device that has been reached."""

    @abstractmethod
    def measure(self, progress: Progress) -> DeviceResult:
        """Time the bundles, then score.

        Where the device goes away in the middle, the result so far says why in `lost`; BuildFailed where
        nothing was timed.
        """


def connect(
    address: Address, bundles: Mapping[str, Path], options: BenchOptions
) -> AbstractContextManager[Device]:
    """Reach a device; its module is imported now. Raises BadInput where it cannot be used."""
    module = import_module(f"edgedisp.bench.{MODULES.get(address.kind, address.kind)}")
    device: AbstractContextManager[Device] = module.connect(address, bundles, options)
    return device


def external_program(device: str, variable: str, default: str, advice: str) -> tuple[str, ...]:
    """The words of the command in $`variable`, else `default`. BadInput where its program is missing."""
    words = tuple(shlex.split(os.environ.get(variable, default)))
    if not words or shutil.which(words[0]) is None:
        raise BadInput(f"{device}: there is no `{words[0] if words else f'${variable}'}` here; {advice}")
    return words


def parse(name: str) -> Address:
    """An address from its text. Raises BadInput with what would work."""
    text = name.strip()
    kind, colon, rest = text.partition(":")
    if kind not in FORMS:
        guess = difflib.get_close_matches(kind.lower(), FORMS, n=1, cutoff=0.5)
        meant = f"did you mean '{FORMS[guess[0]]}'? " if guess else ""
        raise BadInput(f"--device {name!r}: is not known; {meant}(choices: {CHOICES})")
    if kind == "ssh":
        return _parse_ssh(text)
    if kind == "adb":  # a serial may have colons, as in adb:127.0.0.1:5555, and may not look like an option
        if colon and not re.fullmatch(r"[A-Za-z0-9_\[][\w.:%\[\]-]*", rest, re.ASCII):
            raise BadInput(f"--device {text!r}: {rest!r} is not a serial; write {FORMS[kind]}")
        return Address(text, kind, serial=rest or None)
    if colon:
        raise BadInput(f"--device {name!r}: takes no address; write {FORMS[kind]}")
    return Address(text, kind)


SSH = re.compile(
    r"ssh://(?:(?P<user>[\w.%][\w.%+-]*)@)?(?:\[(?P<ipv6>[\w.:%]+)\]|(?P<host>[\w.%][\w.%+-]*))(?::(?P<port>\d+))?/?"
)


def _parse_ssh(text: str) -> Address:
    """Nothing in it may look like an option; an IPv6 address stands in brackets."""
    parts = SSH.fullmatch(text)
    port = int(parts["port"]) if parts and parts["port"] else None
    if parts is None or (port is not None and not 0 < port < 65536):
        raise BadInput(
            f"--device {text!r}: is no address; write {FORMS['ssh']}, without a password (use a key) or path"
        )
    return Address(text, "ssh", parts["ipv6"] or parts["host"], parts["user"], port)


def parse_all(names: list[str]) -> list[Address]:
    """All devices of one command. Raises BadInput where none is named, or one is named twice."""
    if not names:
        raise BadInput(f"no device is named; --device takes one of {CHOICES}")
    addresses = [parse(name) for name in names]
    for address, times in Counter(addresses).items():
        if times > 1:
            raise BadInput(f"--device {address.name}: is named twice; once is enough")
    return addresses
