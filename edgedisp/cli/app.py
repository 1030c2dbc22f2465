"""The application, options that several commands share, and the entry point: a failure is one message.

Each command imports what it needs when it runs, so that help answers at once. Exit codes: 0 done, 1 failed,
2 bad recipe or usage, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM). An unexpected error shows its
traceback only where EDGEDISP_TRACE is set.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option
from typer.main import get_command

from edgedisp import __version__
from edgedisp.core.distributed import get_world_size, is_main_process
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import check_writable

INTERRUPTED = 130
TRACE = "EDGEDISP_TRACE"
MOST_THREADS, LONGEST = 1024, 2**20  # as in a recipe
RESUMABLE = ("build", "pilot")  # commands that keep finished stages
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
DISK_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "iostream error")
"""In the messages of errors, as libraries replace the system's with their own (safetensors, torch.save)."""

app = typer.Typer(
    name="edgedisp",
    help="Mid-train a small language model under dispersion loss, quantize and export it, and see the gain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def output_file(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse, before any work is done, a file that cannot be written."""
    if path is not None:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise BadInput(f"{option.opts[0]} {path}: is a folder, or in one that is not there; name a file")
        check_writable(option.opts[0], path)
    return path


JsonOption = Annotated[bool, Option("--json", help="Print one line of JSON.")]
TextOption = Annotated[
    Path | None, Option(metavar="FILE", help="Text for held-out tasks; default: the run's.")
]
TasksPathOption = Annotated[Path | None, Option(metavar="FOLDER", help="Your own lm-eval tasks.")]
TrustTaskCodeOption = Annotated[bool, Option("--trust-task-code", help="Run the Python that they name.")]
HtmlOption = Annotated[
    Path | None, Option(metavar="FILE", callback=output_file, help="Write the result as one page.")
]


def _version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"edgedisp {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[bool, Option(callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Common to all commands."""
    count = get_world_size()
    if count > 1 and context.invoked_subcommand != "build":
        raise BadInput(
            f"{context.invoked_subcommand}: is for one process, but {count} were started; `build` alone "
            "shares its training among several"
        )


def show(document: Any, text: str, as_json: bool) -> None:
    """Print a command's result as one line of JSON, or for a reader."""
    typer.echo(json.dumps(document) if as_json else text)


def width() -> int:
    """Columns of the terminal; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


# The entry point


def main() -> None:
    """Run the command of sys.argv; SIGTERM (docker stop, Slurm) ends it as Ctrl-C does."""
    signals: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
    _prepare_streams()
    # Warns at import of a missing kernel package that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        run_command(sys.argv[1:])
        sys.stdout.flush()
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
    if _drop_broken_streams() and isinstance(error, BrokenPipeError):
        sys.exit(1)  # the reader has what it wants, as in `| head -1`
    if hasattr(error, "exit_code"):  # of Typer: help, the version, a usage error
        if hasattr(error, "show"):
            error.show()
        sys.exit(error.exit_code)
    message, code = _message_and_code(error)
    if is_main_process():
        sys.stderr.write(f"edgedisp: {message}\n")
    elif code != INTERRUPTED:
        sys.stderr.write(f"edgedisp: process {os.environ['RANK']}: {message}\n")
    sys.exit(128 + signals[0] if signals and code == INTERRUPTED else code)


def run_command(arguments: list[str]) -> None:
    """Not by `app()`, which replaces errors by others: EOFError, a broken pipe of a device."""
    for argument in arguments:
        if argument.encode(errors="ignore").decode() != argument:
            raise BadInput(f"{argument!r}: is not UTF-8; rename the file, or set PYTHONUTF8=1")
    command = get_command(app)
    with command.make_context("edgedisp", arguments) as context:
        command.invoke(context)


def _prepare_streams() -> None:
    """Closed standard streams become the null device: the next file opened would get their number, and what a
    library prints would go into it. What a terminal cannot show is replaced; any bytes can be read."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r"))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")


def _drop_broken_streams() -> bool:
    """Whether a reader of the output left. A stream that cannot be written goes to the null device, or Python
    would fail once more at its exit."""
    has_left = False
    for number, stream in (1, sys.stdout), (2, sys.stderr):
        if hasattr(select, "poll"):  # not in Windows
            poll = select.poll()
            poll.register(number, 0)
            has_left = has_left or any(event & select.POLLERR for _, event in poll.poll(0))
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return has_left


def _message_and_code(error: BaseException) -> tuple[str, int]:
    """Raises the error itself where a traceback is wanted."""
    if isinstance(error, KeyboardInterrupt):
        resumes = bool(sys.argv[1:]) and sys.argv[1] in RESUMABLE
        return "interrupted" + "; the same command continues where this one stopped" * resumes, INTERRUPTED
    causes = [error]
    while cause := causes[-1].__cause__ if causes[-1].__suppress_context__ else causes[-1].__context__:
        causes.append(cause)
    for cause in causes:  # a library may call such a file damaged
        if isinstance(cause, OSError) and cause.errno in FORBIDDEN and cause.filename:
            return f"{cause.filename}: {cause.strerror}; allow it, or name another file or folder", 2
    if isinstance(error, BadInput):
        return str(error), 2
    if isinstance(error, BuildFailed):
        return f"failed: {error}", 1
    if any(text in str(cause) for cause in causes for text in DISK_FULL):
        name = getattr(error, "filename", None)
        advice = "free some space and run the same command again: finished stages are kept"
        return f"failed: the disk is full{f' ({name})' if name else ''}; {advice}", 1
    if os.environ.get(TRACE):
        raise error
    reason = " ".join(str(error).split())[:400]
    return f"failed: {type(error).__name__}: {reason} ({TRACE}=1 shows where)", 1
