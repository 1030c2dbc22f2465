"""Devices: what `--device` accepts, and the module of each kind.

A kind's module has `connect(address, bundles, options)`, a context manager that gives a `Device` or raises
BadInput.
"""

from __future__ import annotations

import difflib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.core.results import DeviceResult

FORMS = {"local": "local", "ssh": "ssh://USER@HOST[:PORT]", "adb": "adb[:SERIAL]", "browser": "browser"}
"""Kind, which is also the name of its module here -> how it is written."""
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
        """Time the bundles, then score. Raises DeviceLost where it goes away in the middle."""


class DeviceLost(BuildFailed):
    """The device went away in the middle; `partial` is the result so far, with `lost` saying why."""

    def __init__(self, message: str, partial: DeviceResult) -> None:
        super().__init__(message)
        self.partial = partial


def connect(
    address: Address, bundles: Mapping[str, Path], options: BenchOptions
) -> AbstractContextManager[Device]:
    """Reach a device; its module is imported now. Raises BadInput where it cannot be used."""
    module = import_module(f"edgedisp.bench.{address.kind}")
    device: AbstractContextManager[Device] = module.connect(address, bundles, options)
    return device


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


def _parse_ssh(text: str) -> Address:
    """ssh://[USER@]HOST[:PORT]; an IPv6 address in brackets. Nothing in it may look like an option."""
    try:
        parts = urlsplit(text)
        host, port, user = parts.hostname, parts.port, parts.username
    except ValueError as error:
        raise BadInput(f"--device {text!r}: {error}; write {FORMS['ssh']}") from error
    # urlsplit lowers the host's letters, and the names in a user's configuration may have capitals.
    shown = re.search(re.escape(host), text.rpartition("@")[2], re.IGNORECASE) if host else None
    host = shown.group(0) if shown else host
    names = [part for part in (host, user) if part is not None]
    fault = None
    if parts.password is not None:
        fault = "passwords are not taken; use a key"
    elif not host or user == "":
        fault = "no host, or an empty user, is named"
    elif parts.path.strip("/") or parts.query or parts.fragment:
        fault = "has more than an address"
    elif not all(re.fullmatch(r"[\w.:%][\w.:%+-]*", part) for part in names):
        fault = f"{' or '.join(map(repr, names))} is not a name"
    if fault:
        raise BadInput(f"--device {text!r}: {fault}; write {FORMS['ssh']}")
    return Address(text, "ssh", host or "", user, port)


def parse_all(names: list[str]) -> list[Address]:
    """All devices of one command. Raises BadInput where none is named, or one is named twice."""
    if not names:
        raise BadInput(f"no device is named; --device takes one of {CHOICES}")
    addresses = [parse(name) for name in names]
    for address in addresses:
        if addresses.count(address) > 1:
            raise BadInput(f"--device {address.name}: is named twice; once is enough")
    return addresses
