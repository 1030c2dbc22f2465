"""The entry point: every failure becomes one message and its exit code.

0 done, 1 failed, 2 bad recipe or usage, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM). An unexpected
error shows its traceback only where EDGEDISP_TRACE is set.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import threading
import time

from edgedisp.cli.app import app
from edgedisp.core.distributed import get_world_size, is_main_process
from edgedisp.core.errors import BadInput, BuildFailed

INTERRUPTED = 130
TRACE = "EDGEDISP_TRACE"
RESUMABLE = ("build", "pilot")  # commands that keep finished stages
DISK_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "iostream error")
"""In the messages of errors, as libraries replace the system's with their own (safetensors, torch.save)."""


def main() -> None:
    """Run the command of sys.argv; SIGTERM (docker stop, Slurm) ends it as Ctrl-C does."""
    signals: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character
    # Warns at import of a missing kernel package that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if app(standalone_mode=False) == INTERRUPTED:  # what Typer makes of Ctrl-C
            raise KeyboardInterrupt
        return
    except (Exception, KeyboardInterrupt) as problem:
        error = problem
    is_expected = isinstance(error, BadInput | BuildFailed)
    if isinstance(error, Exception):
        # What fails in one of several processes nearly always fails in process 0, which then reports it: the
        # others wait for the launcher to end them. Process 0 waits a moment with an unexpected error: it may
        # come from another process that went away.
        if not is_main_process():
            time.sleep(10)
        elif not is_expected and get_world_size() > 1:
            time.sleep(1)
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's usage errors
        error.show()
        sys.exit(error.exit_code)
    message, code = _message_and_code(error)
    if is_main_process():
        sys.stderr.write(f"edgedisp: {message}\n")
    elif code != INTERRUPTED:
        sys.stderr.write(f"edgedisp: process {os.environ['RANK']}: {message}\n")
    sys.exit(128 + signals[0] if signals and code == INTERRUPTED else code)


def _message_and_code(error: BaseException) -> tuple[str, int]:
    """Raises the error itself where a traceback is wanted."""
    if isinstance(error, KeyboardInterrupt):
        resumes = bool(sys.argv[1:]) and sys.argv[1] in RESUMABLE
        return "interrupted" + "; the same command continues where this one stopped" * resumes, INTERRUPTED
    if isinstance(error, BadInput):
        return str(error), 2
    if isinstance(error, BuildFailed):
        return f"failed: {error}", 1
    cause: BaseException | None = error
    while cause is not None:
        if any(text in str(cause) for text in DISK_FULL):
            name = getattr(error, "filename", None)
            advice = "free some space and run the same command again: finished stages are kept"
            return f"failed: the disk is full{f' ({name})' if name else ''}; {advice}", 1
        cause = cause.__cause__ or cause.__context__
    if os.environ.get(TRACE):
        raise error
    reason = " ".join(str(error).split())[:400]
    return f"failed: {type(error).__name__}: {reason} ({TRACE}=1 shows where)", 1
