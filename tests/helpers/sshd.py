"""A real sshd on loopback with new keys, for the tests of `ssh://` devices."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAM = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
MISSING = None if PROGRAM and shutil.which("ssh-keygen") else "no sshd here (apt-get install openssh-server)"


@dataclass
class Sshd:
    """What a test needs to reach the server, and to break its connections."""

    port: int
    config: Path
    pid_file: Path
    home: Path

    @property
    def device(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    @property
    def command(self) -> str:
        """For $EDGEDISP_SSH."""
        return f"ssh -F {self.config}"

    def break_connections(self) -> None:
        """Kill the server process of every connection, as if the host had gone away."""
        for child in psutil.Process(int(self.pid_file.read_text())).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@contextmanager
def running(folder: Path, **environment: str) -> Iterator[Sshd]:
    """A server whose sessions see `environment`, with `folder`/home as HOME (its cache goes there)."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    home, pid_file, log = folder / "home", folder / "pid", folder / "log"
    home.mkdir()
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind, key, *_ = (folder / "host.pub").read_text().split()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {key}\n")
    environment = {"XDG_CACHE_HOME": str(home / ".cache"), **environment}
    server = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "PidFile": pid_file,
        "AuthorizedKeysFile": folder / "user.pub", "UsePAM": "no", "PasswordAuthentication": "no",
        "StrictModes": "no", "MaxStartups": "50:30:100",
        "SetEnv": " ".join(f"{name}={value}" for name, value in environment.items()),
    }  # fmt: skip
    client = {
        "IdentityFile": folder / "user", "IdentitiesOnly": "yes",
        "UserKnownHostsFile": folder / "known_hosts", "StrictHostKeyChecking": "yes",
    }  # fmt: skip
    for name, options in (("sshd_config", server), ("config", client)):
        (folder / name).write_text("".join(f"{key} {value}\n" for key, value in options.items()))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)  # where it keeps itself without rights
    subprocess.run([str(PROGRAM), "-f", str(folder / "sshd_config"), "-E", str(log)], check=True)
    deadline = time.monotonic() + 10
    while not pid_file.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(log.read_text())
        time.sleep(0.02)
    try:
        yield Sshd(port, folder / "config", pid_file, home)
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
