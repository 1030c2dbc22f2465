"""A program spoken to in lines of JSON: the runner with one bundle open, here or at the other end of a pipe.

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
from types import TracebackType
from typing import Any

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.paths import data_folder

RUNNER = data_folder("export") / "runner" / "runner.py"
TAIL_CHARS = 2000
POLITE_S = 5.0


class Exited(BuildFailed):
    """The program has died: its exit code (None: it only closed its output), and the end of its stderr."""

    def __init__(self, message: str, code: int | None, stderr: str) -> None:
        super().__init__(message)
        self.code, self.stderr = code, stderr


class Worker:
    """Context manager: starts `command`, waits for its {"ready": facts}, ends it at the end.

    Raises BadInput where the program refuses the bundle (its exit code 2), and BuildFailed where it dies
    (Exited), sends something else than JSON, or is silent for `timeout_s`. The process never outlives the
    block, and not this program either: it ends when its standard input does.
    """

    def __init__(self, label: str, command: Sequence[str], timeout_s: float) -> None:
        self.label, self.command, self.timeout_s = label, list(command), timeout_s
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Worker:
        self._log = tempfile.TemporaryFile()
        self._lines: queue.Queue[str | None] = queue.Queue()
        # A session of its own: Ctrl-C reaches this program alone, which then ends the workers.
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self.facts = self._answer().get("ready", {})
        except BaseException:
            self._end(politely=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(politely=kind is None)

    def run(self) -> dict[str, Any]:
        """Time one repetition; what it holds stands in the runner's docstring."""
        return self.ask({"run": 1})

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        self._send(command)
        return self._answer()

    def _send(self, command: dict[str, Any]) -> None:
        if self._process.stdin is None:
            raise BuildFailed(f"{self.label}: the worker has no standard input")
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:  # the pipe is broken or closed: it has died since then
            raise self._died() from error

    def _listen(self) -> None:
        """Runs in a thread, so that waiting for a line can time out on every system. None ends the lines."""
        if self._process.stdout is not None:
            for line in self._process.stdout:
                self._lines.put(line.decode("utf-8", "replace"))
        self._lines.put(None)

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self.timeout_s)
        except queue.Empty:
            raise BuildFailed(f"{self.label}: no answer within {self.timeout_s:g} s{self._tail()}") from None
        if line is None:
            raise self._died()
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise BuildFailed(f"{self.label}: not JSON: {line.strip()[:200]!r}{self._tail()}") from error
        if not isinstance(answer, dict) or "error" in answer:
            raise BuildFailed(f"{self.label}: {line.strip()[:200]}")
        return answer

    def _died(self) -> BadInput | BuildFailed:
        try:
            code: int | None = self._process.wait(POLITE_S)
        except subprocess.TimeoutExpired:  # it closed its output and lives on; _end kills it
            code = None
        message = f"{self.label}: the measuring process ended with code {code}{self._tail()}"
        return BadInput(message) if code == 2 else Exited(message, code, self._tail().lstrip(":\n"))

    def _tail(self) -> str:
        """The end of what the worker wrote to stderr."""
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace").strip()
        return f":\n{text[-TAIL_CHARS:]}" if text else ""

    def _end(self, politely: bool) -> None:
        """Ask it to quit and close its input, then kill it."""
        process = self._process
        if politely and process.poll() is None:
            # Its figures are already here: one that will not quit is killed below, and that is no failure.
            with contextlib.suppress(BadInput, BuildFailed):
                self._send({"quit": 1})
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLITE_S if politely else 0.5)
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._log.close()
