"""One wheel through pip, as a subprocess, and pip's many lines as one error.

pip is used rather than an HTTP client of our own because it knows the user's mirrors, proxies, certificates
and credentials, and which wheel fits this machine. Its configuration is not touched.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress

UNREACHABLE = re.compile(r"(?i)connection broken|could not fetch url|connection error|max retries|timed out")


def download(requirement: str, folder: Path, progress: Progress) -> Path:
    """The wheel of `NAME==VERSION`, alone, in `folder` (which is made). Progress counts bytes, total 0.

    Raises BadInput (no such package or version), BuildFailed (no pip, no network, whatever else pip says)
    and OSError (full disk).
    """
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    # pip's temporary files go to our folder: they are cleaned with it, and their size is the progress.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    # -P keeps the working directory off the path: a file named pip.py there must not run.
    command = [sys.executable, "-P", "-m", "pip", "download", requirement]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), "--no-input", "--progress-bar=off"]
    log = folder.with_name("pip.log")
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env) as child,
    ):
        try:
            while child.poll() is None:
                progress(_largest_bytes(folder), 0, f"downloading {requirement}")
                try:
                    child.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        raise _pip_problem(requirement, log.read_text(encoding="utf-8", errors="replace"))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise BuildFailed(f"pip download {requirement} ended well but left {len(wheels)} wheels.")
    return wheels[0]


def _largest_bytes(folder: Path) -> int:
    """Size of the largest file below `folder`; pip may move files while we look."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, (Path(parent) / name).stat().st_size)
            except FileNotFoundError:
                continue
    return largest


def _pip_problem(requirement: str, output: str) -> Exception:
    """pip's many lines as one error: the user's mistake, a full disk, or a download that failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = errors[0] if errors else (lines[-1] if lines else "pip said nothing")
    if "No module named pip" in output:
        return BuildFailed(
            f"pypi:{requirement} cannot be fetched: {sys.executable} has no pip. Run "
            f"`{sys.executable} -m ensurepip --upgrade` (or `uv pip install pip`), or unpack the wheel "
            "yourself and name the file's path."
        )
    if "No space left on device" in output:
        return OSError(errno.ENOSPC, f"No space left on device while pip downloaded {requirement}")
    cut_off = [line for line in lines if UNREACHABLE.search(line)]
    if cut_off:
        return BuildFailed(
            f"{requirement} cannot be downloaded: the package index cannot be reached "
            f"({_innermost(cut_off[-1])}). Try again with a network, or name a local file instead."
        )
    versions = re.search(r"\(from versions: (.*)\)", reason)
    if versions is None:
        return BuildFailed(f"pip could not download {requirement}: {reason[:300]}")
    if versions[1] == "none":
        return BadInput(
            f"pypi:{requirement}: the package index offers no wheel of that name for this Python "
            f"({sys.version_info.major}.{sys.version_info.minor}). Check the spelling; packages without "
            "wheels are not used."
        )
    known = versions[1].split(", ")
    near = difflib.get_close_matches(requirement.partition("==")[2], known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return BadInput(
        f"pypi:{requirement}: no wheel of that version.{hint} Versions there: {', '.join(known[-8:])}."
    )


def _innermost(line: str) -> str:
    """The reason at the heart of a nested urllib3 message, such as `Connection refused`."""
    match = re.search(r"\[Errno -?\d+\] ([^'\")\]]+)", line)
    return match[1] if match else line.removeprefix("WARNING: ")[:200]
