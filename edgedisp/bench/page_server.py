"""A small web server for the phone page: one page, some bundles, one place for figures, a secret address.

What it allows is a table made before it starts: address -> file (page_resources.py). Nothing is looked up in
the file system by what a client asks for, so there is no path to escape from. Every address begins with a
random token; without it all is 404, whether or not the rest exists. What a client may send is JSON of bounded
size that fits `uploads.py` and the plan; anything else is 400, one line in the log, and forgotten.

The headers ask for what the page needs and no more: scripts, workers and data from this server alone,
WebAssembly allowed, no other page may embed or read it, and the isolation without which browsers give no
threads (COOP, COEP, CORP). Browsers honour isolation over https and on localhost only.

Left out: range requests (a broken download starts again), compression (weights do not shrink), HTTP/2.
"""

from __future__ import annotations

import hmac
import os
import queue
import secrets
import shutil
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from edgedisp.bench.page_resources import Resource
from edgedisp.bench.uploads import UPLOAD, Upload, printable
from edgedisp.core.errors import BadInput

MOST_UPLOAD_BYTES = 2 << 20  # 5 repetitions of 128 tokens for 20 bundles are 200 KB
MOST_CONNECTIONS = 64
IDLE_S = 60.0
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; "
        "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address holds the token
}


@dataclass(frozen=True)
class Received:
    """An upload that fits, and who sent it."""

    upload: Upload
    client: str


class PageServer:
    """Context manager: serves `resources` (address below the token -> what it gives) until it ends.

    `received` holds what was sent, in order. `accepts` looks at an upload that fits the schema and says what
    is wrong with it, None if nothing is; `note` takes the lines of the log. `port` 0 takes a free one.
    Raises BadInput where host and port cannot be had.
    """

    def __init__(
        self,
        resources: Mapping[str, Resource],
        *,
        host: str,
        port: int,
        accepts: Callable[[Upload], str | None],
        note: Callable[[str], None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.token = secrets.token_urlsafe(16)  # 128 bits
        self.resources = {quote(address): resource for address, resource in resources.items()}
        self.accepts, self.note = accepts, note
        self.received: queue.Queue[Received] = queue.Queue()
        self._server = _bound(host, port, self, tls)
        self.port: int = self._server.server_address[1]
        shown = f"[{host}]" if ":" in host else host
        self.origin = f"{'https' if tls else 'http'}://{shown}:{self.port}"
        self.address = f"{self.origin}/{self.token}/"

    def __enter__(self) -> PageServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread for each connection, up to MOST_CONNECTIONS; one more is closed at once."""

    daemon_threads = True
    block_on_close = False  # a phone in the middle of a download must not hold up the end
    request_queue_size = 32
    allow_reuse_address = os.name != "nt"  # on Windows it would allow two servers on one port

    def __init__(self, address: tuple[str, int], page: PageServer) -> None:
        self.page = page
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Request)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away, or does not trust the certificate, is no error of ours."""
        import sys

        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError)):
            self.page.note(f"{client_address[0]}: {type(error).__name__}: {printable(str(error))[:200]}")


def _bound(host: str, port: int, page: PageServer, tls: ssl.SSLContext | None) -> _Server:
    """The server, listening. Raises BadInput that names host and port."""
    import errno

    try:
        server = _Server((host, port), page)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BadInput(
                f"--port {port}: is in use on {host}; name another, or 0 for any free one"
            ) from error
        if error.errno == errno.EACCES:
            raise BadInput(f"--port {port}: is not allowed to this user; name one above 1023") from error
        raise BadInput(
            f"--host {host}: cannot be listened on: {error.strerror or error}; it must be an address of this "
            "machine (leave --host away to have it found)"
        ) from error
    except OverflowError as error:
        raise BadInput(f"--port {port}: ports are 0 to 65535") from error
    if tls is not None:  # the handshake waits for the connection's own thread
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return server


class _Request(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server: _Server

    def do_GET(self) -> None:
        self._give(body=True)

    def do_HEAD(self) -> None:
        self._give(body=False)

    def do_POST(self) -> None:
        """Take an upload at `<token>/report`."""
        if self._below_token() != "report":
            self.close_connection = True  # its body is not read
            self._end(HTTPStatus.NOT_FOUND)
            return
        status, why = self._take()
        if why:
            self.server.page.note(f"refused what {self.client_address[0]} sent: {printable(why)[:200]}")
        self._end(status)

    def _below_token(self) -> str | None:
        """The address after the token, without its query; None where the token is wrong."""
        token, slash, rest = self.path.partition("?")[0].removeprefix("/").partition("/")
        right = hmac.compare_digest(token.encode("utf-8", "replace"), self.server.page.token.encode())
        return rest if right and slash else None

    def _give(self, body: bool) -> None:
        address = self._below_token()
        resource = None if address is None else self.server.page.resources.get(address)
        if resource is None:
            self._end(HTTPStatus.NOT_FOUND)
            return
        tag = f'"{resource.tag}"'
        if resource.revalidated and self.headers.get("If-None-Match") == tag:
            self._start(HTTPStatus.NOT_MODIFIED, {"ETag": tag, "Cache-Control": "no-cache"})
            return
        kept = {"ETag": tag, "Cache-Control": "no-cache"} if resource.revalidated else {}
        length = {"Content-Type": resource.content_type, "Content-Length": str(resource.size_bytes)}
        if resource.path is None:
            self._start(HTTPStatus.OK, length | kept)
            if body:
                self.wfile.write(resource.body)
            return
        with _open(resource.path) as file:
            if os.fstat(file.fileno()).st_size != resource.size_bytes:
                self.close_connection = True
                self.server.page.note(f"{resource.path}: has changed since it was first read")
                self._end(HTTPStatus.INTERNAL_SERVER_ERROR)
                return
            self._start(HTTPStatus.OK, length | kept)
            if body:
                shutil.copyfileobj(file, self.wfile, 1 << 18)

    def _take(self) -> tuple[HTTPStatus, str | None]:
        """Read, check and keep an upload: status, and why it was refused."""
        length = self.headers.get("Content-Length") or ""
        self.close_connection = True  # unless the whole body is read
        if not (length.isascii() and length.isdigit()) or self.headers.get("Transfer-Encoding"):
            return HTTPStatus.LENGTH_REQUIRED, "no Content-Length"
        if len(length) > 9 or int(length) > MOST_UPLOAD_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length[:20]} bytes, at most {MOST_UPLOAD_BYTES}"
        if self.headers.get_content_type() != "application/json":
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"{self.headers.get_content_type()}, not JSON"
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            return HTTPStatus.BAD_REQUEST, "ended early"
        self.close_connection = False
        try:
            upload = UPLOAD.validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            return HTTPStatus.BAD_REQUEST, f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}"
        if wrong := self.server.page.accepts(upload):
            return HTTPStatus.BAD_REQUEST, wrong
        self.server.page.received.put(Received(upload, self.client_address[0]))
        return HTTPStatus.NO_CONTENT, None

    def _end(self, status: HTTPStatus) -> None:
        """An answer without a body."""
        self._start(status, {} if status == HTTPStatus.NO_CONTENT else {"Content-Length": "0"})

    def _start(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Cache-Control": "no-store"} | HEADERS | dict(headers)).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses (methods, malformed requests): as short as our own answers."""
        self.close_connection = True
        self._end(HTTPStatus(code))

    def version_string(self) -> str:
        """No version for strangers."""
        return "edgedisp"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged; what is refused is."""


def _open(path: Path) -> Any:
    """The file, unless a link was put in its place since it was listed."""
    return open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb")
