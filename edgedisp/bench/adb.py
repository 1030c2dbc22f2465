"""`adb[:SERIAL]`: an Android phone on USB, or in the network once `adb connect` has reached it.

The phone page measures in the phone's browser, which needs nothing installed. It is served on this machine's
127.0.0.1, and a port of the phone's own 127.0.0.1 leads there through the cable (`adb reverse`): no network
is needed, and the browser takes the page for a local one, with threads and its finest clock. Model, chip,
battery and thermal status are asked before and after, since heat decides much on a phone. The `adb` program
is used as a user would, and its messages are passed on; $EDGEDISP_ADB is the command to use in its place,
such as `adb -P 5038`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedisp.bench import android
from edgedisp.bench.browser import Monitor, PageSession, page_plan, refuse_sweep
from edgedisp.bench.devices import Address, BenchOptions, Device, DeviceLost
from edgedisp.bench.interleaved_timing import MEMORY_SHARE
from edgedisp.bench.page_plan import PAGE_BYTES, PagePlan
from edgedisp.bench.page_protocol import printable
from edgedisp.bench.page_server import PageServer, page_resources
from edgedisp.bench.phone import PORT
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.paths import data_folder
from edgedisp.core.progress import Progress

MIB = 1 << 20
ANSWER_S = 30.0
FIRST_S = 120.0  # for the page to open: a browser that is new there may ask its user something first
LOOK_S = 5.0  # between questions whether the phone is still there: each costs it a little
QUIET_S = 0.5  # of pause between turns, in which the phone can be asked something


class AdbFailed(BuildFailed):
    """adb could not do what it was asked for; the message ends with adb's own."""


