"""How a command ends: every failure becomes one message and its exit code.

Exit codes: 0 done, 1 failed, 2 bad recipe or usage, 130 interrupted. No traceback for a user's mistake.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import threading
from typing import Any

from edgedisp.cli.app import app
from edgedisp.core import distributed as processes
from edgedisp.core.errors import BadInput, BuildFailed

INTERRUPTED = 130
TRACE = "EDGEDISP_TRACE"  # an environment variable; set, an unexpected error keeps its traceback
CONTINUE = ("build", "pilot")  # the commands that keep what is done


def main() -> None:
    """The entry point: every failure becomes one message and its exit code."""
    _prepare_process()
    # Says at import that a kernel package is missing which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = _run()  # Typer turns Ctrl-C into the return value 130
        if code == INTERRUPTED:
            _interrupted()
    except BadInput as error:
        _end(str(error), 2)
    except BuildFailed as error:
        _end(f"failed: {error}", 1)
    except KeyboardInterrupt:
        _interrupted()
    except Exception as error:
        # click's own usage errors carry their exit code and their message.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        if _disk_is_full(error):
            _end(_disk_message(error), 1)
        if os.environ.get(TRACE):
            raise
        reason = " ".join(str(error).split())[:400]
        _end(f"failed: {type(error).__name__}: {reason} ({TRACE}=1 shows where)", 1)


def _prepare_process() -> None:
    """SIGTERM (docker stop, Slurm) ends a command as Ctrl-C does; a terminal's encoding never does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise_interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _raise_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _interrupted() -> None:
    continues = "; the same command continues where this one stopped"
    _end("interrupted" + (continues if sys.argv[1:2] and sys.argv[1] in CONTINUE else ""), INTERRUPTED)


def _run() -> Any:
    """The command. What fails in one of several processes has nearly always failed in process 0 too.

    So the others wait before they tell, in which time the launcher ends them. Process 0 waits a moment with
    an error that has no message of ours: it may come from another process that went away.
    """
    try:
        return app(standalone_mode=False)
    except KeyboardInterrupt:
        raise
    except (BadInput, BuildFailed):
        _after_the_first()
        raise
    except Exception:
        here = processes.place()
        if here.count > 1 and here.leads:
            processes.wait_for_launcher(1)
        _after_the_first()
        raise


def _after_the_first() -> None:
    if not processes.leads():
        processes.wait_for_launcher()


def _disk_is_full(error: BaseException) -> bool:
    """Also when a library has put its own error in the place of the system's (safetensors, torch.save)."""
    full = {errno.ENOSPC, errno.EDQUOT}
    words = (os.strerror(errno.ENOSPC), "iostream error")
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in full or any(word in str(seen) for word in words):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _disk_message(error: BaseException) -> str:
    where = getattr(error, "filename", None)
    return (
        f"failed: the disk is full{f' ({where})' if where else ''}; free some space and run the same "
        "command again: finished stages are kept"
    )


def _end(message: str, code: int) -> None:
    if processes.leads():
        sys.stderr.write(f"edgedisp: {message}\n")
    elif code != INTERRUPTED:
        sys.stderr.write(f"edgedisp: process {processes.place().index}: {message}\n")
    sys.exit(code)
