"""`edgedisp doctor`: is everything installed that a build needs, and if not, which command installs it?

Each row is {check, status, found, advice}: status `ok`, `warn` (works, but worse than it could) or `missing`
(something will not work). Versions are compared with the bounds in the installed distribution's own metadata.
No package is imported for it, and no network is used.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypedDict

from edgedisp.bench.system import FAST_ON_ARM, FAST_ON_X86, describe

Status = Literal["ok", "warn", "missing"]

GIB = 1 << 30
DISK_NEEDED = 5 * GIB  # two arms of a 135M model: weights, checkpoints with optimizer states, six bundles
MEMORY_NEEDED = 6 * GIB  # fp32 weights, gradients and AdamW states of 135M, activations of 4 x 256 tokens


class Row(TypedDict):
    """One line of the doctor's report."""

    check: str
    status: Status
    found: str
    advice: str


def doctor(folders: Mapping[str, Path] | None = None, *, distribution: str = "edgedisp") -> list[Row]:
    """All rows. `folders` names the folders whose free disk counts (default: the working folder)."""
    machine = describe()
    rows = [*_packages(distribution), *_processor(machine), _memory(machine)]
    return rows + [_disk(name, path) for name, path in (folders or {"working folder": Path.cwd()}).items()]


def _row(check: str, status: Status, found: str, advice: str = "") -> Row:
    return {"check": check, "status": status, "found": found, "advice": advice}


def _packages(distribution: str) -> Iterator[Row]:
    """Rows for Python, the distribution, each of its requirements and each of its extras."""
    from packaging.requirements import Requirement

    try:
        about = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        advice = f"{sys.executable} -m pip install -e . in a checkout, or pip install {distribution}"
        yield _row(distribution, "missing", "not installed as a distribution", advice)
        return
    python = Requirement(f"python{(about.get_all('Requires-Python') or [''])[0]}")
    version = platform.python_version()
    fits = python.specifier.contains(version, prereleases=True)
    yield _row("python", "ok" if fits else "missing", version, "" if fits else f"install {python}")
    yield _row(distribution, "ok", metadata.version(distribution))
    requirements = [Requirement(text) for text in metadata.requires(distribution) or []]
    optional = [r for r in requirements if r.marker and not r.marker.evaluate({"extra": ""})]
    for requirement in requirements:
        if requirement not in optional:
            status, version = _version(requirement)
            yield _row(requirement.name, status, version, "" if status == "ok" else _install([requirement]))
    for extra in about.get_all("Provides-Extra") or []:
        members = [r for r in optional if r.name != distribution and r.marker.evaluate({"extra": extra})]  # type: ignore[union-attr]
        lacking = [r for r in members if _version(r)[0] != "ok"]
        text = (
            "without " + ", ".join(f"{r.name} ({_version(r)[1]})" for r in lacking) if lacking else "complete"
        )
        yield _row(
            f"extra [{extra}]", "warn" if lacking else "ok", text, _install(lacking) if lacking else ""
        )


def _version(requirement: Any) -> tuple[Status, str]:
    """Is the requirement's package installed, within its bounds? Pre-releases count, local labels do not."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "missing", "not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return "ok", version
    return "warn", f"{version}, tried with {requirement.specifier}"


def _install(requirements: list[Any]) -> str:
    """The command that gets these packages within their bounds."""
    return f"{sys.executable} -m pip install " + " ".join(f'"{r.name}{r.specifier}"' for r in requirements)


def _processor(machine: Mapping[str, Any]) -> Iterator[Row]:
    """CPU features that decide the kernels, and the threads that a run will use."""
    features = machine["features"]
    fast = bool((FAST_ON_X86 | FAST_ON_ARM) & set(features))
    text = f"{machine['cpu'] or 'unknown'}: {' '.join(features) or 'no known features'}"
    advice = "" if fast else "int8 and int4 run on slower kernels here (no VNNI, no dot product)"
    yield _row("processor", "ok" if fast else "warn", text, advice)
    quota = machine["cpu_quota"]
    tight = quota is not None and quota < 1
    advice = "less than one CPU: timings will be those of a throttled machine" if tight else ""
    limit = "no quota" if quota is None else f"a quota of {quota:g} CPUs"
    text = f"{machine['physical_cores']} cores, {machine['logical_cpus']} CPUs, {limit}"
    yield _row("threads", "warn" if tight else "ok", text, advice)


def _memory(machine: Mapping[str, Any]) -> Row:
    total, available = machine["memory_bytes"], machine["memory_available_bytes"]
    if total is None or available is None:
        return _row("memory", "warn", "the system does not tell", "watch it during the first build")
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB free"
    if available >= MEMORY_NEEDED:
        return _row("memory", "ok", text)
    needed = f"training 135M parameters takes about {MEMORY_NEEDED / GIB:.0f} GiB; an adapter takes less"
    return _row("memory", "warn", text, needed)


def _disk(name: str, folder: Path) -> Row:
    """Free bytes where `folder` is or will be made."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        return _row(f"disk, {name}", "missing", f"{parent} is not writable", "choose another folder")
    free = shutil.disk_usage(parent).free
    text, check = f"{free / GIB:.1f} GiB free in {folder}", f"disk, {name}"
    if free >= DISK_NEEDED:
        return _row(check, "ok", text)
    return _row(check, "warn", text, f"a build of 135M parameters takes about {DISK_NEEDED / GIB:.0f} GiB")