@dataclass(frozen=True)
class Phone:
    """A phone that takes commands. `command`: adb with its options; `name`: as the user wrote it."""

    command: tuple[str, ...]
    name: str

    def run(self, *words: str, stdin: str = "") -> str:
        """What an adb command prints. Raises AdbFailed."""
        try:
            done = subprocess.run(
                [*self.command, *words],
                input=stdin.encode(),
                capture_output=True,
                timeout=ANSWER_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise AdbFailed(f"{self.name}: adb gave no answer within {ANSWER_S:g} s") from None
        out, said = (
            text.decode("utf-8", "replace").replace("\r\n", "\n") for text in (done.stdout, done.stderr)
        )
        if done.returncode:
            why = printable((said.strip() or out.strip() or "it said nothing").replace("\n", "; "))
            raise AdbFailed(f"{self.name}: adb ended with code {done.returncode}: {why[:500]}")
        return out

    def shell(self, script: str) -> str:
        """What a script prints in the phone's shell, which reads it from stdin: command lines can be seen."""
        return self.run("shell", "-T", "sh", stdin=script + "\nexit 0\n")

    def ask(self, commands: Mapping[str, str]) -> dict[str, str]:
        """Name -> what its command printed there."""
        return android.split_answers(self.shell(android.script(commands)))

    @contextmanager
    def reverse_port(self, port: int, preferred: int) -> Iterator[int]:
        """A port of the phone's 127.0.0.1 that leads to ours: `preferred`, or any where that is taken."""
        try:
            self.run("reverse", "--no-rebind", f"tcp:{preferred}", f"tcp:{port}")
            there = preferred
        except AdbFailed:
            there = int(self.run("reverse", "tcp:0", f"tcp:{port}").strip() or 0)
        try:
            yield there
        finally:
            with suppress(AdbFailed):  # the phone is gone, and what led here went with it
                self.run("reverse", "--remove", f"tcp:{there}")


def find_phone(name: str, serial: str | None) -> Phone:
    """The attached phone with this serial, or the only one. $ANDROID_SERIAL names one too, as for adb.

    Raises BadInput where adb is missing, none or several are attached, or it does not take commands.
    """
    program = shlex.split(os.environ.get("EDGEDISP_ADB", "adb"))
    if not program or shutil.which(program[0]) is None:
        missing = program[0] if program else "$EDGEDISP_ADB"
        raise BadInput(f"{name}: there is no `{missing}` here; install adb, such as `apt-get install adb`")
    try:
        attached = attached_phones(Phone(tuple(program), name).run("devices", "-l"))
    except AdbFailed as error:
        raise BadInput(str(error)) from error
    listed = ", ".join(f"adb:{serial} ({state})" for serial, state in attached.items()) or "none"
    serial = (
        serial or os.environ.get("ANDROID_SERIAL") or (next(iter(attached)) if len(attached) == 1 else None)
    )
    if serial not in attached:
        which = f"{serial} is not attached" if serial else f"{len(attached)} phones are attached"
        raise BadInput(
            f"{name}: {which}; name one that is ({listed}), or plug one in, turn on USB debugging in its "
            "developer options and allow this computer on its screen"
        )
    if attached[serial] != "device":
        raise BadInput(
            f"{name}: adb says that {serial} is {attached[serial]}; unlock it, allow USB debugging for this "
            "computer on its screen, or plug it in again"
        )
    return Phone((*program, "-s", serial), name)


def attached_phones(text: str) -> dict[str, str]:
    """Serial -> state, of the output of `adb devices -l`, which may begin with news of adb's server."""
    lines = text.rpartition("List of devices attached")[2].splitlines()
    found = [re.match(r"(\(no serial number\)|\S+)\s+(no permissions|\S+)", line.strip()) for line in lines]
    return {printable(match.group(1)): printable(match.group(2)) for match in found if match}


@contextmanager
def connect(address: Address, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[PhonePage]:
    """The phone as a device; see `devices.py`."""
    refuse_sweep(address.name, options)
    phone = find_phone(address.name, address.serial)
    try:
        machine = android.phone_machine(phone.ask(android.IDENTITY))
    except AdbFailed as error:
        raise BadInput(str(error)) from error
    available = machine["memory_available_bytes"]
    if options.memory_bytes is None and available is not None:
        options = replace(options, memory_bytes=int(MEMORY_SHARE * available))
    yield PhonePage(phone, page_plan(bundles, options), machine)


class PhonePage(Device):
    """Bundles that are timed by the phone's browser. Raises BadInput where one does not fit into its
    memory."""

    def __init__(self, phone: Phone, plan: PagePlan, machine: Mapping[str, Any]) -> None:
        self.phone, self.plan, self.machine = phone, plan, machine
        self.page = page_resources(data_folder("export") / "web")
        self.warnings = memory_warnings(phone.name, plan, machine["memory_available_bytes"])

    def measure(self, progress: Progress) -> dict[str, Any]:
        """See `devices.py`. Raises DeviceLost. The phone's port is given back in every case."""
        before = android.phone_state(self.phone.ask(android.STATE))
        try:
            result = self._measure(progress)
        except DeviceLost as error:
            raise DeviceLost(str(error), self._with_state(error.partial, before, None)) from error
        try:
            return self._with_state(result, before, android.phone_state(self.phone.ask(android.STATE)))
        except AdbFailed:  # all figures are here
            return self._with_state(result, before, None)

    def _measure(self, progress: Progress) -> dict[str, Any]:
        plan, phone = self.plan, self.phone
        notes: list[str] = []
        resources = {**self.page, **plan.resources()}
        with (
            PageServer(
                resources, host="127.0.0.1", port=0, refusal=plan.refusal, note=notes.append
            ) as server,
            phone.reverse_port(server.port, PORT) as port,
        ):
            monitor = _PhoneMonitor(phone, port, plan.options.pause_s, notes)
            timeout_s = plan.options.timeout_s
            session = PageSession(
                plan, server, monitor, phone.name, self._machine, timeout_s, min(FIRST_S, timeout_s)
            )
            open_in_browser(phone, f"http://127.0.0.1:{port}/{server.token}/?run=bench")
            return session.collect(progress)

    def _machine(self, told: dict[str, Any]) -> dict[str, Any]:
        """What adb tells of the phone, and what the page tells where adb does not."""
        return {**told, **{name: value for name, value in self.machine.items() if value is not None}}

    def _with_state(
        self, result: dict[str, Any], before: dict[str, Any], after: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The result with how the phone fared before and after; None: it was gone by then."""
        state = {"before": before, "after": after}
        gone = ["the phone was gone when its state was to be read"] if after is None else []
        return {
            **result,
            "machine": {**result["machine"], "state": state},
            "load_average": {when: one and one["load_average_1m"] for when, one in state.items()},
            "warnings": [*result["warnings"], *self.warnings, *gone, *android.state_warnings(before, after)],
        }


def open_in_browser(phone: Phone, address: str) -> None:
    """Wake the screen and open an address in the phone's browser. Raises BuildFailed where none opens it."""
    said = phone.shell(
        "input keyevent KEYCODE_WAKEUP >/dev/null 2>&1\n"
        f"am start -a android.intent.action.VIEW -d {shlex.quote(address)} 2>&1"
    )
    errors = [line for line in said.splitlines() if line.startswith("Error")]
    if errors:
        why = printable(errors[0])[:200]
        raise BuildFailed(f"{phone.name}: no browser opens the page there; install or enable one: {why}")


class _PhoneMonitor(Monitor):
    """The phone as adb sees it while its browser has the page open."""

    def __init__(self, phone: Phone, port: int, pause_s: float, notes: list[str]) -> None:
        self.phone, self.port, self.notes = phone, port, notes
        self.quiet = pause_s >= QUIET_S
        self.looked = time.monotonic()

    def gone(self) -> str | None:
        if time.monotonic() - self.looked < LOOK_S:
            return None
        self.looked = time.monotonic()
        with suppress(AdbFailed):
            if f"tcp:{self.port}" in self.phone.run("reverse", "--list").split():
                return None
        return "it is not attached any more, or its port no longer leads here"

    def hint(self) -> str:
        return "; unlock the phone, and leave the page in front" + "".join(f"; {n}" for n in self.notes[:1])

    def turn_ends(self) -> dict[str, Any]:
        """Clock and load, read in the pause after a turn; nothing where there is none."""
        try:
            return android.phone_sensors(self.phone.ask(android.SENSORS)) if self.quiet else {}
        except AdbFailed:
            return {}  # it went away: `gone` says so


def memory_warnings(name: str, plan: PagePlan, available: int | None) -> list[str]:
    """What to say where memory is short. Raises BadInput where the weights alone do not fit.

    `available`: bytes that the phone could give without ending apps that are in use; None: not told.
    """
    if available is None:
        return []
    heaviest = max(plan.bundles, key=lambda bundle: bundle.weights_bytes)
    least = heaviest.weights_bytes + PAGE_BYTES
    if least > available:
        raise BadInput(
            f"{name}: {available / MIB:.0f} MiB of memory are free there, and {heaviest.label} takes at "
            f"least {least / MIB:.0f}; close apps, or take a bundle of fewer bits"
        )
    largest = max(plan.bundles, key=lambda bundle: bundle.expected_memory_bytes)
    if largest.expected_memory_bytes <= available:
        return []
    return [
        f"{largest.label} needs about {largest.expected_memory_bytes / MIB:.0f} MiB and "
        f"{available / MIB:.0f} were free: Android ends other apps for it, or the page"
    ]
