"""`adb[:SERIAL]`: an Android phone on USB, or in the network once `adb connect` has reached it.

The phone page measures in the phone's browser, which needs nothing installed. It is served on this machine's
127.0.0.1, and a port of the phone's own 127.0.0.1 leads there through the cable (`adb reverse`): no network
is needed, and the browser takes the page for a local one, with threads and its finest clock. Model, chip,
battery and thermal status are read before and after (`android.py`), since heat decides much on a phone.
$EDGEDISP_ADB is the command to use in place of `adb`, such as `adb -P 5038`.
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
from edgedisp.bench.browser import PageDevice
from edgedisp.bench.devices import Address, BenchOptions, DeviceLost
from edgedisp.bench.page_plan import PAGE_BYTES
from edgedisp.bench.page_protocol import printable
from edgedisp.bench.page_server import PageServer
from edgedisp.bench.phone import PORT
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.core.results import DeviceResult

MIB = 1 << 20
ANSWER_S = 30.0
LOOK_S = 5.0  # between questions whether the phone is still there: each costs it a little


class AdbFailed(BuildFailed):
    """adb failed; the message ends with adb's own."""


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
        out, errors = (
            text.decode("utf-8", "replace").replace("\r\n", "\n") for text in (done.stdout, done.stderr)
        )
        if done.returncode:
            why = printable((errors.strip() or out.strip()).replace("\n", "; "))
            raise AdbFailed(f"{self.name}: adb ended with code {done.returncode}: {why[:500]}")
        return out

    def shell(self, script: str) -> str:
        """What a script prints in the phone's shell, which reads it from stdin: command lines can be seen."""
        return self.run("shell", "-T", "sh", stdin=script + "\nexit 0\n")

    def ask(self, commands: Mapping[str, str]) -> dict[str, str]:
        """Name -> what its command printed there."""
        return android.split_answers(self.shell(android.script(commands)))


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
    serial = (
        serial or os.environ.get("ANDROID_SERIAL") or (next(iter(attached)) if len(attached) == 1 else None)
    )
    if serial is None or attached.get(serial) != "device":
        which = (
            f"{serial} is {attached.get(serial, 'not attached')}"
            if serial
            else f"{len(attached)} are attached"
        )
        listed = ", ".join(f"adb:{serial} ({state})" for serial, state in attached.items()) or "none"
        raise BadInput(
            f"{name}: {which}; of these ({listed}) name one that is a `device`, or plug one in, turn on USB "
            "debugging in its developer options and allow this computer on its screen"
        )
    return Phone((*program, "-s", serial), name)


def attached_phones(text: str) -> dict[str, str]:
    """Serial -> state, of the output of `adb devices -l`, which may begin with news of adb's server."""
    lines = text.rpartition("List of devices attached")[2].splitlines()
    rows = [re.match(r"(\(no serial number\)|\S+)\s+(no permissions|\S+)", line.strip()) for line in lines]
    return {printable(row.group(1)): printable(row.group(2)) for row in rows if row}


@contextmanager
def connect(address: Address, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[PhonePage]:
    """The phone as a device; see `devices.py`."""
    phone = find_phone(address.name, address.serial)
    try:
        machine = android.phone_machine(phone.ask(android.IDENTITY))
    except AdbFailed as error:
        raise BadInput(str(error)) from error
    yield PhonePage(phone, bundles, options, machine)


class PhonePage(PageDevice):
    """The phone's browser. Raises BadInput where a bundle does not fit into the phone's memory."""

    def __init__(
        self, phone: Phone, bundles: Mapping[str, Path], options: BenchOptions, machine: Mapping[str, Any]
    ) -> None:
        available = machine["memory_available_bytes"]
        super().__init__(phone.name, bundles, options, available)
        self.phone, self.machine, self.looked = phone, machine, 0.0
        largest = max(self.plan.bundles, key=lambda bundle: bundle.weights_bytes)
        least = largest.weights_bytes + PAGE_BYTES
        if available is not None and least > available:
            raise BadInput(
                f"{phone.name}: {available / MIB:.0f} MiB of memory are free there, and {largest.label} "
                f"takes at least {least / MIB:.0f}; close apps, or take a bundle of fewer bits"
            )

    def measure(self, progress: Progress) -> DeviceResult:
        """See `devices.py`. Raises DeviceLost."""
        before = android.phone_state(self.phone.ask(android.STATE))
        try:
            result = super().measure(progress)
        except DeviceLost as error:
            raise DeviceLost(str(error), _with_state(error.partial, before, None)) from error
        after = None
        with suppress(AdbFailed):  # all figures are here
            after = android.phone_state(self.phone.ask(android.STATE))
        return _with_state(result, before, after)

    @contextmanager
    def open(self, server: PageServer) -> Iterator[None]:
        """Lead a port of the phone's 127.0.0.1 to the server, PORT if it is free, and open the page there."""
        phone = self.phone
        try:
            phone.run("reverse", "--no-rebind", f"tcp:{PORT}", f"tcp:{server.port}")
            self.port = PORT
        except AdbFailed:
            self.port = int(phone.run("reverse", "tcp:0", f"tcp:{server.port}").strip() or 0)
        try:
            address = shlex.quote(f"http://127.0.0.1:{self.port}/{server.token}/?run=bench")
            output = phone.shell(
                "input keyevent KEYCODE_WAKEUP >/dev/null 2>&1\n"
                f"am start -a android.intent.action.VIEW -d {address} 2>&1"
            )
            if errors := [line for line in output.splitlines() if line.startswith("Error")]:
                raise BuildFailed(
                    f"{phone.name}: no browser opens the page there: {printable(errors[0])[:200]}"
                )
            yield
        finally:
            with suppress(AdbFailed):  # where the phone is gone, the port is too
                phone.run("reverse", "--remove", f"tcp:{self.port}")

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

    def describe(self, page: dict[str, Any]) -> dict[str, Any]:
        """What adb says of the phone, and what the page says where adb does not."""
        return {**page, **{name: value for name, value in self.machine.items() if value is not None}}


def _with_state(result: DeviceResult, before: dict[str, Any], after: dict[str, Any] | None) -> DeviceResult:
    """The result with the phone's state before and after; None: it was gone by then."""
    state = {"before": before, "after": after}
    return replace(
        result,
        machine={**result.machine, "state": state},
        load_average={when: facts and facts["load_average_1m"] for when, facts in state.items()},
        warnings=(*result.warnings, *android.state_warnings(before, after)),
    )
