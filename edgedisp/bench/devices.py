"""Devices by name: what `--device` accepts, and which file knows each kind.

A kind's module has `opened(address, bundles, wanted)`, a context manager: it reaches the device, refuses what
cannot work there (BadInput), and gives an object whose `measure(progress)` returns one JSON object:

    device      as the user named it; kind: local, ssh, adb ...
    machine     {cpu, architecture, features [], physical_cores, memory_bytes, system ...}, what is known
    rows        one for each bundle: {label, threads, prompt, generate, repetitions, load_s, load_cold_s,
                ttft_ms, prefill_tokens_per_s, decode_tokens_per_s, token_ms_p50, token_ms_p90,
                peak_memory_bytes, proportional_memory_bytes, energy_j, weights_bytes, bytes_read_per_token,
                implied_bandwidth_gb_per_s, spread {figure: {low, high}}, drift_percent, warnings []};
                None or absent: the device does not tell
    logits      instead of rows, where nothing is timed (an emulated processor)
    answers     where `Wanted.requests` asked for scores: {bundle: items answered}; see scoring.py
    warnings    [] what to beware of on this device as a whole

A device that is lost in the middle raises `DeviceLost`, which holds what was measured until then.
docs/devices.md says what each figure means.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress


@dataclass(frozen=True)
class Kind:
    """One kind of device: its module, how it is written, and whether it times anything."""

    module: str
    form: str
    times: bool = True


KINDS = {
    "local": Kind("edgedisp.bench.local", "local"),
    "ssh": Kind("edgedisp.bench.ssh", "ssh://USER@HOST[:PORT]"),
    "adb": Kind("edgedisp.bench.adb", "adb[:SERIAL]"),
    "browser": Kind("edgedisp.bench.browser", "browser"),
    "arm64-emulated": Kind("edgedisp.bench.arm64_emulated", "arm64-emulated", times=False),
}
WITH_ADDRESS = {"ssh"}  # written KIND://ADDRESS
WITH_SERIAL = {"adb"}  # written KIND or KIND:SERIAL


@dataclass(frozen=True)
class Address:
    """A device as the user named it, taken apart; `user`, `host` ... where its kind has them."""

    name: str
    kind: str
    host: str = ""
    user: str | None = None
    port: int | None = None
    serial: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What is asked of every device. Folders are handed in, since this room knows no other.

    `threads` None: the physical cores of the device, or what the bundle says where there are none to count.
    `sweep`: find the best thread count of each bundle first. `python`: the program on the device. `setup`:
    fetch there what is missing. `keep`: leave bundles and packages there. `ids`: token ids of a short text
    for a bundle, where logits are compared. `requests`: items of each bundle that are scored when the timing
    is done (scoring.py). `cache`: a folder for what is fetched to this machine.
    """

    runner: Path
    cache: Path
    ids: Callable[[Path], list[int]]
    prompt: int = 128
    generate: int = 128
    repetitions: int = 5
    threads: int | None = None
    sweep: bool = False
    seed: int = 0
    pause_s: float = 0.0
    warmup: int = 1
    pairs: tuple[tuple[str, str], ...] = ()
    setup: bool = False
    keep: bool = False
    python: str | None = None
    timeout_s: float = 900.0
    requests: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def timing(self) -> dict[str, Any]:
        """What every way to time bundles in turns takes by these names; threads are the device's matter."""
        names = ("prompt", "generate", "repetitions", "seed", "pause_s", "warmup", "pairs", "timeout_s")
        return {name: getattr(self, name) for name in names}


class Device(Protocol):
    """A device that has been reached."""

    def measure(self, progress: Progress) -> dict[str, Any]: ...


class DeviceLost(BuildFailed):
    """The device went away in the middle; `partial` is the result so far, with `lost` saying why."""

    def __init__(self, message: str, partial: dict[str, Any]) -> None:
        super().__init__(message)
        self.partial = partial


def opened(address: Address, bundles: Mapping[str, Path], wanted: Wanted) -> AbstractContextManager[Device]:
    """Reach a device; its module is imported now. Raises BadInput where it cannot be used."""
    found: AbstractContextManager[Device] = import_module(KINDS[address.kind].module).opened(
        address, bundles, wanted
    )
    return found


def parse(name: str) -> Address:
    """Take a device's name apart. Raises BadInput with what would work."""
    text = name.strip()
    if (before := text.partition(":")[0]) in WITH_SERIAL:
        return _with_serial(text, before)
    kind, slashes, rest = text.partition("://")
    if kind not in KINDS:
        guess = difflib.get_close_matches(kind.lower(), KINDS, n=1, cutoff=0.5)
        meant = f"did you mean '{KINDS[guess[0]].form}'? " if guess else ""
        raise BadInput(f"--device {name!r}: is not known; {meant}(choices: {_choices()})")
    if kind not in WITH_ADDRESS:
        if slashes:
            raise BadInput(f"--device {name!r}: takes no address; write {KINDS[kind].form}")
        return Address(text, kind)
    if not slashes or not rest:
        raise BadInput(f"--device {name!r}: no device is named; write {KINDS[kind].form}")
    return _with_host(text, kind)


def _with_serial(text: str, kind: str) -> Address:
    """KIND[:SERIAL]; a serial may hold colons, as in adb:127.0.0.1:5555, and may not look like an option."""
    _, colon, serial = text.partition(":")
    if colon and not re.fullmatch(r"[A-Za-z0-9_\[][\w.:%\[\]-]*", serial, re.ASCII):
        raise BadInput(f"--device {text!r}: {serial!r} is not a serial; write {KINDS[kind].form}")
    return Address(text, kind, serial=serial or None)


def _with_host(text: str, kind: str) -> Address:
    """KIND://[USER@]HOST[:PORT]; an IPv6 address in brackets. Nothing in it may look like an option."""
    form = KINDS[kind].form
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
    for what in (host, user):
        if what is not None and not re.fullmatch(r"[\w.:%][\w.:%+-]*", what):
            raise BadInput(f"--device {text!r}: {what!r} is not a name; write {form}")
    return Address(text, kind, host, user, port)


def parse_all(names: list[str]) -> list[Address]:
    """All devices of one command. Raises BadInput where none is named, or one is named twice."""
    if not names:
        raise BadInput(f"no device is named; --device takes one of {_choices()}")
    found = [parse(name) for name in names]
    for address in found:
        if found.count(address) > 1:
            raise BadInput(f"--device {address.name}: is named twice; once is enough")
    return found


def _choices() -> str:
    return ", ".join(kind.form for kind in KINDS.values())
