"""`arm64-emulated`: what a bundle computes under onnxruntime's ARM64 kernels, in an emulator. Never a speed.

qemu-user runs an ARM64 Python with the ARM64 wheels of numpy and of the onnxruntime that is installed here.
x86 and ARM kernels do not give the same logits for int4 weights. With KleidiAI, ARM's default, the KL of a
symmetric graph was six times larger; an asymmetric one showed no such gap (why was not traced). So a bundle
is run three ways on the same token ids: here, emulated, and emulated with `mlas.disable_kleidiai=1`; each is
held against the same weights with exact products (kernels.py).

`--setup` fetches the Python from the distribution's own package index (apt, 16 MB) and the wheels from PyPI,
into the cache; nothing is installed. Two traps: the ARM onnxruntime reads /proc/cpuinfo and dies of the
host's x86 one, so the root has one of an ARM core; and the features named there must be the emulator's.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from edgedisp.bench import kernels
from edgedisp.bench.devices import Address, Wanted
from edgedisp.bench.machine import installed_version
from edgedisp.bench.timing import check
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress

QEMU = ("qemu-aarch64-static", "qemu-aarch64")
PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "libgomp1")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
FEATURES = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
)
CPUINFO = (
    "processor\t: {cpu}\nBogoMIPS\t: 100.00\nFeatures\t: " + FEATURES + "\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n"
)
WITHOUT_KLEIDIAI = ("--session", "mlas.disable_kleidiai=1")
HERE, ARM, ARM_WITHOUT = "x86-64, here", "ARM64", "ARM64 without KleidiAI"


@contextmanager
def opened(address: Address, bundles: Mapping[str, Path], wanted: Wanted) -> Iterator[Emulated]:
    """The emulator as a device; see `devices.py`. Raises BadInput where something it needs is missing."""
    check(bundles)
    if platform.machine().lower() in ("aarch64", "arm64"):
        raise BadInput(f"{address.name}: this machine is ARM64 itself; --device local runs the same kernels")
    qemu = next((found for name in QEMU if (found := shutil.which(name))), None)
    if qemu is None:
        raise BadInput(f"{address.name}: needs qemu's user emulation; `apt-get install qemu-user-static`")
    root = wanted.cache / f"arm64-onnxruntime-{installed_version('onnxruntime')}"
    if not root.is_dir() and not wanted.setup:
        raise BadInput(
            f"{address.name}: needs an ARM64 Python with onnxruntime in {root}; --setup fetches it (Debian "
            "packages and wheels, 60 MB)"
        )
    if not root.is_dir():
        fetch(root)
    yield Emulated(address.name, qemu, root, bundles, wanted)


class Emulated:
    """An emulated ARM64 processor that computes logits."""

    def __init__(self, name: str, qemu: str, root: Path, bundles: Mapping[str, Path], wanted: Wanted) -> None:
        self.name, self.bundles, self.wanted = name, bundles, wanted
        system = root / "root"
        program = str(wanted.runner)
        self.here = [sys.executable, program]
        self.arm = [qemu, "-cpu", "max", "-L", str(system), str(python_of(system)), program]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LD_"))}
        self.environment = {**kept, "PYTHONPATH": str(root / "site")}

    def measure(self, progress: Progress) -> dict[str, Any]:
        """Logits of every bundle three ways, compared; see `devices.py` for the shape."""
        rows: list[dict[str, Any]] = []
        total = 3 * len(self.bundles)
        tokens = 0
        for label, bundle in self.bundles.items():
            ids = self.wanted.ids(bundle)
            tokens = len(ids)
            with tempfile.TemporaryDirectory(prefix="edgedisp-") as scratch:
                note = partial(progress, len(rows), total)
                rows += self._compare(label, bundle, ids, Path(scratch), note)
        return {
            "device": self.name,
            "machine": {"cpu": "qemu-user, -cpu max", "architecture": "arm64", "features": FEATURES.split()},
            "logits": {"tokens": tokens, "rows": rows},
            "warnings": ["emulated: correctness alone, no speed can be read from it"],
        }

    def _compare(
        self, label: str, bundle: Path, ids: list[int], scratch: Path, note: Callable[[str], None]
    ) -> list[dict[str, Any]]:
        """One row for each kind of kernels."""

        def run(command: list[str], folder: Path, *options: str) -> kernels.Logits:
            emulated = command is self.arm
            return kernels.logits(
                command,
                folder,
                ids,
                scratch,
                options=("--threads", "1", *options),
                environment=self.environment if emulated else None,
                timeout_s=self.wanted.timeout_s,
            )

        note(f"{label}: {HERE}")
        found = {HERE: run(self.here, bundle)}
        exact = run(self.here, scratch / "exact") if kernels.exact_copy(bundle, scratch / "exact") else None
        for kind, options in ((ARM, ()), (ARM_WITHOUT, WITHOUT_KLEIDIAI)):
            note(f"{label}: {kind}")
            found[kind] = run(self.arm, bundle, *options)
        rows = []
        for kind, values in found.items():
            to_x86 = kernels.divergence(found[HERE], values)
            rows.append(
                {
                    "label": label,
                    "kernels": kind,
                    "perplexity": kernels.perplexity(values, ids),
                    "kl_to_x86": to_x86["mean_kl"],
                    "top1_agreement": to_x86["top1_agreement"],
                    "kl_to_exact": None if exact is None else kernels.divergence(exact, values)["mean_kl"],
                }
            )
        return rows


def python_of(root: Path) -> Path:
    """The Python program below `root`, its real file: qemu -L does not follow absolute links."""
    found = sorted((root / "usr/bin").glob("python3.*[0-9]"))
    if not found:
        raise BadInput(f"{root}: holds no Python; remove the folder above it and use --setup again")
    return found[-1]


def fetch(root: Path) -> None:
    """Fetch Python and wheels for ARM64 into `root`, which appears whole or not at all."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise BadInput(f"arm64-emulated: --setup needs `{program}` (Debian, Ubuntu)")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".arm64-", dir=root.parent) as scratch:
        made = Path(scratch) / "made"
        system = made / "root"
        system.mkdir(parents=True)
        _fetch_packages(system, Path(scratch) / "apt")
        python = python_of(system)
        _fetch_wheels(made / "site", Path(scratch) / "wheels", python.name.removeprefix("python"))
        (system / "proc").mkdir(exist_ok=True)
        text = "".join(CPUINFO.format(cpu=cpu) for cpu in range(os.cpu_count() or 1))
        (system / "proc/cpuinfo").write_text(text, encoding="ascii")
        made.rename(root)


def _fetch_packages(system: Path, apt: Path) -> None:
    """Unpack Debian packages for ARM64 below `system`; apt's own state and cache lie in the folder `apt`."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "Dir::State": apt,
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Debug::NoLocking": "1",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    _run(["apt-get", "-qq", *options, "update"])
    options += ["--download-only", "--no-install-recommends", "-y"]
    _run(["apt-get", "-qq", *options, "install", *PACKAGES])
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(system)])


def _fetch_wheels(site: Path, wheels: Path, python: str) -> None:
    """Unpack the ARM64 wheels of numpy and of this machine's version of onnxruntime into `site`."""
    chosen = [word for name in PLATFORMS for word in ("--platform", name)]
    chosen += ["--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    wanted = [f"onnxruntime=={installed_version('onnxruntime')}", "numpy"]
    _run([sys.executable, "-m", "pip", "download", "--quiet", "-d", str(wheels), *chosen, *wanted])
    site.mkdir()
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise BuildFailed(f"arm64-emulated: `{command[0]}` failed: {said[-1]}")
