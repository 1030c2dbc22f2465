"""How a command ends: by a signal, an unexpected error, on a terminal that lacks characters."""

from __future__ import annotations

import io
import os
import signal
import sys
from importlib import import_module
from typing import Any

import pytest

application: Any = import_module("edgedisp.cli.app")  # `edgedisp.cli.app` names the application in it


def test_sigterm_ends_a_command_as_ctrl_c_does_with_an_exit_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["edgedisp", "build"])
    monkeypatch.setattr(application, "app", lambda **options: os.kill(os.getpid(), signal.SIGTERM))
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
    monkeypatch.setattr(application, "app", lambda **options: sys.stdout.write("table \u2500 \u03bb\n"))
    application.main()
    sys.stdout.flush()
    assert written.getvalue().startswith(b"table ") and written.getvalue().endswith(b"\n")


def test_an_unexpected_error_is_one_line_that_says_how_to_see_the_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**options: object) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(application, "app", fails)
    monkeypatch.delenv(application.TRACE, raising=False)
    with pytest.raises(SystemExit) as stop:
        application.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "edgedisp: failed: RuntimeError: no kernel for this (EDGEDISP_TRACE=1 shows where)\n"
    )
    monkeypatch.setenv(application.TRACE, "1")
    with pytest.raises(RuntimeError):
        application.main()
