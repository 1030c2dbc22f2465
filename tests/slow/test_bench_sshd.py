"""`--device ssh://...` against a real sshd on loopback; tests/model has what needs none."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd

from edgedisp.bench import devices
from edgedisp.bench.devices import BenchOptions
from edgedisp.core.errors import BadInput

pytestmark = pytest.mark.skipif(sshd.MISSING is not None, reason=str(sshd.MISSING))
OPTIONS = BenchOptions(prompt=6, generate=5, repetitions=2, threads=1, remote_python=sys.executable)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Sshd]:
    with sshd.running(tmp_path_factory.mktemp("sshd") / "s") as server:
        yield server


@pytest.fixture
def server(running: sshd.Sshd, monkeypatch: pytest.MonkeyPatch) -> sshd.Sshd:
    """The server, and `ssh` set up to know it."""
    monkeypatch.setenv("EDGEDISP_SSH", running.command)
    return running


def left(server: sshd.Sshd) -> list[Path]:
    """What is in the cache there; a far end whose connection broke takes a moment to clean up."""
    deadline = time.monotonic() + 10
    while (found := list(server.home.glob(".cache/*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_the_command_times_here_and_over_ssh_and_shows_both(  # type: ignore[no-untyped-def]
    server: sshd.Sshd, bundles: dict[str, Path], tmp_path: Path, edgedisp
) -> None:
    words = ["--prompt", "6", "--generate", "5", "--repetitions", "2", "--threads", "1", "--pause", "0"]
    words += ["--device", "local", "--device", server.device, "--remote-python", sys.executable]
    page = tmp_path / "devices.html"
    ended = edgedisp("bench", bundles["fp32"], bundles["int4"], *words, "--html", page, "--json")
    assert ended.code == 0, ended
    found = json.loads(ended.out)["devices"]
    assert [one["device"] for one in found] == ["local", server.device]
    tokens = [[r["tokens"] for r in one["repetitions"]] for one in found]
    assert tokens[0] == tokens[1]  # one machine, one model
    assert server.device in page.read_text() and left(server) == []


@pytest.mark.parametrize(
    ("key", "said"), [("IdentityFile", "Permission denied"), ("UserKnownHostsFile", "Host key")]
)
def test_a_refused_login_and_an_unknown_host_key_are_told_by_ssh(
    server: sshd.Sshd,
    bundles: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    key: str,
    said: str,
) -> None:
    lines = [line for line in server.config.read_text().splitlines() if not line.startswith(key)]
    (tmp_path / "config").write_text("\n".join([*lines, f"{key} {tmp_path / 'none'}"]))
    monkeypatch.setenv("EDGEDISP_SSH", f"ssh -F {tmp_path / 'config'}")
    with (
        pytest.raises(BadInput, match=f"(?s){server.device}: .* ended with code 255:\n.*{said}"),
        devices.connect(devices.parse(server.device), bundles, OPTIONS),
    ):
        pass
