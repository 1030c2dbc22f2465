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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from edgedisp.bench.bundles import needed_files
from edgedisp.bench.devices import Address, BenchOptions, external_program
from edgedisp.bench.interleaved_timing import TimedHost, Worker
from edgedisp.bench.system import RUNNER, installed_version
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import MANIFEST, digest, file_digest, read_json
from edgedisp.core.progress import Progress, silent

# No questions, no forwarding that the user's configuration may hold, and a dead connection found within 15 s.
OPTIONS = shlex.split(
    "-T -a -x -o BatchMode=yes -o ClearAllForwardings=yes -o ConnectTimeout=10 "
    "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"
)
MIB = 1 << 20
SPARE_DISK_BYTES = 32 * MIB
PROGRAM_BYTES = 64 * MIB  # of memory, for Python with onnxruntime; what is loaded comes on top
ENVIRONMENT_BYTES = 400 * MIB  # of disk, for numpy and onnxruntime with what pip unpacks
PACKAGES = ("numpy", "onnxruntime")
PIP = ("install", "--quiet", "--disable-pip-version-check", "--no-cache-dir")
# C: what outlives sessions, in a folder that must be this user's own; D: what goes with this session.
SESSION = """
umask 077
C="${XDG_CACHE_HOME:-$HOME/.cache}/edgedisp"
mkdir -p "$C" || exit 1
if [ -L "$C" ] || [ ! -O "$C" ]; then
  echo "$C is a link or belongs to another user; remove it" >&2; exit 1
fi
chmod 700 "$C" || exit 1
P=
for p in %s; do
  "$p" -c 'import sys; sys.exit(sys.version_info < (3, 9))' </dev/null >/dev/null 2>&1 && P=$p && break
done
if [ -z "$P" ]; then
  rmdir "$C" 2>/dev/null
  echo "no Python 3.9 or newer there; install python3, or name one with --remote-python" >&2; exit 2
fi
D=$(mktemp -d "$C/session-XXXXXX") || exit 1
trap 'rm -rf "$D"; rmdir "$C" 2>/dev/null' EXIT
trap 'exit 1' HUP INT TERM
"$P" -c 'import json, sys; print(json.dumps({"ready": dict(zip("CPD", sys.argv[1:]))}))' "$C" "$P" "$D"
cat >/dev/null
"""


