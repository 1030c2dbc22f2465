"""`--device ssh://...` against a real sshd on loopback; tests/model has what needs none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sshd
from tiny_bundle import Bundles, write_sentences

from edgedisp.bench import devices
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.interleaved_timing import Worker
from edgedisp.core.errors import BadInput

pytestmark = pytest.mark.skipif(sshd.MISSING is not None, reason=str(sshd.MISSING))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sshd.Sshd]:
    monkeypatch.setenv("EDGEDISP_CACHE", str(tmp_path / "cache"))
    with sshd.running(tmp_path / "sshd") as server:
        monkeypatch.setenv("EDGEDISP_SSH", server.command)
        yield server


def test_the_command_times_and_scores_here_and_over_ssh(  # type: ignore[no-untyped-def]
    server: sshd.Sshd, bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edgedisp
) -> None:
    words = ["--prompt", "6", "--generate", "5", "--repetitions", "2", "--threads", "1", "--pause", "0"]
    words += ["--device", server.device, "--remote-python", sys.executable, "--json", "--score"]
    words += ["heldout_cloze", "--text", write_sentences(tmp_path / "text.jsonl"), "--items", "20"]
    page = tmp_path / "devices.html"
    result = edgedisp("bench", bundles["fp32"], *words, "--device", "local", "--html", page)
    assert result.code == 0, result
    rows = json.loads(result.out)["devices"]
    assert [row["device"] for row in rows] == [server.device, "local"]
    remote, local = [[turn["tokens"] for turn in row["repetitions"]] for row in rows]
    assert local == remote and server.device in page.read_text()
    (record,) = rows[0]["scores"]
    assert record["answered"] == 20 and record["logprob"]["max"] < 1e-4
    assert record["agreement"]["share"] == 1 and "Scored on the device" in page.read_text()
    assert not list(server.home.glob(".edgedisp*"))

    ask, is_scoring = Worker.ask, []

    def cut(worker: Worker, command: dict[str, Any]) -> Any:
        is_scoring.append("score" in command)
        if sum(is_scoring) == 7:  # six items are scored
            server.break_connections()
        return ask(worker, command)

    monkeypatch.setattr(Worker, "ask", cut)
    result = edgedisp("bench", bundles["fp32"], *words)
    assert result.code == 1 and "What was measured until then is shown" in result.err
    (device,) = json.loads(result.out)["devices"]
    (record,) = device["scores"]
    assert device["lost"] and 6 <= record["answered"] < 20 and len(device["rows"]) == 1
    assert record["device"]["value"] == pytest.approx(record["here"]["value"])


@pytest.mark.parametrize(
    ("key", "message"), [("IdentityFile", "Permission denied"), ("UserKnownHostsFile", "Host key")]
)
def test_a_refused_login_and_an_unknown_host_key_are_errors_of_ssh(
    server: sshd.Sshd, bundles: Bundles, tmp_path: Path, key: str, message: str
) -> None:
    lines = [line for line in server.config.read_text().splitlines() if not line.startswith(key)]
    server.config.write_text("\n".join([*lines, f"{key} {tmp_path / 'none'}"]))
    with (
        pytest.raises(BadInput, match=f"(?s){server.device}: .* ended with code 255:\n.*{message}"),
        devices.connect(server.device, bundles, BenchOptions()),
    ):
        pass
