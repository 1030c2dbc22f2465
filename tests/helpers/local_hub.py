"""A hub of models and data sets on localhost, serving folders: the few requests that the hub's client makes.

    root/models/some/tiny/config.json ...        root/datasets/some/lines/train.parquet ...

Only the network is stood in for; huggingface_hub and datasets run as they are. A client finds the hub by the
environment variable HF_ENDPOINT, read when it is imported, so tests run it in a process of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
NOWHERE = "http://127.0.0.1:9"  # the discard port: refuses at once

Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The address of a hub that serves `root` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            status, headers, content = _answer(root, path.strip("/").split("/"))
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def run_client(code: str, endpoint: str, home: Path, *arguments: str) -> list[str]:
    """The lines that `code` prints in a process whose hub is at `endpoint` and whose cache is `home`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "%|" not in result.stderr  # no progress bar was drawn
    return result.stdout.splitlines()


def _answer(root: Path, path: list[str]) -> Answer:
    if path[0] == "api" and len(path) >= 4:
        return _about(root / path[1] / path[2] / path[3], "/".join(path[2:4]), path[4:])
    if "resolve" in path:
        index = path.index("resolve")
        name = path[:index] if path[0] == "datasets" else ["models", *path[:index]]
        return _file(root.joinpath(*name, *path[index + 2 :]))
    return 404, {}, b""


def _about(folder: Path, name: str, rest: list[str]) -> Answer:
    if not folder.is_dir():
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
    if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    if rest[:1] == ["tree"]:
        inside = folder.joinpath(*rest[2:])
        entries = [_entry(path, folder) for path in sorted(inside.rglob("*"))]
        return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
    about = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
    return 200, {"Content-Type": "application/json"}, json.dumps(about).encode()


def _entry(path: Path, folder: Path) -> dict[str, object]:
    kind = "directory" if path.is_dir() else "file"
    size = 0 if path.is_dir() else path.stat().st_size
    return {"type": kind, "path": path.relative_to(folder).as_posix(), "size": size, "oid": "0" * 40}


def _file(path: Path) -> Answer:
    if not path.is_file():
        return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
    content = path.read_bytes()
    tag = hashlib.sha256(content).hexdigest()
    return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, content
