#!/usr/bin/env python3
"""The far end of a device that is reached through a pipe: looks around, takes files, cleans up after itself.

It is sent through the pipe (nothing has to be there before but Python 3.9), stays for the whole measurement,
and answers one line of JSON on stdout for each line on stdin:

    {"look": 1}                      what this machine is; see `look`
    {"readings": 1}                  copies of the system files that say what it is doing now
    {"put": NAME, "files": {PATH: {size_bytes, sha256}}, "keep": true}, then the bytes of the files, in order
                                     {"path": the folder}; it is there once every hash fits, and not before
    {"setup": [MODULE, ...], "keep": true}     a Python environment with these: {"python": PATH, "modules":
    {}} {"quit": 1}, or the end of stdin           removes what was not to be kept

What cannot be done is answered with {"failed": why}. Files lie in `edgedisp` under $XDG_CACHE_HOME or
~/.cache: in `kept`, or in a folder of this session's that goes with it, also when the connection breaks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 20
LARGEST_COPY_BYTES = 1 << 20  # of a system file; /proc/cpuinfo of 256 CPUs is 400 kB
MODULES = ("numpy", "onnxruntime")
ROOT = Path("/")
QUIETLY = ("--disable-pip-version-check", "--no-cache-dir")  # a cache of pip's own would stay behind
CHECK = (
    "import importlib.metadata, json, sys; names = sys.argv[1:]; [__import__(name) for name in names]; "
    "print(json.dumps({name: importlib.metadata.version(name) for name in names}))"
)

# What `readings` needs, and what `look` needs beside it.
READINGS = (
    "proc/stat",
    "proc/loadavg",
    "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq",
    "sys/class/thermal/thermal_zone*/temp",
    "sys/class/power_supply/*/status",
    "sys/class/power_supply/*/energy_now",
    "sys/class/power_supply/*/charge_now",
    "sys/class/power_supply/*/voltage_now",
)
LOOK = (
    "proc/cpuinfo",
    "proc/meminfo",
    "proc/self/cgroup",
    "proc/device-tree/model",
    "sys/devices/system/cpu/cpu[0-9]*/topology/core_cpus_list",
    "sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list",
)
LIMITS = (
    "cpu.max",
    "cpu.cfs_quota_us",
    "cpu.cfs_period_us",
    "memory.max",
    "memory.current",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "memory.stat",
)
MAC = (
    "machdep.cpu.brand_string",
    "hw.memsize",
    "hw.physicalcpu",
    "hw.optional.arm.FEAT_DotProd",
    "hw.optional.arm.FEAT_I8MM",
    "hw.optional.arm.FEAT_SME",
)


class Failed(RuntimeError):
    """The request cannot be met; the message says why."""


class Session:
    """The folders of this session, made when they are needed and removed at the end."""

    def __init__(self) -> None:
        named = os.environ.get("XDG_CACHE_HOME")
        self.cache = (Path(named) if named else Path.home() / ".cache") / "edgedisp"
        standing = next(parent for parent in self.cache.parents if parent.exists())
        if not os.access(self.cache if self.cache.exists() else standing, os.W_OK):
            self.cache = Path(tempfile.gettempdir()) / f"edgedisp-{os.getuid()}"
        self.made = [folder for folder in (self.cache, *self.cache.parents) if not folder.exists()]
        self.own: Path | None = None

    @property
    def kept(self) -> Path:
        """What outlives sessions."""
        return self.cache / "kept"

    def folder(self, keep: bool) -> Path:
        """Where to put something."""
        if keep:
            self.kept.mkdir(parents=True, exist_ok=True)
            return self.kept
        if self.own is None:
            self.cache.mkdir(parents=True, exist_ok=True)
            self.own = Path(tempfile.mkdtemp(prefix="session-", dir=self.cache))
        return self.own

    def close(self) -> None:
        """Remove this session's folder, and the folders above that were made for it if nothing is in them."""
        if self.own is not None:
            shutil.rmtree(self.own, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: others are at work, or something was kept
            for folder in self.made:
                folder.rmdir()


def look(session: Session) -> dict[str, Any]:
    """{python, executable, modules, architecture, system, cpus, cache, kept, session, disk_free_bytes ...}.

    `session` is a folder that goes when this program does, for what other programs would leave behind.
    """
    standing = next(folder for folder in (session.cache, *session.cache.parents) if folder.exists())
    cpus = set(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):
        cpus = os.sched_getaffinity(0)
    kept = sorted(path.name for path in session.kept.glob("*")) if session.kept.is_dir() else []
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "modules": {name: version(name) for name in MODULES},
        "architecture": platform.machine(),
        "system": platform.platform(),
        "cpus": sorted(cpus),
        "cache": str(session.cache),
        "kept": kept,
        "session": str(session.folder(keep=False)),
        "disk_free_bytes": shutil.disk_usage(standing).free,
        "files": copies((*LOOK, *READINGS, *limits())),
    }


