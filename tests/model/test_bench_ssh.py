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
from tiny_bundle import order

from edgedisp.bench import devices, ssh
from edgedisp.bench.devices import BenchOptions
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import write_json
from edgedisp.core.progress import silent
from edgedisp.core.results import DeviceResult


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HOME of the far end; `ssh` is a program that runs the command here, with that HOME."""
    home = tmp_path / "home"
    home.mkdir()
    program = tmp_path / "ssh"
    program.write_text(
        '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift 2\n'
        f'HOME={home} XDG_CACHE_HOME= RUSTUP_HOME=/tmp/rustup exec sh -c "$1"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("EDGEDISP_SSH", str(program))
    return home


def measure(bundles: dict[str, Path], progress: Any = silent, **changes: Any) -> DeviceResult:
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


def bare_python(folder: Path) -> str:
    """A Python that finds no package."""
    program = folder / "bare"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_bundles_are_timed_and_scored_there_and_nothing_is_left(bundles: dict[str, Path], home: Path) -> None:
    during: list[str] = []
    requests = {"fp32": [[([3, 4], [5]), ([3, 4], [6])]]}
    timed = measure(bundles, lambda *_: during.extend(files(home)), requests=requests)
    assert order(timed) == ["fp32", "twin", "int4", "int4", "twin", "fp32"]
    assert timed.device == "ssh://box" and timed.machine["packages"]["onnxruntime"]
    assert {"runner.py", "model.onnx", "model.onnx.data"} <= set(during) and "tokenizer.json" not in during
    assert len(timed.answers["fp32"][0]) == 2 and not left(home)


def test_what_is_kept_is_used_again_only_if_its_hashes_are_right(
    bundles: dict[str, Path], home: Path
) -> None:
    one = {"a": bundles["fp32"]}
    copied: list[str] = []

    def note(done: int, total: int, text: str) -> None:
        copied.extend([text] if text.endswith("copied") else [])

    measure(one, note, keep=True)
    assert copied and files(home) == ["genai_config.json", "model.onnx", "model.onnx.data"]
    assert (home / ".cache" / "edgedisp").stat().st_mode & 0o777 == 0o700
    copied.clear()
    measure(one, note)
    assert not copied
    weights = next(home.rglob("model.onnx.data"))
    weights.write_bytes(bytes(weights.stat().st_size))  # another user's, or damaged
    measure(one, note)
    assert copied


def test_a_cache_that_is_not_ones_own_is_refused(
    bundles: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    (home / ".cache").mkdir()
    (home / ".cache" / "edgedisp").symlink_to(tmp_path)
    with pytest.raises(BadInput, match=r"ssh://box: .* ended with code 1:\n.*another user; remove it"):
        measure({"a": bundles["fp32"]})


def test_a_connection_that_breaks_keeps_what_was_measured(bundles: dict[str, Path], home: Path) -> None:
    def cut(done: int, total: int, note: str) -> None:
        if "tokens/s" in note and done == 3 + 4:
            for child in psutil.Process().children(recursive=True):
                if "--interactive" in child.cmdline():
                    os.kill(child.pid, signal.SIGKILL)

    lost = measure(bundles, cut)
    assert lost.lost and order(lost) == ["fp32", "twin", "int4", "int4"] and not left(home)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"remote_python": "/no/such"}, r"no Python 3\.9 or newer there; install"),
        ({"remote_python": "bare"}, "has no numpy and no onnxruntime; --setup installs it"),
        ({"remote_python": "bare", "setup": True}, "failed there with code"),
    ],
)
def test_what_the_far_end_lacks_is_told(
    bundles: dict[str, Path],
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    if changes["remote_python"] == "bare":
        changes = {**changes, "remote_python": bare_python(tmp_path)}
    with pytest.raises((BadInput, BuildFailed), match=said):
        measure({"a": bundles["fp32"]}, **changes)
    assert not left(home)


def test_too_little_memory_or_disk_is_told_before_anything_is_copied(
    bundles: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "PROGRAM_BYTES", 1 << 50)
    with pytest.raises(BadInput, match="MiB of memory are free there, and a takes at least"):
        measure({"a": bundles["fp32"]})
    monkeypatch.undo()
    monkeypatch.setenv("EDGEDISP_SSH", str(home.parent / "ssh"))
    monkeypatch.setattr(ssh, "SPARE_DISK_BYTES", 1 << 60)
    with pytest.raises(BadInput, match="MiB of disk are free in"):
        measure({"a": bundles["fp32"]})


def test_ssh_speaks_for_itself(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ssh"
    program.write_text(
        "#!/bin/sh\necho 'ssh: connect to host box port 22: Connection refused' >&2; exit 255\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("EDGEDISP_SSH", str(program))
    with pytest.raises(BadInput, match=r"ended with code 255:\nssh: connect to host box port 22: Connection"):
        measure({"a": bundles["fp32"]})
    program.write_text("#!/bin/sh\necho Welcome; cat > /dev/null\n")
    with pytest.raises(BadInput, match=r"'Welcome'.* prints text before a command runs"):
        measure({"a": bundles["fp32"]})
    monkeypatch.setenv("EDGEDISP_SSH", "no-such-ssh -F x")
    with pytest.raises(BadInput, match="there is no `no-such-ssh` here"):
        measure({"a": bundles["fp32"]})


def test_setup_installs_the_onnxruntime_that_the_bundle_was_checked_with(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"provenance": {"versions": {"onnxruntime": "1.27.0"}}})
    assert ssh.onnxruntime_version({"a": tmp_path / "none", "b": tmp_path}) == "1.27.0"
    assert ssh.onnxruntime_version({"a": tmp_path / "none"}) is not None
