"""A host at the other end of a pipe: what is there, the files that go there, and its readings.

`reach(command)` gives the program to start here that runs a POSIX shell command there, such as ssh's. One
such process lives as long as the device is open and runs `export/runner/edgedisp_far.py` there, which is sent
through the pipe; it answers in lines of JSON and removes what it made when the pipe closes. Each bundle that
is timed has a process of its own beside it. The far end sends copies of its system files, so that its
processor, limits, clocks and temperatures are read by the same code as this machine's.

Left out: hosts without a POSIX shell.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgedisp.bench import hardware, machine
from edgedisp.bench.devices import Wanted
from edgedisp.bench.graph_facts import needed_files
from edgedisp.bench.host import Host
from edgedisp.bench.worker import Ended, Worker
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress

FAR = "edgedisp_far.py"
NO_PYTHON = 3  # exit code of the command that looks for one
PYTHONS = ('"${XDG_CACHE_HOME:-$HOME/.cache}"/edgedisp/kept/venv/bin/python', "python3", "python")
OLDEST = (3, 9)
BLOCK_BYTES = 1 << 20
MIB = 1 << 20
SPARE_DISK_BYTES = 32 * MIB
PROGRAM_BYTES = 64 * MIB  # of memory, for Python with onnxruntime; what is loaded comes on top
ENVIRONMENT_BYTES = 400 * MIB  # of disk, for numpy and onnxruntime with what pip unpacks
PACKAGES = ("numpy", "onnxruntime")

Reach = Callable[[str], list[str]]
Explain = Callable[[int | None, str], str]


@contextmanager
def opened(
    name: str, reach: Reach, explain: Explain, bundles: Mapping[str, Path], wanted: Wanted
) -> Iterator[Remote]:
    """The host, connected and looked at, with a Python that has what the runner needs.

    `explain(code, stderr)` says in one line why `reach`'s program ended. Raises BadInput for a host that
    cannot be reached, that lacks Python or modules, or that has too little memory or disk for `bundles`.
    """
    source = (wanted.runner.parent / FAR).read_bytes()
    worker = Worker(name, reach(_bootstrap(len(source), wanted.python)), wanted.timeout_s, first=source)
    with tempfile.TemporaryDirectory(prefix="edgedisp-") as scratch:
        try:
            worker.__enter__()
        except Ended as error:
            why = _no_python(wanted) if error.code == NO_PYTHON else explain(error.code, error.said)
            raise BadInput(f"{name}: {why}") from error
        except BuildFailed as error:
            if "not JSON" not in str(error):
                raise
            silent = "its shell prints text before a command runs; let its start-up files be silent then"
            raise BadInput(f"{error}: {silent}") from error
        with _closing(worker):
            host = Remote(name, reach, worker, Path(scratch), wanted)
            host.prepare(bundles)
            yield host


@contextmanager
def _closing(worker: Worker) -> Iterator[None]:
    """End the far end politely also after a failure: it has things to remove."""
    try:
        yield
    finally:
        worker.__exit__(None, None, None)


def _bootstrap(size: int, python: str | None) -> str:
    """A shell command that has a Python run the first `size` bytes that come through the pipe."""
    tried = [shlex.quote(python)] if python else PYTHONS
    old = f"import sys; sys.exit(sys.version_info < {OLDEST})"
    script = (
        f"for p in {' '.join(tried)}; do "
        f'if "$p" -c {shlex.quote(old)} </dev/null >/dev/null 2>&1; then '
        f'exec "$p" -c "import sys; exec(sys.stdin.buffer.read({size}))"; fi; done; exit {NO_PYTHON}'
    )
    return f"exec sh -c {shlex.quote(script)}"


def _no_python(wanted: Wanted) -> str:
    tried = wanted.python or "python3 and python"
    return (
        f"no Python {OLDEST[0]}.{OLDEST[1]} or newer there (tried {tried}); install python3, or name one "
        "with --remote-python"
    )


class Remote(Host):
    """See `opened`."""

    def __init__(self, name: str, reach: Reach, far: Worker, scratch: Path, wanted: Wanted) -> None:
        self.name = name
        self._reach, self._far, self._scratch, self._wanted = reach, far, scratch, wanted
        self._runner = {wanted.runner.name: wanted.runner}
        self._places: dict[str, str] = {}  # digest -> folder there
        self._lists: dict[Path, dict[str, dict[str, Any]]] = {}  # bundle -> its files with their hashes
        self._told = self._ask({"look": 1})
        self._python = str(self._told["executable"])
        self._root = self._copy("look", self._told["files"])

    def _ask(self, request: dict[str, Any], payload: Iterable[bytes] = ()) -> dict[str, Any]:
        found = self._far.ask(request, payload)
        if "failed" in found:
            raise BuildFailed(f"{self.name}: {found['failed']}")
        return found

    def _copy(self, name: str, files: Mapping[str, str]) -> Path:
        return copied(self._scratch / name, files, self.name)

    def describe(self) -> dict[str, Any]:
        packages = {name: self._told["modules"].get(name) for name in PACKAGES}
        return machine.describe(self._root, {**self._told, "packages": packages})

    def readings(self) -> dict[str, float | None]:
        return hardware.readings(self._copy("readings", self._ask({"readings": 1})["files"]))

    def command(self, bundle: Path, options: Sequence[str]) -> list[str]:
        program = f"{self._places[_digest(_listed(self._runner))]}/{self._wanted.runner.name}"
        # onnxruntime writes files of its own into the cache folder when it is imported.
        words = ["env", f"XDG_CACHE_HOME={self._told['session']}", self._python, program]
        words += [*options, self._places[_digest(self._list(bundle))]]
        return self._reach("exec " + " ".join(map(shlex.quote, words)))

    def prepare(self, bundles: Mapping[str, Path]) -> None:
        """Refuse what cannot work there before anything is copied; fetch packages if that is asked."""
        memory = self.describe()["memory_available_bytes"]
        sizes = {
            label: sum(p.stat().st_size for p in needed_files(path).values())
            for label, path in bundles.items()
        }
        label = max(sizes, key=lambda one: sizes[one])
        if memory is not None and sizes[label] + PROGRAM_BYTES > memory:
            raise BadInput(
                f"{self.name}: {memory / MIB:.0f} MiB of memory are free there, and {label} takes at least "
                f"{(sizes[label] + PROGRAM_BYTES) / MIB:.0f}; a bundle of fewer bits takes less"
            )
        lacking = [name for name in PACKAGES if self._told["modules"].get(name) is None]
        fetched = ENVIRONMENT_BYTES if lacking and self._wanted.setup else 0
        new = {_digest(self._list(path)): sizes[label] for label, path in bundles.items()}
        needed = sum(size for key, size in new.items() if key not in self._told["kept"])
        free = int(self._told["disk_free_bytes"])
        if needed + fetched + SPARE_DISK_BYTES > free:
            raise BadInput(
                f"{self.name}: {free / MIB:.0f} MiB of disk are free in {self._told['cache']} there, and "
                f"{(needed + fetched + SPARE_DISK_BYTES) / MIB:.0f} are needed; free some, or name fewer"
            )
        if lacking and not self._wanted.setup:
            raise BadInput(
                f"{self.name}: {self._python} has no {' and no '.join(lacking)}; --setup fetches it there "
                "into a folder of its own, or name another Python with --remote-python"
            )
        if lacking:
            self._set_up()

    def _set_up(self) -> None:
        made = self._ask({"setup": list(PACKAGES), "keep": self._wanted.keep})
        self._python = made["python"]
        self._told["modules"] = made["modules"]

    def place(self, bundles: Mapping[str, Path], progress: Progress) -> None:
        self._put(_listed(self._runner), self._runner, progress, "runner")
        for label, bundle in bundles.items():
            self._put(self._list(bundle), needed_files(bundle), progress, label)

    def _list(self, bundle: Path) -> dict[str, dict[str, Any]]:
        if bundle not in self._lists:
            self._lists[bundle] = _listed(needed_files(bundle))
        return self._lists[bundle]

    def _put(
        self, listed: Mapping[str, Any], files: Mapping[str, Path], progress: Progress, label: str
    ) -> None:
        """Copy a folder there, unless it is there already: by the hash of its files."""
        key = _digest(listed)
        if key in self._places:
            return
        if key in self._told["kept"]:
            self._places[key] = f"{self._told['cache']}/kept/{key}"
            return
        total = sum(entry["size_bytes"] for entry in listed.values())

        def blocks() -> Iterator[bytes]:
            sent = 0
            for path in files.values():
                with path.open("rb") as file:
                    while block := file.read(BLOCK_BYTES):
                        yield block
                        sent += len(block)
                        progress(sent, total, f"{label}: {sent / 1e6:.0f} of {total / 1e6:.0f} MB copied")

        request = {"put": key, "files": listed, "keep": self._wanted.keep}
        self._places[key] = self._ask(request, blocks())["path"]


def copied(root: Path, files: Mapping[str, str], name: str) -> Path:
    """`root`, made anew with another machine's system files in it; `name` is that machine's."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, text in files.items():
        place = root / path
        if ".." in Path(path).parts or Path(path).is_absolute():
            raise BuildFailed(f"{name}: sent a file named {path!r}")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    return root


def _listed(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Name -> {size_bytes, sha256}."""
    found = {}
    for name, path in files.items():
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        found[name] = {"size_bytes": path.stat().st_size, "sha256": sha256}
    return found


def _digest(listed: Mapping[str, Any]) -> str:
    """The name of a folder with these files on the host."""
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:32]
