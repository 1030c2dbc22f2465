"""`ssh://USER@HOST[:PORT]`: a Raspberry Pi, a Mac, any server that `ssh` reaches without a question.

The `ssh` program is used, and with it the user's own ~/.ssh/config (names, keys, jump hosts). It never asks:
a password or an unknown host key is an error that says what to do. $EDGEDISP_SSH is the command to use in its
place, options included, such as `ssh -F my_config`.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from edgedisp.bench import remote
from edgedisp.bench.devices import Address, Wanted
from edgedisp.bench.timing import Timed
from edgedisp.core.errors import BadInput

# No questions, no forwarding that the user's configuration may hold, and a dead connection found within 15 s.
OPTIONS = (
    "-T",
    "-a",
    "-x",
    *(
        word
        for option in (
            "BatchMode=yes",
            "ClearAllForwardings=yes",
            "ConnectTimeout=10",
            "ServerAliveInterval=5",
            "ServerAliveCountMax=3",
        )
        for word in ("-o", option)
    ),
)

# What ssh writes to stderr -> what it means and what would work. The first that fits counts.
MEANINGS = {
    "could not resolve hostname": "no host of that name; check its spelling, or give its address",
    "permission denied": "the login is refused; no password is asked for: load a key with ssh-add, or "
    "name it in ~/.ssh/config",
    "remote host identification has changed": "its host key is not the one known here; if that is right, "
    "remove the old one with `ssh-keygen -R HOST`",
    "host key verification failed": "its host key is not known here; connect once with `ssh HOST`",
    "connection refused": "nothing answers at that port; is sshd running there, and is the port right?",
    "connection timed out": "it does not answer; is it on, and in this network?",
    "no route to host": "it cannot be reached; is it on, and in this network?",
    "network is unreachable": "it cannot be reached; is it on, and in this network?",
}


@contextmanager
def opened(address: Address, bundles: Mapping[str, Path], wanted: Wanted) -> Iterator[Timed]:
    """The host as a device; see `devices.py` and `remote.py`."""
    program = shlex.split(os.environ.get("EDGEDISP_SSH", "ssh"))
    if not program or shutil.which(program[0]) is None:
        missing = program[0] if program else "$EDGEDISP_SSH"
        raise BadInput(f"{address.name}: there is no `{missing}` here; install OpenSSH's client")
    words = [*program, *OPTIONS]
    words += ["-p", str(address.port)] if address.port else []
    words += ["-l", address.user] if address.user else []

    def reach(command: str) -> list[str]:
        return [*words, "--", address.host, command]

    with remote.opened(address.name, reach, explain, bundles, wanted) as host:
        yield Timed(host, bundles, wanted)


def explain(code: int | None, said: str) -> str:
    """Why ssh ended, in one line with what would work; its own last line where that is not known."""
    for sign, meaning in MEANINGS.items():
        if sign in said.lower():
            return meaning
    last = said.strip().splitlines()[-1] if said.strip() else "it said nothing"
    return f"the connection ended with code {code}: {last}"
