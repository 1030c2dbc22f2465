"""The `adb` program: which phones it sees, commands on one of them, a port of the phone that leads here.

It is started as a user would start it, with its own server, keys and settings; $EDGEDISP_ADB is the command
to use in its place, options included, such as `adb -P 5038`. Since Android 7 its shell without a terminal
is a clean pipe in both directions, with the exit code and a stderr of its own: `reach` is all that a host at
the end of a pipe (`remote.py`) needs.

Left out: the protocol itself (the program knows it), installing anything on the phone, `adb connect`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from edgedisp.bench.uploads import printable
from edgedisp.core.errors import BadInput, BuildFailed

ANSWER_S = 30.0
CLEAN_PIPE = "shell_v2"  # as `adb features` names it
ATTACH = (
    "plug it in, turn on USB debugging in its developer options and allow this computer on its screen, or "
    "use `adb connect ADDRESS:PORT`"
)
READY = "device"
END = "-- edgedisp: end"

# State in `adb devices` -> what to do.
ADVICE = {
    "unauthorized": "unlock it and allow USB debugging for this computer in the question on its screen; if "
    "none is shown, plug it in again",
    "authorizing": "it is still connecting; unlock it and try again",
    "connecting": "it is still connecting; unlock it and try again",
    "offline": "it does not answer; unlock it, plug it in again, or use `adb reconnect offline`",
    "no permissions": "this user may not open it; install adb's udev rules (Debian: "
    "android-sdk-platform-tools-common) and plug it in again",
}
OTHER_MODE = "it is in another mode; start Android on it"

# What adb writes to stderr -> what it means and what would work. The first that fits counts.
MEANINGS = {
    "unauthorized": ADVICE["unauthorized"],
    "device offline": ADVICE["offline"],
    "not found": "it is not attached any more",
    "no devices": "it is not attached any more",
    "cannot connect to daemon": "adb's server does not start; `adb start-server` tells more",
    "failed to start daemon": "adb's server does not start; `adb start-server` tells more",
}


class AdbFailed(BuildFailed):
    """adb could not do what it was asked for; the message says why."""


@dataclass(frozen=True)
class Attached:
    """One line of `adb devices -l`."""

    serial: str
    state: str
    model: str = ""

    def __str__(self) -> str:
        told = ", ".join(text for text in (self.model, "" if self.state == READY else self.state) if text)
        return f"adb:{self.serial}" + (f" ({told})" if told else "")


@dataclass(frozen=True)
class Phone:
    """A phone that takes commands. `program`: adb with its options; `name`: as the user wrote it."""

    program: tuple[str, ...]
    serial: str
    name: str

    @property
    def words(self) -> tuple[str, ...]:
        """The command's beginning for this phone."""
        return (*self.program, "-s", self.serial)

    def run(self, *words: str) -> str:
        """What an adb command prints. Raises AdbFailed where it ends with another code than 0."""
        code, out, said = _ended([*self.words, *words], self.name)
        if code:
            raise AdbFailed(f"{self.name}: {explain(code, said or out)}")
        return out

    def reach(self, command: str) -> list[str]:
        """The program to start here whose streams and exit code are those of a shell command there.

        For a clean pipe alone: adb refuses `-T` for an older phone.
        """
        return [*self.words, "shell", "-T", command]

    def shell(self, command: str) -> str:
        """What a shell command prints there; its exit code is not asked for. Raises AdbFailed.

        adb ends with 0 also where the connection breaks, so the last line has to be there.
        """
        out, end, _ = self.run("shell", f"{command}\necho '{END}'").rpartition(END)
        if not end:
            raise AdbFailed(f"{self.name}: {explain(0, out)}")
        return out

    @property
    def has_clean_pipe(self) -> bool:
        """Whether its shell passes bytes and exit codes on (Android 7 and later)."""
        return CLEAN_PIPE in self.run("features").split()

    @contextmanager
    def port_that_leads_here(self, port: int, wished: int) -> Iterator[int]:
        """A port of the phone's own 127.0.0.1 that leads to ours: `wished`, or any where that is taken."""
        try:
            self.run("reverse", "--no-rebind", f"tcp:{wished}", f"tcp:{port}")
            there = wished
        except AdbFailed:
            told = self.run("reverse", "tcp:0", f"tcp:{port}").strip()
            if not told.isdigit():
                raise AdbFailed(f"{self.name}: adb gave no port of the phone, but {told[:100]!r}") from None
            there = int(told)
        try:
            yield there
        finally:
            with suppress(AdbFailed):  # the phone is gone, and what led here went with it
                self.run("reverse", "--remove", f"tcp:{there}")

    def leads_here(self, there: int) -> bool:
        """Whether the phone is attached and its port still leads here."""
        try:
            return f"tcp:{there}" in self.run("reverse", "--list").split()
        except AdbFailed:
            return False


