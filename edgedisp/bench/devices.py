"""Devices by name: what `--device` accepts, and which module knows each kind.

A kind's module has `connect(address, bundles, options)`, a context manager: it reaches the device, refuses
what cannot work there (BadInput), and gives a `Device`. Its `measure(progress)` returns one JSON object:

    device      as the user named it
    machine     {cpu, architecture, features [], physical_cores, memory_bytes, system ...}, what is known
    rows        one for each bundle, see results.summarize_bundle; None or absent: the device does not tell
    answers     where `BenchOptions.requests` asked for scores: bundle -> items answered
    warnings    [] what to beware of on this device as a whole

docs/devices.md says what each figure means.
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
from typing import Any, Literal
from urllib.parse import urlsplit

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress

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
    def measure(self, progress: Progress) -> dict[str, Any]:
        """Time the bundles, then score. Raises DeviceLost where it goes away in the middle."""


class DeviceLost(BuildFailed):
    """The device went away in the middle; `partial` is the result so far, with `lost` saying why."""

    def __init__(self, message: str, partial: dict[str, Any]) -> None:
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
    """Take a device's name apart. Raises BadInput with what would work."""
    text = name.strip()
    kind, colon, rest = text.partition(":")
    if kind not in FORMS:
        guess = difflib.get_close_matches(kind.lower(), FORMS, n=1, cutoff=0.5)
        meant = f"did you mean '{FORMS[guess[0]]}'? " if guess else ""
        raise BadInput(f"--device {name!r}: is not known; {meant}(choices: {CHOICES})")
    if kind == "adb":  # a serial may hold colons, as in adb:127.0.0.1:5555, and may not look like an option
        if colon and not re.fullmatch(r"[A-Za-z0-9_\[][\w.:%\[\]-]*", rest, re.ASCII):
            raise BadInput(f"--device {text!r}: {rest!r} is not a serial; write {FORMS[kind]}")
        return Address(text, kind, serial=rest or None)
    if kind == "ssh":
        if len(rest) < 3 or not rest.startswith("//"):
            raise BadInput(f"--device {name!r}: no device is named; write {FORMS[kind]}")
        return _parse_ssh(text)
    if colon:
        raise BadInput(f"--device {name!r}: takes no address; write {FORMS[kind]}")
    return Address(text, kind)


def _parse_ssh(text: str) -> Address:
    """ssh://[USER@]HOST[:PORT]; an IPv6 address in brackets. Nothing in it may look like an option."""
    form = FORMS["ssh"]
    try:
        parts = urlsplit(text)
        host, port, user = parts.hostname, parts.port, parts.username
    except ValueError as error:
        raise BadInput(f"--device {text!r}: {error}; write {form}") from error
    if parts.password is not None:
        raise BadInput(f"--device {text!r}: passwords are not taken; use a key, and write {form}")
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise BadInput(f"--device {text!r}: has more than an address; write {form}")
    if not host or user == "":
        raise BadInput(f"--device {text!r}: no host, or an empty user, is named; write {form}")
    # urlsplit lowers the host's letters, and the names in a user's configuration may have capitals.
    shown = re.search(re.escape(host), text.rpartition("@")[2], re.IGNORECASE)
    host = shown.group(0) if shown else host
    for part in (host, user):
        if part is not None and not re.fullmatch(r"[\w.:%][\w.:%+-]*", part):
            raise BadInput(f"--device {text!r}: {part!r} is not a name; write {form}")
    return Address(text, "ssh", host, user, port)


def parse_all(names: list[str]) -> list[Address]:
    """All devices of one command. Raises BadInput where none is named, or one is named twice."""
    if not names:
        raise BadInput(f"no device is named; --device takes one of {CHOICES}")
    addresses = [parse(name) for name in names]
    for address in addresses:
        if addresses.count(address) > 1:
            raise BadInput(f"--device {address.name}: is named twice; once is enough")
    return addresses
