"""What this machine is, in one place: `describe()` for records, `doctor()` for people.

A latency without the machine it was measured on is worth nothing, so every measurement carries `describe()`.
Only small system files are read (`hardware.py`, `cores.py`) and no package is imported to learn its version,
so asking is cheap.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from edgedisp.bench.cores import cpu_quota, logical_cpus, physical_cores
from edgedisp.bench.doctor import doctor
from edgedisp.bench.hardware import cpu_features, cpu_model, memory, readings

__all__ = ["describe", "doctor", "physical_cores", "readings"]

PACKAGES = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "onnxruntime-genai")


def describe(root: Path = Path("/"), told: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The machine in plain JSON values: processor, cores, memory in bytes, system, versions of packages.

    For another machine, `root` holds copies of its system files and `told` what it said of itself: {cpus [the
    numbers a process may run on], architecture, system, python, packages {}}. None: this machine.
    """
    seen = _here() if told is None else told
    return {
        "cpu": cpu_model(root),
        "architecture": seen["architecture"],
        "features": cpu_features(root),
        "physical_cores": physical_cores(root, seen["cpus"]),
        "logical_cpus": len(seen["cpus"]),
        "cpu_quota": cpu_quota(root),
        **memory(root),
        "system": seen["system"],
        "python": seen["python"],
        "packages": seen["packages"],
    }


def _here() -> dict[str, Any]:
    return {
        "architecture": platform.machine(),
        "cpus": sorted(logical_cpus()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
    }


def installed_version(package: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
