"""A program that answers lines of JSON: the runner with one bundle open, here or on a remote host.

A process of its own keeps this program's memory, threads and imports out of the figures, and lets several
bundles stay loaded while they are timed in turns.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import data_folder

RUNNER = data_folder("export") / "runner" / "runner.py"
TAIL_CHARS = 2000
QUIT_S = 5.0
KILL_S = 0.5


class Exited(BuildFailed):
    """The program has ended: its exit code (None: it only closed its output), and the end of its stderr."""

    def __init__(self, message: str, code: int | None, stderr: str) -> None:
        super().__init__(message)
        self.code, self.stderr = code, stderr


class Worker:
    """Starts `command` and waits for its {"ready": facts}; a context manager that ends it with the block.

    Raises BadInput where the program refuses the bundle (exit code 2), Exited where it ends, and BuildFailed
    where it sends something else than JSON or is silent for `timeout_s`. The program ends with its standard
    input, so it does not outlive this one.
    """

    def __init__(self, label: str, command: Sequence[str], timeout_s: float) -> None:
        self.label, self.timeout_s = label, timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        # A session of its own: Ctrl-C reaches this program alone, which then ends the workers.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._input: Any = self._process.stdin
        self._output: Any = self._process.stdout
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self.facts: dict[str, Any] = self._answer().get("ready", {})
        except BaseException:
            self.close(KILL_S)
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(KILL_S if kind else QUIT_S)

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Send one command and wait for its answer; the runner's docstring lists them."""
        try:
            self._input.write(json.dumps(command).encode() + b"\n")
            self._input.flush()
        except OSError as error:
            raise self._exited() from error
        return self._answer()

    def close(self, quit_s: float = QUIT_S) -> None:
        """Close the program's input, and kill it if it goes on for more than `quit_s`."""
        with contextlib.suppress(OSError):
            self._input.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(quit_s)
        self._process.kill()
        self._process.wait()
        self._output.close()
        self._log.close()

    def _listen(self) -> None:
        """Queue each line of its output, then None."""
        with contextlib.suppress(ValueError):  # closed meanwhile
            for line in self._output:
                self._lines.put(line)
        self._lines.put(None)

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self.timeout_s)
        except queue.Empty:
            raise BuildFailed(f"{self.label}: no answer within {self.timeout_s:g} s{self._tail()}") from None
        if line is None:
            raise self._exited()
        text = line.decode("utf-8", "replace").strip()[:200]
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise BuildFailed(f"{self.label}: not JSON: {text!r}{self._tail()}") from error
        if not isinstance(answer, dict) or "error" in answer:
            raise BuildFailed(f"{self.label}: {text}")
        return answer

    def _exited(self) -> BadInput | BuildFailed:
        code: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(QUIT_S)
        message = f"{self.label}: the measuring process ended with code {code}{self._tail()}"
        return BadInput(message) if code == 2 else Exited(message, code, self._tail().lstrip(":\n"))

    def _tail(self) -> str:
        """The end of its stderr."""
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace").strip()
        return f":\n{text[-TAIL_CHARS:]}" if text else ""
