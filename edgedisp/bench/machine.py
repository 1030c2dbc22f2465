"""What this machine is, in one place: `describe()` for records, `doctor()` for people.

A latency without the machine it was measured on is worth nothing, so every measurement carries `describe()`.
Only small system files are read (`hardware.py`, `cores.py`) and no package is imported to learn its version,
so asking is cheap.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from edgedisp.bench.cores import cpu_quota, logical_cpus, physical_cores
from edgedisp.bench.doctor import doctor
from edgedisp.bench.hardware import cpu_features, cpu_model, memory, readings

__all__ = ["describe", "doctor", "physical_cores", "readings"]

PACKAGES = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "onnxruntime-genai")


def describe(root: Path = Path("/")) -> dict[str, Any]:
    """The machine in plain JSON values: processor, cores, memory in bytes, system, versions of packages."""
    return {
        "cpu": cpu_model(root),
        "architecture": platform.machine(),
        "features": cpu_features(root),
        "physical_cores": physical_cores(root),
        "logical_cpus": len(logical_cpus()),
        "cpu_quota": cpu_quota(root),
        **memory(root),
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
