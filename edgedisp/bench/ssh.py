"""`ssh://USER@HOST[:PORT]`: a Raspberry Pi, a Mac, any server that `ssh` reaches without a question.

One connection stays open for the whole measurement: its shell makes a private folder there, and removes it
when the connection ends. Files go there by `tar`, the runner describes the machine, and each bundle that is
timed has a connection of its own. $EDGEDISP_SSH is the command to use in place of `ssh`, such as
`ssh -F my_config`.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from edgedisp.bench.bundles import checked_runtime, needed_files
from edgedisp.bench.devices import MIB, BenchOptions, check_memory, external_program
from edgedisp.bench.interleaved_timing import TAIL_CHARS, Host, Worker
from edgedisp.bench.system import RUNNER
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent

# No questions, no forwarding that the user's configuration may hold, and a dead connection found within 15 s.
OPTIONS = shlex.split(
    "-T -a -x -o BatchMode=yes -o ClearAllForwardings=yes -o ConnectTimeout=10 "
    "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
)
PROGRAM_BYTES = 64 * MIB  # of memory, for Python with onnxruntime; what is loaded comes on top
SESSION = """
umask 077
D=$(mktemp -d "$HOME/.edgedisp-XXXXXX") || exit 1
trap 'rm -rf "$D"' EXIT
trap 'exit 1' HUP INT TERM
echo "{\\"ready\\": {\\"folder\\": \\"$D\\"}}"
cat >/dev/null
"""


@contextmanager
def connect(name: str, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[Host]:
    """The host of `ssh://...` as a device; see `devices.py`.

    Raises BadInput for a host that cannot be reached, that lacks Python or packages, or that has too little
    memory for a bundle.
    """
    ssh = external_program(name, "EDGEDISP_SSH", "ssh", "install OpenSSH's client")
    shell = [*ssh, *OPTIONS, "--", name]
    try:
        session = Worker(name, [*shell, f"exec sh -c {shlex.quote(SESSION)}"], options.timeout_s)
    except BuildFailed as error:
        hint = ": its shell prints text before a command runs; let its start-up files be silent then"
        raise BadInput(f"{error}{hint if 'not an answer' in str(error) else ''}") from error
    with closing(session):  # politely also after a failure: it has a folder to remove
        yield SshHost(name, shell, session.facts["folder"], bundles, options)


class SshHost(Host):
    """The host, connected. `shell` and a command: runs the command there. folder: a private one there."""

    def __init__(
        self, name: str, shell: Sequence[str], folder: str, bundles: Mapping[str, Path], options: BenchOptions
    ) -> None:
        super().__init__(bundles, options)
        self.name, self._shell, self._folder = name, list(shell), folder
        self._files = {bundle: needed_files(bundle) for bundle in bundles.values()}
        self._send({RUNNER.name: RUNNER}, folder, "runner", silent)
        try:
            self.machine = json.loads(self._run(self._runner("--describe")))
        except BuildFailed as error:
            raise BadInput(f"{error}\nname a Python 3.9 or newer with --remote-python") from error
        for label, bundle in bundles.items():
            size = sum(path.stat().st_size for path in self._files[bundle].values())
            check_memory(name, self.machine["memory_available_bytes"], label, size + PROGRAM_BYTES)
        lacking = [package for package, version in self.machine["packages"].items() if version is None]
        if lacking:
            version = checked_runtime(next(iter(bundles.values())))
            raise BadInput(
                f"{name}: its Python has no {' and no '.join(lacking)}; install there `numpy` and "
                f"`onnxruntime{f'=={version}' if version else ''}`, such as into a virtual environment, and "
                "name its Python with --remote-python"
            )

    def command(self, bundle: Path, words: Sequence[str]) -> list[str]:
        return [*self._shell, self._runner(*words, self._there(bundle))]

    def _there(self, bundle: Path) -> str:
        return f"{self._folder}/{[*self._files].index(bundle)}"

    def _runner(self, *words: str) -> str:
        # onnxruntime writes files of its own into the cache folder when it is imported.
        python = self.options.remote_python or "python3"
        program = ["env", f"XDG_CACHE_HOME={self._folder}", python, f"{self._folder}/{RUNNER.name}"]
        return "exec " + shlex.join([*program, *words])

    def _run(self, command: str, send: Callable[[Any], None] | None = None) -> str:
        """What a shell command prints there; `send` writes to its standard input. Raises BuildFailed."""
        pipe = subprocess.PIPE
        process = subprocess.Popen([*self._shell, command], stdin=pipe, stdout=pipe, stderr=pipe)
        if send is not None:
            with suppress(OSError):  # where the command ends early, its code and message say why
                send(process.stdin)
        output, errors = (text.decode("utf-8", "replace") for text in process.communicate())
        if process.returncode:
            raise BuildFailed(
                f"{self.name}: `{command[:200]}` failed there with code {process.returncode}:\n"
                f"{(errors.strip() or output.strip())[-TAIL_CHARS:]}"
            )
        return output

    def copy(self, progress: Progress) -> None:
        for label, bundle in self.bundles.items():
            self._send(self._files[bundle], self._there(bundle), label, progress)

    def _send(self, files: Mapping[str, Path], folder: str, label: str, progress: Progress) -> None:
        """Copy files into a folder there, as a stream of tar."""

        def send(stdin: Any) -> None:
            total, copied = sum(path.stat().st_size for path in files.values()), 0
            with tarfile.open(fileobj=stdin, mode="w|", dereference=True) as archive:
                for name, path in files.items():
                    archive.add(path, name)
                    copied += path.stat().st_size
                    progress(copied, total, f"{label}: {copied / 1e6:.0f} of {total / 1e6:.0f} MB copied")

        quoted = shlex.quote(folder)
        unpack = f"umask 077; mkdir -p {quoted} && exec tar -xf - -C {quoted}"
        self._run(f"exec sh -c {shlex.quote(unpack)}", send)