def version(module: str) -> str | None:
    """Version of a module that can be imported; None where it is absent, "" where its version is not told."""
    from importlib import metadata, util

    if util.find_spec(module) is None:
        return None
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return ""


def limits() -> Iterator[str]:
    """Patterns of the control groups' limits: of this process's own groups, their parents and the top."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    tops = {"": ["", "unified"]}
    for line in lines:
        names, path = line.split(":", 2)[1:]
        mounts = [names, *names.split(",")] if names else ["", "unified"]
        for end in (path, *map(str, Path(path).parents)):
            tops.setdefault(end.strip("/"), []).extend(mounts)
        tops[""] += mounts
    for end, mounts in tops.items():
        for mount in dict.fromkeys(mounts):
            folder = "/".join(part for part in ("sys/fs/cgroup", mount, end) if part)
            yield from (f"{folder}/{name}" for name in LIMITS)


def copies(patterns: tuple[str, ...]) -> dict[str, str]:
    """Path below / -> text of each system file that is there. A Mac's answers stand under sysctl/."""
    found = {}
    for pattern in dict.fromkeys(patterns):
        paths = sorted(ROOT.glob(pattern)) if set(pattern) & set("*[") else [ROOT / pattern]
        for path in paths:
            with contextlib.suppress(OSError), path.open("rb") as file:
                text = file.read(LARGEST_COPY_BYTES).decode("utf-8", "replace")
                found[str(path.relative_to(ROOT))] = text
    if sys.platform == "darwin":
        for key in MAC:
            done = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True)
            if done.returncode == 0:
                found[f"sysctl/{key}"] = done.stdout
        found["proc/loadavg"] = " ".join(map(str, os.getloadavg()))
    return found


def put(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """Take the files of one folder from stdin. The folder gets its name when all of them are right."""
    files: dict[str, dict[str, Any]] = request["files"]
    name = checked(request["put"])
    final = session.folder(bool(request.get("keep"))) / name
    partial = Path(tempfile.mkdtemp(prefix=f"{name}.partial-", dir=final.parent))
    problem = None
    try:
        for path, entry in files.items():
            told = hashlib.sha256()
            left = int(entry["size_bytes"])
            place = partial / checked(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as file:
                while left:
                    block = sys.stdin.buffer.read(min(left, BLOCK_BYTES))
                    if not block:
                        raise EOFError  # the connection broke
                    left -= len(block)
                    told.update(block)
                    if problem is None:
                        try:
                            file.write(block)
                        except OSError as error:  # the disk is full: the rest still has to be read
                            problem = f"{place}: {error.strerror}"
            if told.hexdigest() != entry["sha256"]:
                problem = problem or f"{path}: arrived damaged"
        if problem:
            raise Failed(problem)
        if not final.exists():
            partial.rename(final)
        return {"path": str(final)}
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def checked(name: str) -> str:
    """`name` if it is a path that stays below the folder it is put into."""
    if not name or name.startswith("/") or ".." in Path(name).parts or "\\" in name:
        raise Failed(f"{name!r} is not a name below a folder")
    return name


def setup(session: Session, modules: list[str], keep: bool) -> dict[str, Any]:
    """A virtual environment of the Python that runs this, with `modules` from the package index."""
    final = session.folder(keep) / "venv"
    python = final / "bin" / "python"
    made = [[sys.executable, "-m", "venv", "--clear", str(final)]]
    made += [[str(python), "-m", "pip", "install", "--quiet", *QUIETLY, *modules]]
    made += [[str(python), "-c", CHECK, *modules]]
    for command in made:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(final, ignore_errors=True)
            said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no reason given"]
            raise Failed(f"`{' '.join(command[1:4])}` failed there: {said[-1]}")
    return {"python": str(python), "modules": json.loads(done.stdout)}


def answer(session: Session, request: dict[str, Any]) -> dict[str, Any]:
    """What one request is answered with."""
    if request.get("look"):
        return look(session)
    if request.get("readings"):
        cpuinfo = () if list(ROOT.glob(READINGS[2])) else ("proc/cpuinfo",)  # the clock stands there instead
        return {"files": copies((*READINGS, *cpuinfo))}
    if "put" in request:
        return put(session, request)
    if "setup" in request:
        return setup(session, list(request["setup"]), bool(request.get("keep")))
    raise Failed(f"unknown request {sorted(request)}")


def main() -> int:
    """Answer until the end. Ends as quietly when the connection breaks as when it is told to."""
    session = Session()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        print(json.dumps({"ready": {"pid": os.getpid()}}), flush=True)
        for line in iter(sys.stdin.buffer.readline, b""):
            request = json.loads(line)
            if request.get("quit"):
                break
            try:
                found = answer(session, request)
            except (Failed, OSError) as error:
                found = {"failed": str(error)}
            print(json.dumps(found), flush=True)
    except (EOFError, BrokenPipeError):
        return 1
    finally:
        session.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
