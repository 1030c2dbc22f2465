"""`edgedisp doctor`: is all here that a build needs, and if not, which command gets it?

Each row is {check, status, found, advice}: status `ok`, `warn` (works, but worse than it could) or `missing`
(something will not work), advice "" where there is nothing to do. Versions are compared with the bounds in
the installed distribution's own metadata, so that they are written down once, in pyproject.toml. No package
is imported for it, and the network is asked only on request.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypedDict

from edgedisp.bench.cores import cpu_quota, logical_cpus, physical_cores
from edgedisp.bench.hardware import cpu_features, cpu_model, memory

Status = Literal["ok", "warn", "missing"]

GIB = 1 << 30
DISK_NEEDED = 5 * GIB  # two arms of a 135M model: weights, checkpoints with optimizer states, six bundles
MEMORY_NEEDED = (
    6 * GIB
)  # fp32 weights, gradients and AdamW states of 135M, and the activations of 4 x 256 tokens


class Row(TypedDict):
    """One line of the doctor's report."""

    check: str
    status: Status
    found: str
    advice: str


def doctor(
    folders: Mapping[str, Path] | None = None,
    *,
    root: Path = Path("/"),
    distribution: str = "edgedisp",
    hub: str | None = None,
) -> list[Row]:
    """All rows. `folders` names the folders whose free disk counts (default: the working folder).

    `hub`: address of a model hub to try, e.g. "https://huggingface.co"; None asks no network.
    """
    rows = [*_packages(distribution), *_processor(root), *_memory(root)]
    rows += [_disk(name, path) for name, path in (folders or {"working folder": Path.cwd()}).items()]
    rows += [_graphics(), _pip()]
    if hub is not None:
        rows.append(_hub(hub))
    return rows


def _row(check: str, status: Status, found: str, advice: str = "") -> Row:
    return {"check": check, "status": status, "found": found, "advice": advice}


def _packages(distribution: str) -> Iterator[Row]:
    """Rows for Python, the distribution, each of its requirements and each of its extras."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python = platform.python_version()
    try:
        wanted = [Requirement(text) for text in metadata.requires(distribution) or []]
        bounds = SpecifierSet((metadata.metadata(distribution).get_all("Requires-Python") or [""])[0])
        fits = bounds.contains(python, prereleases=True)
        yield _row("python", "ok" if fits else "missing", python, "" if fits else f"install Python {bounds}")
        yield _row(distribution, "ok", metadata.version(distribution))
    except metadata.PackageNotFoundError:
        advice = f"{sys.executable} -m pip install -e . in a checkout, or pip install {distribution}"
        yield _row(distribution, "missing", "not installed as a distribution", advice)
        return
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            status, found = _version(requirement)
            yield _row(requirement.name, status, found, "" if status == "ok" else _install([requirement]))
    for extra in metadata.metadata(distribution).get_all("Provides-Extra") or []:
        yield _extra(distribution, extra, wanted)


def _extra(distribution: str, extra: str, wanted: list[Any]) -> Row:
    """One row for an optional extra: ok, or a warning with what it lacks and the command that gets it.

    The command names the packages themselves: it works wherever the distribution came from.
    """
    optional = [r for r in wanted if r.marker and not r.marker.evaluate({"extra": ""})]
    own = [r for r in optional if r.marker.evaluate({"extra": extra}) and r.name != distribution]
    lacking = [r for r in own if _version(r)[0] != "ok"]
    if not lacking:
        return _row(f"extra [{extra}]", "ok", "complete")
    found = "without " + ", ".join(f"{r.name} ({_version(r)[1]})" for r in lacking)
    return _row(f"extra [{extra}]", "warn", found, _install(lacking))


def _version(requirement: Any) -> tuple[Status, str]:
    """Is the requirement's package installed, within its bounds? Pre-releases count, local labels do not."""
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "missing", "not installed"
    if requirement.specifier.contains(found, prereleases=True):
        return "ok", found
    return "warn", f"{found}, tried with {requirement.specifier}"


