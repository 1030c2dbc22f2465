"""`ssh://` devices: a shell stands for ssh, all behind it is real. tests/slow has a real sshd."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_bundle import Bundles, order

from edgedisp.bench import devices, ssh
from edgedisp.bench.devices import BenchOptions
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import write_json
from edgedisp.core.progress import silent
from edgedisp.core.results import DeviceResult


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HOME of the far end; `ssh` is a program that runs the command here, with that HOME."""
    home = tmp_path / "home"
    home.mkdir()
    text = 'while [ "$1" != -- ]; do shift; done\nshift 2\n'
    text += f'HOME={home} XDG_CACHE_HOME= RUSTUP_HOME=/tmp/rustup exec sh -c "$1"'
    monkeypatch.setenv("EDGEDISP_SSH", str(script(tmp_path / "ssh", text)))
    return home


def measure(bundles: Bundles, progress: Any = silent, **changes: Any) -> DeviceResult:
    sizes: dict[str, Any] = {"prompt": 6, "generate": 5, "repetitions": 2, "threads": 1}
    options = BenchOptions(**{**sizes, "remote_python": sys.executable, **changes})
    with devices.connect(devices.parse("ssh://box"), bundles, options) as device:
        return device.measure(progress)


def files(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if path.is_file())


def left(home: Path) -> bool:
    """Whether anything of ours stays; a far end whose connection broke takes a moment to clean up."""
    deadline = time.monotonic() + 10
    while list(home.glob(".cache/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(list(home.glob(".cache/*")))


def test_bundles_are_timed_and_scored_there_and_nothing_is_left(bundles: Bundles, home: Path) -> None:
    during: list[str] = []
    requests = {"fp32": [[([3, 4], [5]), ([3, 4], [6])]]}
    timed = measure(bundles, lambda *_: during.extend(files(home)), requests=requests)
    assert order(timed) == ["fp32", "twin", "int4", "int4", "twin", "fp32"]
    assert timed.device == "ssh://box" and timed.machine["packages"]["onnxruntime"]
    assert {"runner.py", "model.onnx", "model.onnx.data"} <= set(during) and "tokenizer.json" not in during
    assert len(timed.answers["fp32"][0]) == 2 and not left(home)


def test_the_cache_is_used_again_only_if_hashes_match(bundles: Bundles, home: Path) -> None:
    fp32 = {"a": bundles["fp32"]}
    copied: list[str] = []

    def note(done: int, total: int, text: str) -> None:
        copied.extend([text] if text.endswith("copied") else [])

    measure(fp32, note, keep=True)
    assert copied and files(home) == ["genai_config.json", "model.onnx", "model.onnx.data"]
    assert (home / ".cache" / "edgedisp").stat().st_mode & 0o777 == 0o700
    copied.clear()
    measure(fp32, note)
    assert not copied
    weights = next(home.rglob("model.onnx.data"))
    weights.write_bytes(bytes(weights.stat().st_size))  # another user's, or damaged
    measure(fp32, note)
    assert copied


def test_a_cache_of_another_user_is_refused(bundles: Bundles, home: Path, tmp_path: Path) -> None:
    (home / ".cache").mkdir()
    (home / ".cache" / "edgedisp").symlink_to(tmp_path)
    with pytest.raises(BadInput, match=r"ssh://box: .* ended with code 1:\n.*another user; remove it"):
        measure({"a": bundles["fp32"]})


def test_a_connection_that_breaks_keeps_what_was_measured(bundles: Bundles, home: Path) -> None:
    def cut(done: int, total: int, note: str) -> None:
        if "tokens/s" in note and done == 3 + 4:
            for child in psutil.Process().children(recursive=True):
                if "--interactive" in child.cmdline():
                    os.kill(child.pid, signal.SIGKILL)

    lost = measure(bundles, cut)
    assert lost.lost and order(lost) == ["fp32", "twin", "int4", "int4"] and not left(home)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remote_python": "/no/such"}, r"no Python 3\.9 or newer there; install"),
        ({"remote_python": "bare"}, "has no numpy and no onnxruntime; --setup installs it"),
        ({"remote_python": "bare", "setup": True}, "failed there with code"),
    ],
)
def test_what_the_far_end_lacks_is_named(  # type: ignore[no-untyped-def]
    bundles: Bundles, home: Path, monkeypatch: pytest.MonkeyPatch, changes, message: str
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    if changes["remote_python"] == "bare":  # finds no package
        python = script(home.parent / "bare", f'exec "{sys.executable}" -I -S "$@"')
        changes = {**changes, "remote_python": str(python)}
    with pytest.raises((BadInput, BuildFailed), match=message):
        measure({"a": bundles["fp32"]}, **changes)
    assert not left(home)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("PROGRAM_BYTES", "MiB of memory are free there, and a takes at least"),
        ("SPARE_DISK_BYTES", "MiB of disk are free in"),
    ],
)
def test_too_little_memory_or_disk_is_an_error_before_anything_is_copied(
    bundles: Bundles, home: Path, monkeypatch: pytest.MonkeyPatch, limit: str, message: str
) -> None:
    monkeypatch.setattr(ssh, limit, 1 << 60)
    with pytest.raises(BadInput, match=message):
        measure({"a": bundles["fp32"]})
    assert not files(home)


def test_errors_of_ssh_are_shown(bundles: Bundles, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, message in (
        ("echo 'ssh: Connection refused' >&2; exit 255", r"ended with code 255:\nssh: Connection refused"),
        ("echo Welcome; cat > /dev/null", r"'Welcome'.* prints text before a command runs"),
    ):
        script(home.parent / "ssh", text)
        with pytest.raises(BadInput, match=message):
            measure({"a": bundles["fp32"]})
    monkeypatch.setenv("EDGEDISP_SSH", "no-such-ssh -F x")
    with pytest.raises(BadInput, match="there is no `no-such-ssh` here"):
        measure({"a": bundles["fp32"]})


def test_setup_installs_the_onnxruntime_that_the_bundle_was_checked_with(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"provenance": {"versions": {"onnxruntime": "1.27.0"}}})
    assert ssh.onnxruntime_version({"a": tmp_path / "none", "b": tmp_path}) == "1.27.0"
    assert ssh.onnxruntime_version({"a": tmp_path / "none"}) is not None
