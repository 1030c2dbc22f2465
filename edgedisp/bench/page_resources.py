"""What the phone page's server gives: address -> file, or bytes made beforehand. Nothing else can be had."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}
PAGE_SUFFIXES = frozenset({".html", ".css", ".js", ".mjs", ".svg", ".wasm"})


@dataclass(frozen=True)
class Resource:
    """What one address gives: a file, or bytes made beforehand. `tag` is its SHA-256."""

    content_type: str
    size_bytes: int
    tag: str
    path: Path | None = None
    body: bytes = b""
    revalidated: bool = False
    """The browser may keep it and ask whether it changed; bundles are kept by the page itself."""


def page_resources(web: Path) -> dict[str, Resource]:
    """Address -> file of the page in `export/web/`. BadInput where its vendored libraries are missing."""
    if not (web / "index.html").is_file():
        raise BadInput(f"{web}: the phone page is missing; install edgedisp again")
    if not (web / "vendor" / "onnxruntime-web").is_dir():
        raise BadInput(
            f"{web / 'vendor'}: the page's libraries are missing, as this was installed without them; in a "
            "checkout `make web` fetches them (needs npm), and `make wheel` then packs them"
        )
    root, found = web.resolve(), {}
    for path in sorted(root.rglob("*")):
        if path.suffix in PAGE_SUFFIXES and path.is_file() and path.resolve().is_relative_to(root):
            with path.open("rb") as file:
                tag = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(root).as_posix()] = Resource(
                TYPES[path.suffix], path.stat().st_size, tag, path.resolve(), revalidated=True
            )
    return {**found, "": found["index.html"]}


def json_resource(content: Any) -> Resource:
    """A JSON answer made beforehand."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    return Resource("application/json", len(body), hashlib.sha256(body).hexdigest(), body=body)
