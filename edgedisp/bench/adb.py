"""`adb[:SERIAL]`: an Android phone on USB, or in the network once `adb connect` has reached it.

Two ways, chosen by what is there. Where adb's shell can start a Python with numpy and onnxruntime, the runner
is used, as over ssh: a program of its own, native kernels, memory per process. Everywhere else the phone page
measures in the phone's browser (`adb_page.py`), which needs nothing installed. Termux keeps its files from
adb's shell, unless it is the debug build (the one on its GitHub page): then `run-as` lets adb in.

Model, chip, battery and thermal status are asked before and after, since heat decides much on a phone.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedisp.bench import android, machine, remote
from edgedisp.bench.adb_client import AdbFailed, Phone, explain, find_phone
from edgedisp.bench.adb_page import AdbPage
from edgedisp.bench.devices import Address, Device, DeviceLost, Wanted
from edgedisp.bench.hardware import readings
from edgedisp.bench.timing import Timed
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress

TERMUX = "/data/data/com.termux/files"
OLD_ENOUGH = f"import sys; sys.exit(sys.version_info < {remote.OLDEST})"
ABLE = (
    "import sys; from importlib.util import find_spec; "
    f"sys.exit(sys.version_info < {remote.OLDEST} or not (find_spec('numpy') and find_spec('onnxruntime')))"
)
PAGE, RUNNER = "the phone page in its browser", "the runner in its Python"

Enter = Callable[[str], str]


@contextmanager
def opened(address: Address, bundles: Mapping[str, Path], wanted: Wanted) -> Iterator[Measured]:
    """The phone as a device; see `devices.py`. Raises BadInput where it cannot be used."""
    phone = find_phone(address.name, address.serial)
    try:
        told = android.sections(phone.shell(android.script(android.LOOK)))
        python = _python(phone, wanted)
    except AdbFailed as error:
        raise BadInput(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="edgedisp-") as folder:
        scratch = Path(folder)
        described = _described(told, scratch, phone.name)
        if python is None:
            page = AdbPage(phone, bundles, wanted, described, scratch)
            yield Measured(phone, page, {**described["phone"], "measured_by": PAGE}, scratch)
            return
        enter, program = python

        def reach(command: str) -> list[str]:
            return phone.reach(enter(command))

        there = replace(wanted, python=program)
        with remote.opened(phone.name, reach, explain, bundles, there) as host:
            facts = {**described["phone"], "measured_by": RUNNER}
            yield Measured(phone, Timed(host, bundles, there), facts, scratch)


class Measured:
    """A phone whose state is told with its figures; `device` is what measures there."""

    def __init__(self, phone: Phone, device: Device, facts: Mapping[str, Any], scratch: Path) -> None:
        self.phone, self.device, self.facts, self.scratch = phone, device, facts, scratch

    def measure(self, progress: Progress) -> dict[str, Any]:
        """See `devices.py`. Raises DeviceLost."""
        before = self._state()
        try:
            found = self.device.measure(progress)
        except DeviceLost as error:
            raise DeviceLost(str(error), self._told(error.partial, before, None)) from error
        try:
            return self._told(found, before, self._state())
        except AdbFailed:  # all figures are here
            return self._told(found, before, None)

    def _state(self) -> dict[str, Any]:
        told = android.sections(self.phone.shell(android.script(android.STATE)))
        files = android.files(told.get("files", ""))
        load = readings(remote.copied(self.scratch / "state", files, self.phone.name))["load_average_1m"]
        return {**android.state(told), "load_average_1m": load}

    def _told(
        self, found: dict[str, Any], before: dict[str, Any], after: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The result with what the phone is, and how it fared before and after; None: it was gone by then."""
        chip = self.facts["soc"] or found["machine"]["cpu"]
        state = {"before": before, "after": after}
        loads = {when: one and one["load_average_1m"] for when, one in state.items()}
        gone = ["the phone was gone when its state was to be read"] if after is None else []
        return {
            **found,
            "machine": {**found["machine"], "cpu": chip, "phone": dict(self.facts), "state": state},
            "load_average": loads if found["load_average"]["before"] is None else found["load_average"],
            "warnings": [*found["warnings"], *gone, *android.warnings(before, after)],
        }


def _described(told: Mapping[str, str], scratch: Path, name: str) -> dict[str, Any]:
    """The keys of `machine.describe`, and `phone`: what adb's shell tells. What it does not is None."""
    phone = android.identity(told.get("props", ""))
    files = android.files(told.get("files", ""))
    cpus = android.cpus(files.get("sys/devices/system/cpu/online"))
    system = f"Android {phone['android']} (API {phone['api']})" if phone["android"] else "Android"
    facts: dict[str, Any] = {
        "cpus": cpus,
        "architecture": told.get("kernel", "").strip() or phone["abi"],
        "system": system,
        "python": None,
        "packages": {},
    }
    found = machine.describe(remote.copied(scratch / "look", files, name), facts)
    unknown = {} if cpus else {"physical_cores": None, "logical_cpus": None}
    return {**found, **unknown, "cpu": phone["soc"] or found["cpu"], "phone": phone}


def _plainly(command: str) -> str:
    """adb's own shell; its user may write to /data/local/tmp alone."""
    return f"export TMPDIR=${{TMPDIR:-/data/local/tmp}}; {command}"


def _in_termux(command: str) -> str:
    """As Termux's user, with the settings that its terminal has."""
    settings = (
        f"export HOME={TERMUX}/home PREFIX={TERMUX}/usr TMPDIR={TERMUX}/usr/tmp PATH={TERMUX}/usr/bin:$PATH"
    )
    return f"exec run-as com.termux sh -c {shlex.quote(f'{settings}; {command}')}"


def _python(phone: Phone, wanted: Wanted) -> tuple[Enter, str] | None:
    """How to get to a Python that can run the runner, and its name; None: there is none, use the page.

    One that was named is taken, whatever it lacks: that is told later. Raises BadInput where it is not there.
    """
    named = wanted.python
    if not phone.has_clean_pipe:
        if named:
            raise BadInput(f"{phone.name}: --remote-python needs Android 7 or later; leave it away")
        return None
    check = OLD_ENOUGH if named else ABLE
    tried = shlex.quote(named) if named else "python3 python"
    search = (
        f"for p in {tried}; do "
        f'if "$p" -c {shlex.quote(check)} </dev/null >/dev/null 2>&1; then echo "$p"; break; fi; done'
    )
    for enter in (_plainly, _in_termux):
        found = phone.shell(f"({enter(search)}) 2>/dev/null").strip()
        if found:
            return enter, found
    if named:
        raise BadInput(
            f"{phone.name}: adb's shell starts no Python {named} of 3.9 or newer there, nor Termux's"
        )
    return None
