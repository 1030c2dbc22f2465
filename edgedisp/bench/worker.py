"""One bundle held open in a process of its own, timed on request.

A process of its own keeps this program's memory, threads and imports out of the figures, and lets several
bundles stay loaded while they are timed in turns. The program is `export/runner/edgedisp_runner.py`, which
also runs alone on a device; here it is started with `--interactive` and spoken to in lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Sequence
from itertools import chain
from types import TracebackType
from typing import Any

from edgedisp.core.errors import BadInput, BuildFailed

TAIL_CHARS = 2000
POLITE_S = 5.0


class Ended(BuildFailed):
    """The program has died: its exit code (None: it only closed its output), and the end of its stderr."""

    def __init__(self, message: str, code: int | None, said: str) -> None:
        super().__init__(message)
        self.code, self.said = code, said


class Worker:
    """Context manager: starts `command`, waits until it has loaded and warmed up, ends it at the end.

    `first` is sent before anything else. Raises BadInput where the program refuses the bundle (its exit code
    2) and BuildFailed where it dies (Ended), sends something else than JSON, or is silent for `timeout_s`.
    The process never outlives the block, and not this program either: it ends when its standard input does.
    """

    def __init__(self, label: str, command: Sequence[str], timeout_s: float, first: bytes = b"") -> None:
        self.label = label
        self.command = list(command)
        self.timeout_s = timeout_s
        self.first = first
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
            if self.first:
                self._write([self.first])
            self.facts = self._answer().get("ready", {})
        except BaseException:
            self._end(politely=False)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(politely=kind is None)

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def run(self) -> dict[str, Any]:
        """Time one repetition; what it holds stands in the runner's docstring."""
        return self.ask({"run": 1})

    def ask(self, command: dict[str, Any], payload: Iterable[bytes] = ()) -> dict[str, Any]:
        """Send one command, with bytes after it where it takes some, and wait for its answer."""
        self._send(command, payload)
        return self._answer()

    def _send(self, command: dict[str, Any], payload: Iterable[bytes] = ()) -> None:
        self._write(chain([json.dumps(command).encode() + b"\n"], payload))

    def _write(self, blocks: Iterable[bytes]) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise BuildFailed(f"{self.label}: the worker has no standard input")
        try:
            for block in blocks:
                stdin.write(block)
            stdin.flush()
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
        return BadInput(message) if code == 2 else Ended(message, code, self._tail().lstrip(":\n"))

    def _tail(self) -> str:
        """The end of what the worker wrote to stderr."""
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace").strip()
        return f":\n{text[-TAIL_CHARS:]}" if text else ""

    def _end(self, politely: bool) -> None:
        """Ask it to quit, then kill it; close what is open."""
        process = self._process
        if politely and process.poll() is None:
            # Its figures are already here: one that will not quit is killed below, and that is no failure.
            with contextlib.suppress(BadInput, BuildFailed, subprocess.TimeoutExpired):
                self._send({"quit": 1})
                process.wait(POLITE_S)
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was still to be written to a dead process
                    stream.close()
        self._log.close()
