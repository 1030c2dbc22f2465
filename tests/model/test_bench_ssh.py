"""`ssh://` devices: a shell stands for ssh, all behind it is real. tests/slow has a real sshd."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_bundle import Bundles, copy_with, order

from edgedisp.bench import devices, ssh
from edgedisp.bench.devices import BenchOptions
from edgedisp.core.errors import BadInput
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
    with devices.connect("ssh://box", bundles, options) as device:
        return device.measure(progress)


def files(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if path.is_file())


def left(home: Path) -> bool:
    """Whether anything of ours stays; a far end whose connection broke takes a moment to clean up."""
    deadline = time.monotonic() + 10
    while list(home.glob(".edgedisp*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(list(home.glob(".edgedisp*")))


def test_bundles_are_timed_and_scored_there_and_nothing_is_left(bundles: Bundles, home: Path) -> None:
    during: list[str] = []
    requests = {"fp32": [[([3, 4], [5]), ([3, 4], [6])]]}
    modes: list[int] = []

    def look(*_: Any) -> None:
        during.extend(files(home))
        modes.extend(stat.S_IMODE(folder.stat().st_mode) for folder in home.glob(".edgedisp*"))

    timed = measure(bundles, look, requests=requests)
    assert order(timed) == ["fp32", "twin", "int4", "int4", "twin", "fp32"]
    assert timed.device == "ssh://box" and timed.machine["packages"]["onnxruntime"]
    assert {"runner.py", "model.onnx", "model.onnx.data"} <= set(during) and "tokenizer.json" not in during
    assert len(timed.answers["fp32"][0]) == 2 and not left(home)
    assert set(modes) == {0o700}  # nobody else can put a file there


def test_a_connection_that_breaks_keeps_what_was_measured(bundles: Bundles, home: Path) -> None:
    def cut(done: int, total: int, note: str) -> None:
        if "tokens/s" in note and done == 3 + 4:
            for child in psutil.Process().children(recursive=True):
                if "--generate" in child.cmdline():
                    os.kill(child.pid, signal.SIGKILL)

    lost = measure(bundles, cut)
    assert lost.lost and order(lost) == ["fp32", "twin", "int4", "int4"] and not left(home)


def test_what_the_far_end_lacks_is_named(
    bundles: Bundles, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = script(home.parent / "bare", f'exec "{sys.executable}" -I -S "$@"')  # finds no package
    checked = copy_with(bundles["fp32"], tmp_path / "checked")
    write_json(checked / "manifest.json", {"provenance": {"versions": {"onnxruntime": "1.27.0"}}})
    for program, message in (
        ("/no/such", "name a Python 3.9 or newer with --remote-python"),
        (str(python), "no numpy and no onnxruntime; install there `numpy` and `onnxruntime==1.27.0`"),
    ):
        with pytest.raises(BadInput, match=message):
            measure({"a": checked}, remote_python=program)
    warning = measure({"a": checked}, repetitions=5).warnings[0]
    assert "a was checked with onnxruntime 1.27.0, and" in warning
    monkeypatch.setattr(ssh, "PROGRAM_BYTES", 1 << 60)
    with pytest.raises(BadInput, match="MiB of memory are free there, and a takes at least"):
        measure({"a": bundles["fp32"]})
    assert not left(home)


def test_errors_of_ssh_are_shown(bundles: Bundles, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, message in (
        ("echo 'ssh: Connection refused' >&2; exit 255", r"ended with code 255:\nssh: Connection refused"),
        ("echo Welcome; cat > /dev/null", r"b'Welcome.* prints text before a command runs"),
    ):
        script(home.parent / "ssh", text)
        with pytest.raises(BadInput, match=message):
            measure({"a": bundles["fp32"]})
    monkeypatch.setenv("EDGEDISP_SSH", "no-such-ssh -F x")
    with pytest.raises(BadInput, match="there is no `no-such-ssh` here"):
        measure({"a": bundles["fp32"]})
