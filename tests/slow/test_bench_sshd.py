"""`--device ssh://...` against a real sshd on loopback; tests/model has what needs none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd
from tiny_bundle import Bundles

from edgedisp.bench import devices
from edgedisp.bench.devices import BenchOptions
from edgedisp.core.errors import BadInput

pytestmark = pytest.mark.skipif(sshd.MISSING is not None, reason=str(sshd.MISSING))
OPTIONS = BenchOptions(prompt=6, generate=5, repetitions=2, threads=1, remote_python=sys.executable)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sshd.Sshd]:
    with sshd.running(tmp_path / "sshd") as server:
        monkeypatch.setenv("EDGEDISP_SSH", server.command)
        yield server


def test_the_command_times_here_and_over_ssh_and_shows_both(  # type: ignore[no-untyped-def]
    server: sshd.Sshd, bundles: Bundles, tmp_path: Path, edgedisp
) -> None:
    words = ["--prompt", "6", "--generate", "5", "--repetitions", "2", "--threads", "1", "--pause", "0"]
    words += ["--device", "local", "--device", server.device, "--remote-python", sys.executable]
    page = tmp_path / "devices.html"
    result = edgedisp("bench", bundles["fp32"], bundles["int4"], *words, "--html", page, "--json")
    assert result.code == 0, result
    rows = json.loads(result.out)["devices"]
    assert [row["device"] for row in rows] == ["local", server.device]
    local, remote = [[turn["tokens"] for turn in row["repetitions"]] for row in rows]
    assert local == remote and server.device in page.read_text()
    assert not list(server.home.glob(".cache/*"))


@pytest.mark.parametrize(
    ("key", "message"), [("IdentityFile", "Permission denied"), ("UserKnownHostsFile", "Host key")]
)
def test_a_refused_login_and_an_unknown_host_key_are_errors_of_ssh(  # type: ignore[no-untyped-def]
    server: sshd.Sshd, bundles: Bundles, tmp_path: Path, key, message
) -> None:
    lines = [line for line in server.config.read_text().splitlines() if not line.startswith(key)]
    server.config.write_text("\n".join([*lines, f"{key} {tmp_path / 'none'}"]))
    with (
        pytest.raises(BadInput, match=f"(?s){server.device}: .* ended with code 255:\n.*{message}"),
        devices.connect(devices.parse(server.device), bundles, OPTIONS),
    ):
        pass