def _install(requirements: list[Any]) -> str:
    """The command that gets these packages within their bounds."""
    return f"{sys.executable} -m pip install " + " ".join(f'"{r.name}{r.specifier}"' for r in requirements)


def _processor(root: Path) -> Iterator[Row]:
    """CPU features that decide the kernels, and the threads that a run will use."""
    features = cpu_features(root)
    fast = {"avx512_vnni", "avx_vnni", "dotprod", "i8mm"} & set(features)
    found = f"{cpu_model(root) or 'unknown'}: {' '.join(features) or 'no known features'}"
    advice = "" if fast else "int8 and int4 run on slower kernels here (no VNNI, no dot product)"
    yield _row("processor", "ok" if fast else "warn", found, advice)
    quota = cpu_quota(root)
    limit = "no quota" if quota is None else f"a quota of {quota:g} CPUs"
    cores = physical_cores(root)
    tight = quota is not None and quota < 1
    advice = "less than one CPU: timings will be those of a throttled machine" if tight else ""
    yield _row(
        "threads", "warn" if tight else "ok", f"{cores} cores, {len(logical_cpus())} CPUs, {limit}", advice
    )


def _memory(root: Path) -> Iterator[Row]:
    seen = memory(root)
    total, available, limit = (seen[f"memory{part}_bytes"] for part in ("", "_available", "_limit"))
    if total is None or available is None:
        yield _row("memory", "warn", "the system does not tell", "watch it during the first build")
        return
    found = f"{available / GIB:.1f} of {total / GIB:.1f} GiB free"
    found += f", container limit {limit / GIB:.1f} GiB" if limit else ""
    short = available < MEMORY_NEEDED
    needed = f"training 135M parameters takes about {MEMORY_NEEDED / GIB:.0f} GiB; an adapter takes less"
    yield _row("memory", "warn" if short else "ok", found, needed if short else "")


def _disk(name: str, folder: Path) -> Row:
    """Free bytes where `folder` is or will be made."""
    standing = folder.absolute()
    while not standing.exists():
        standing = standing.parent
    free = shutil.disk_usage(standing).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    if not os.access(standing, os.W_OK):
        return _row(f"disk, {name}", "missing", f"{standing} is not writable", "choose another folder")
    short = free < DISK_NEEDED
    advice = f"a build of 135M parameters takes about {DISK_NEEDED / GIB:.0f} GiB" if short else ""
    return _row(f"disk, {name}", "warn" if short else "ok", found, advice)


def _graphics() -> Row:
    """A GPU is optional. torch is not imported: its version's label names the build ("+cpu", "+cu128")."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return _row("gpu", "ok", "none found; training runs on the CPU")
    done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
    cards = [line.split(" (UUID")[0] for line in done.stdout.splitlines() if line.startswith("GPU ")]
    if done.returncode or not cards:
        return _row("gpu", "warn", "nvidia-smi finds no card", "check the driver")
    try:
        build = metadata.version("torch")
    except metadata.PackageNotFoundError:
        build = "none"
    if "+cpu" in build:
        advice = "this torch cannot use it; install a CUDA build: https://pytorch.org/get-started/locally/"
        return _row("gpu", "warn", f"{', '.join(cards)}; torch {build}", advice)
    return _row("gpu", "ok", f"{', '.join(cards)}; torch {build}")


def _pip() -> Row:
    """`pypi:` sources are fetched by this Python's own pip."""
    # Not `find_spec`: looking for the module makes setuptools take this process for pip's own, for good.
    try:
        return _row("pip", "ok", metadata.version("pip"))
    except metadata.PackageNotFoundError:
        return _row("pip", "missing", "this Python has no pip", f"{sys.executable} -m ensurepip")


def _hub(address: str) -> Row:
    """Does the hub answer? Any answer of the server counts, an error page too."""
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5):
            pass
    except urllib.error.HTTPError:
        pass
    except (OSError, ValueError) as error:
        advice = "hub models and data sets cannot be fetched; pypi: sources, local folders and files work"
        return _row("hub", "warn", f"{address}: {error}", advice)
    return _row("hub", "ok", f"{address} answers")