@contextmanager
def connect(address: Address, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[TimedHost]:
    """The host as a device; see `devices.py`.

    Raises BadInput for a host that cannot be reached, that lacks Python or packages, or that has too little
    memory or disk for `bundles`.
    """
    name = address.name
    shell = [*external_program(name, "EDGEDISP_SSH", "ssh", "install OpenSSH's client"), *OPTIONS]
    shell += ["-p", str(address.port)] if address.port else []
    shell += ["-l", address.user] if address.user else []
    shell += ["--", address.host]
    pythons = options.remote_python and shlex.quote(options.remote_python)
    script = SESSION % (pythons or '"$C/venv/bin/python" python3 python')
    try:
        session = Worker(name, [*shell, f"exec sh -c {shlex.quote(script)}"], options.timeout_s)
    except BuildFailed as error:
        hint = ": its shell prints text before a command runs; let its start-up files be silent then"
        raise BadInput(f"{error}{hint if 'not JSON' in str(error) else ''}") from error
    with closing(session):  # politely also after a failure: it has a folder to remove
        host = RemoteHost(name, shell, session.facts, bundles, options)
        host.prepare()
        yield host


class RemoteHost(TimedHost):
    """The host, connected, with a Python. `shell` and a command: runs the command in a POSIX shell there."""

    def __init__(
        self,
        name: str,
        shell: Sequence[str],
        folders: Mapping[str, str],
        bundles: Mapping[str, Path],
        options: BenchOptions,
    ) -> None:
        super().__init__(bundles, options)
        self.name, self._shell = name, list(shell)
        self._cache, self._python, self._session = folders["C"], folders["P"], folders["D"]
        self._folders: dict[Path, str] = {}  # bundle on this machine -> folder on the host
        self._send({RUNNER.name: RUNNER}, self._session, "runner", silent)
        self.machine = self._ask("--describe")

    def command(self, bundle: Path, words: Sequence[str]) -> list[str]:
        return [*self._shell, self._runner(*words, self._folders[bundle])]

    def _runner(self, *words: str) -> str:
        # onnxruntime writes files of its own into the cache folder when it is imported.
        program = ["env", f"XDG_CACHE_HOME={self._session}", self._python, f"{self._session}/{RUNNER.name}"]
        return "exec " + shlex.join([*program, *words])

    def _run(self, command: str) -> str:
        """What a shell command prints there. Raises BuildFailed."""
        words = [*self._shell, command]
        result = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if result.returncode:
            raise BuildFailed(
                f"{self.name}: `{command[:200]}` failed there with code {result.returncode}:\n"
                f"{(result.stderr.strip() or result.stdout.strip())[-2000:]}"
            )
        return result.stdout

    def _ask(self, *words: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._run(self._runner(*words)))
        return answer

    def prepare(self) -> None:
        """Refuse what cannot work there before any bundle is copied; with `setup` install packages."""
        sizes = {
            label: sum(file.stat().st_size for file in needed_files(bundle).values())
            for label, bundle in self.bundles.items()
        }
        label = max(sizes, key=lambda name: sizes[name])
        memory, disk = self.machine["memory_available_bytes"], self.machine["disk_free_bytes"]
        if memory is not None and sizes[label] + PROGRAM_BYTES > memory:
            raise BadInput(
                f"{self.name}: {memory / MIB:.0f} MiB of memory are free there, and {label} takes at least "
                f"{(sizes[label] + PROGRAM_BYTES) / MIB:.0f}; a bundle of fewer bits takes less"
            )
        lacking = [name for name in PACKAGES if self.machine["packages"][name] is None]
        needed = sum(sizes.values()) + SPARE_DISK_BYTES + (ENVIRONMENT_BYTES if lacking else 0)
        if needed > disk:
            raise BadInput(
                f"{self.name}: {disk / MIB:.0f} MiB of disk are free in {self._cache} there, and "
                f"{needed / MIB:.0f} are needed; free some, or name fewer bundles"
            )
        if lacking and not self.options.setup:
            raise BadInput(
                f"{self.name}: {self._python} has no {' and no '.join(lacking)}; --setup installs it there "
                "into a folder of its own, or name another Python with --remote-python"
            )
        if lacking:
            self._install(onnxruntime_version(self.bundles))

    def _install(self, version: str | None) -> None:
        """A virtual environment with numpy and the onnxruntime that the bundles were checked with."""
        folder = f"{self._cache if self.options.keep else self._session}/venv"
        self._run(shlex.join([self._python, "-m", "venv", "--clear", folder]))
        self._python = f"{folder}/bin/python"
        pip = [self._python, "-m", "pip", *PIP]
        self._run(shlex.join([*pip, "numpy", f"onnxruntime=={version}" if version else "onnxruntime"]))
        self.machine = self._ask("--describe")

    def copy(self, progress: Progress) -> None:
        """Copy bundles there. One that is there already is used if the hashes of all its files are right."""
        for label, bundle in self.bundles.items():
            files = needed_files(bundle)
            hashes = {name: file_digest(path) for name, path in files.items()}
            cached, fresh = (f"{folder}/{digest(hashes)[:32]}" for folder in (self._cache, self._session))
            if self._ask("--sha256", cached) == hashes:
                self._folders[bundle] = cached
                continue
            self._folders[bundle] = folder = cached if self.options.keep else fresh
            self._send(files, folder, label, progress)
            if self._ask("--sha256", folder) != hashes:
                raise BuildFailed(f"{self.name}: {label} arrived damaged, or {folder} holds other files")

    def _send(self, files: Mapping[str, Path], folder: str, label: str, progress: Progress) -> None:
        """Copy files into a folder there, as a stream of tar."""
        quoted = shlex.quote(folder)
        unpack = f"umask 077; mkdir -p {quoted} && exec tar -xf - -C {quoted}"
        command = [*self._shell, f"exec sh -c {shlex.quote(unpack)}"]
        total, copied = sum(path.stat().st_size for path in files.values()), 0
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        # Where tar ends early, its code and message say why.
        with suppress(OSError), tarfile.open(fileobj=process.stdin, mode="w|", dereference=True) as archive:
            for name, path in files.items():
                archive.add(path, name)
                copied += path.stat().st_size
                progress(copied, total, f"{label}: {copied / 1e6:.0f} of {total / 1e6:.0f} MB copied")
        _, stderr = process.communicate()
        if process.returncode:
            why = stderr.decode("utf-8", "replace").strip()
            raise BuildFailed(f"{self.name}: {label} could not be copied, code {process.returncode}:\n{why}")


def onnxruntime_version(bundles: Mapping[str, Path]) -> str | None:
    """The version that a packed bundle was checked with, else this machine's."""
    for bundle in bundles.values():
        versions = read_json(bundle / MANIFEST).get("provenance", {}).get("versions", {})
        if version := versions.get("onnxruntime"):
            return str(version)
    return installed_version("onnxruntime")