def find_phone(name: str, serial: str | None) -> Phone:
    """The attached phone with this serial, or the only one. $ANDROID_SERIAL names one too, as for adb.

    `name` is what messages begin with. Raises BadInput where adb is missing, none or several are attached,
    or the one that is meant does not take commands: each with what to do.
    """
    program = _program(name)
    found = attached(program, name)
    serial = serial or os.environ.get("ANDROID_SERIAL") or None
    listed = ", ".join(map(str, found))
    if serial is None and len(found) > 1:
        raise BadInput(f"{name}: {len(found)} devices are attached; name one of {listed}")
    meant = [one for one in found if serial in (None, one.serial)]
    if not meant:
        others = f" (attached: {listed})" if found else ""
        which = "no phone is attached" if serial is None else f"{serial} is not attached"
        raise BadInput(f"{name}: {which}{others}; {ATTACH}")
    if meant[0].state != READY:
        advice = ADVICE.get(meant[0].state, OTHER_MODE)
        raise BadInput(f"{name}: {meant[0].serial} is {meant[0].state}: {advice}")
    return Phone(tuple(program), meant[0].serial, name)


def _program(name: str) -> list[str]:
    words = shlex.split(os.environ.get("EDGEDISP_ADB", "adb"))
    if not words or shutil.which(words[0]) is None:
        missing = words[0] if words else "$EDGEDISP_ADB"
        raise BadInput(
            f"{name}: there is no `{missing}` here; install adb: `apt-get install adb`, or Android's "
            "platform tools"
        )
    return words


def attached(program: Sequence[str], name: str) -> list[Attached]:
    """What `adb devices` lists. Raises BadInput where adb cannot tell."""
    code, out, said = _ended([*program, "devices", "-l"], name)
    if code:
        raise BadInput(f"{name}: {explain(code, said or out)}")
    return listing(out)


def listing(text: str) -> list[Attached]:
    """The devices in the output of `adb devices -l`, which may begin with news of adb's server."""
    found = []
    for line in text.rpartition("List of devices attached")[2].splitlines():
        fits = re.match(r"(\(no serial number\)|\S+)\s+(no permissions|\S+)(.*)", line.strip())
        if fits:
            serial, state, rest = map(printable, fits.groups())
            model = re.search(r"\bmodel:(\S+)", rest)
            found.append(Attached(serial, state, model.group(1).replace("_", " ") if model else ""))
    return found


def _ended(command: Sequence[str], name: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr. Raises AdbFailed where there is no end."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise AdbFailed(f"{name}: adb gave no answer within {ANSWER_S:g} s") from None
    out, said = (text.decode("utf-8", "replace").replace("\r\n", "\n") for text in (done.stdout, done.stderr))
    return done.returncode, out, said


def explain(code: int | None, said: str) -> str:
    """Why adb ended, in one line with what would work; its own last line where that is not known."""
    for sign, meaning in MEANINGS.items():
        if sign in said.lower():
            return meaning
    if code == 0:  # what adb makes of it: the other end never told an exit code
        return "the connection to the phone broke"
    last = said.strip().splitlines()[-1] if said.strip() else "it said nothing"
    return f"adb ended with code {code}: {printable(last)}"
