"""How a command ends: by a signal, an unexpected error, on a terminal that lacks characters."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tiny_build import Command

from edgedisp.core.errors import BadInput

application: Any = import_module("edgedisp.cli.app")  # `edgedisp.cli.app` names the application in it


def test_sigterm_ends_a_command_as_ctrl_c_does_with_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["edgedisp", "build"])
    monkeypatch.setattr(application, "run_command", lambda words: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit) as stop:
            application.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143
    assert capsys.readouterr().err == (
        "edgedisp: interrupted; the same command continues where this one stopped\n"
    )


@pytest.mark.parametrize("encoding", ["latin-1", "cp437"])
def test_characters_that_a_terminal_lacks_are_replaced(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(application, "run_command", lambda words: sys.stdout.write("table \u2500 \u03bb\n"))
    application.main()
    sys.stdout.flush()
    assert written.getvalue().startswith(b"table ") and written.getvalue().endswith(b"\n")


@pytest.mark.parametrize("error", [RuntimeError("no kernel\nfor this"), EOFError("no kernel for this")])
def test_an_unexpected_error_is_one_line_that_says_how_to_see_the_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr("edgedisp.bench.system.doctor", fails)
    monkeypatch.setattr(sys, "argv", ["edgedisp", "doctor"])
    monkeypatch.delenv(application.TRACE, raising=False)
    with pytest.raises(SystemExit) as stop:
        application.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        f"edgedisp: failed: {type(error).__name__}: no kernel for this (EDGEDISP_TRACE=1 shows where)\n"
    )
    monkeypatch.setenv(application.TRACE, "1")
    with pytest.raises(type(error)):
        application.main()


def test_a_file_that_may_not_be_read_is_never_called_damaged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        try:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "run/model.safetensors")
        except OSError as error:
            raise BadInput("run: the weights cannot be opened (damaged?)") from error

    monkeypatch.setattr(application, "run_command", fails)
    with pytest.raises(SystemExit) as stop:
        application.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "edgedisp: run/model.safetensors: Permission denied; allow it, or name another file or folder\n"
    )


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
@pytest.mark.parametrize(
    "words",
    ["bench B --html", "phone B --out", "compare B C --html", "compare B C --out", "condensation B --out"],
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    edgedisp: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "BC":
        Path(name).mkdir()
        Path(name, "model.onnx").touch()
    for place in ("/proc/new.json", tmp_path / "B" / "model.onnx" / "new.json"):
        ended = edgedisp(*words.split(), place)
        assert ended.code == 2 and f"{place}: " in ended.err and not ended.out


@pytest.mark.parametrize(
    ("streams", "code", "lines"),
    [
        ("<&- >&-", 0, 0),
        ("<&- >&- 2>&-", 0, 0),
        ("| exec 0<&-", 1, 0),  # no reader
        (">/dev/full", 1, 1),
    ],
)
def test_closed_streams_are_no_error_and_unread_or_unwritable_ones_no_traceback(
    streams: str, code: int, lines: int
) -> None:
    script = f"set -o pipefail; (sleep 0.1; '{sys.executable}' -m edgedisp recipes) {streams}"
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, len(ended.stderr.splitlines())) == (code, lines), ended


@pytest.mark.parametrize(
    "words", ["bench x --pause nan", "bench x --threads 9999999", "chat x --threads 1000000", "chat \udcff"]
)
def test_options_that_cannot_work_are_wrong_usage(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["edgedisp", *words.split()])
    with pytest.raises(SystemExit) as stop:
        application.main()
    assert stop.value.code == 2
