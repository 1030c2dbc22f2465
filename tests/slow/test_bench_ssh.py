"""`--device ssh://...` against a real sshd on loopback."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sshd
from tiny_bundle import RUNNER, tiny_bundles

from edgedisp.bench import devices, ssh
from edgedisp.bench.devices import DeviceLost, Wanted
from edgedisp.core.errors import BadInput

needs_sshd = pytest.mark.skipif(sshd.MISSING is not None, reason=str(sshd.MISSING))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_bundles(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Sshd]:
    with sshd.running(tmp_path_factory.mktemp("sshd") / "s") as found:
        yield found


@pytest.fixture
def reached(server: sshd.Sshd, monkeypatch: pytest.MonkeyPatch) -> sshd.Sshd:
    """The server, and `ssh` set up to know it."""
    monkeypatch.setenv("EDGEDISP_SSH", server.command)
    return server


def wanted(**changes: Any) -> Wanted:
    options: dict[str, Any] = {"prompt": 6, "generate": 5, "repetitions": 2, "threads": 1}
    options |= {"runner": RUNNER, "cache": Path("unused"), "ids": lambda _: [], "python": sys.executable}
    return Wanted(**{**options, **changes})


def left(server: sshd.Sshd, patience_s: float = 10.0) -> list[Path]:
    """What is in the home folder there; a far end whose connection broke takes a moment to clean up."""
    deadline = time.monotonic() + patience_s
    while (found := list(server.home.rglob("*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


@needs_sshd
def test_the_command_times_here_and_over_ssh_and_shows_both(  # type: ignore[no-untyped-def]
    reached: sshd.Sshd, bundles: dict[str, Path], tmp_path: Path, edgedisp
) -> None:
    words = ["--prompt", "6", "--generate", "5", "--repetitions", "2", "--threads", "1", "--pause", "0"]
    words += ["--device", "local", "--device", reached.device, "--remote-python", sys.executable]
    page = tmp_path / "devices.html"
    ended = edgedisp("bench", bundles["fp32"], bundles["int4"], *words, "--html", page, "--json")
    assert ended.code == 0, ended
    found = json.loads(ended.out)["devices"]
    assert [(one["device"], one["kind"]) for one in found] == [("local", "local"), (reached.device, "ssh")]
    here, there = ([(row["label"], row["weights_bytes"]) for row in one["rows"]] for one in found)
    assert here == there and [label for label, _ in here] == ["fp32", "int4"]
    tokens = [[r["tokens"] for r in one["repetitions"]] for one in found]
    assert tokens[0] == tokens[1]  # one machine, one model
    assert reached.device in page.read_text() and left(reached) == []


@needs_sshd
def test_a_connection_that_breaks_keeps_what_was_measured_and_leaves_nothing(
    reached: sshd.Sshd, bundles: dict[str, Path]
) -> None:
    def cut(done: int, total: int, note: str) -> None:
        if "tokens/s" in note and done == 3 + 4:
            reached.break_connections()

    address = devices.parse(reached.device)
    with devices.opened(address, bundles, wanted()) as device, pytest.raises(DeviceLost) as caught:
        device.measure(cut)
    assert caught.value.partial["order"] == ["fp32", "twin", "int4", "int4"]
    assert caught.value.partial["lost"] and left(reached) == []


@needs_sshd
def test_a_lost_device_is_shown_with_its_partial_figures_and_exit_code_1(  # type: ignore[no-untyped-def]
    reached: sshd.Sshd, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, edgedisp
) -> None:
    from edgedisp.bench import timing

    real = timing._one

    def one_then_gone(*given: Any) -> dict[str, Any]:
        if given[-1] == 1:
            reached.break_connections()
        return real(*given)

    monkeypatch.setattr(timing, "_one", one_then_gone)
    words = ["--prompt", "6", "--generate", "5", "--repetitions", "2", "--remote-python", sys.executable]
    ended = edgedisp("bench", bundles["fp32"], "--device", reached.device, *words)
    assert ended.code == 1
    assert "decode t/s" in ended.out and "lost in the middle, what follows is partial" in ended.out
    assert "What was measured until then is shown" in ended.err


def refusal(name: str, bundles: dict[str, Path], **changes: Any) -> str:
    with (
        pytest.raises(BadInput) as caught,
        devices.opened(devices.parse(name), bundles, wanted(**changes)),
    ):
        pass
    assert "\n" not in str(caught.value) and name in str(caught.value)
    return str(caught.value)


@needs_sshd
@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("IdentityFile", "the login is refused; no password is asked for"),
        ("UserKnownHostsFile", "its host key is not known here"),
    ],
)
def test_a_refused_login_and_an_unknown_host_key_are_told(
    reached: sshd.Sshd,
    bundles: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    key: str,
    told: str,
) -> None:
    config = reached.config.read_text().splitlines()
    stranger = [line for line in config if not line.startswith(key)]
    (tmp_path / "config").write_text("\n".join([*stranger, f"{key} {tmp_path / 'none'}"]))
    monkeypatch.setenv("EDGEDISP_SSH", f"ssh -F {tmp_path / 'config'}")
    assert told in refusal(reached.device, bundles)


@needs_sshd
def test_no_python_there_is_told(reached: sshd.Sshd, bundles: dict[str, Path]) -> None:
    assert "no Python 3.9 or newer there" in refusal(reached.device, bundles, python="/no/such")
    assert left(reached) == []


def test_a_port_where_nothing_listens_is_told(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEDISP_SSH", "ssh -F /dev/null")
    assert "nothing answers at that port" in refusal("ssh://127.0.0.1:1", bundles)


def test_a_host_that_does_not_exist_is_told(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEDISP_SSH", "ssh -F /dev/null")
    assert "no host of that name" in refusal("ssh://no-such-host.invalid", bundles)


def test_a_machine_without_ssh_is_told(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEDISP_SSH", "no-such-ssh -F x")
    assert "there is no `no-such-ssh` here" in refusal("ssh://pi", bundles)


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("ssh: connect to host pi port 22: Connection timed out", "it does not answer"),
        ("@@@\n@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\n@@@", "is not the one known here"),
        ("first\nsomething new", "code 255: something new"),
        ("", "it said nothing"),
    ],
)
def test_what_ssh_says_is_explained_in_one_line(said: str, meaning: str) -> None:
    assert meaning in ssh.explain(255, said) and "\n" not in ssh.explain(255, said)
