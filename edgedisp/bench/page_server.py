"""A small web server for the phone page: one page, some bundles, one address for uploads, a secret token.

Addresses are a table made before it starts: no request is looked up in the file system. Every address begins
with a random token; without it all is 404. A client may send JSON of bounded size that `read_upload` accepts;
anything else is refused with one line in the log. A connection has five seconds to name the token, and only
those that did count towards MOST_REQUESTS, so strangers cannot lock phones out. The headers allow what the
page needs (its own scripts, WebAssembly) and give it the isolation without which browsers have no threads
(COOP, COEP, CORP); browsers honour isolation over https and on localhost only.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
import queue
import secrets
import shutil
import socket
import socketserver
import ssl
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from edgedisp.core.errors import BadInput
from edgedisp.core.files import file_digest
from edgedisp.core.progress import printable

MOST_UPLOAD_BYTES = 2 << 20  # 5 repetitions of 128 tokens for 20 bundles are 200 KB
MOST_REQUESTS = 64  # at the same time, of those that know the token
MOST_STRANGERS = 512  # connections in all; each has FIRST_REQUEST_S to name the token
FIRST_REQUEST_S = 5.0
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
PAGE_TYPES = {
    **{f".{name}": f"text/{name}; charset=utf-8" for name in ("html", "css")},
    **{f".{name}": "text/javascript; charset=utf-8" for name in ("js", "mjs")},
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}


@dataclass(frozen=True)
class Resource:
    """What one address of the server gives: a file, or bytes made beforehand. `tag` is its SHA-256.

    revalidated: the browser may keep it and ask whether it changed; bundles are kept by the page itself.
    """

    content_type: str
    size_bytes: int
    tag: str
    path: Path | None = None
    body: bytes = b""
    revalidated: bool = False

    def open(self) -> BinaryIO:
        """Its bytes. Raises OSError where a file has changed since, or a link was put in its place."""
        if self.path is None:
            return io.BytesIO(self.body)
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        file = open(os.open(self.path, flags), "rb")  # noqa: SIM115
        if os.fstat(file.fileno()).st_size != self.size_bytes:
            file.close()
            raise OSError("has changed since it was first read")
        return file


def file_resource(path: Path, root: Path, revalidated: bool = False) -> Resource:
    """A regular file inside `root`, also when links are followed. Raises BadInput."""
    real = path.resolve()
    if not real.is_file() or not real.is_relative_to(root.resolve()):
        raise BadInput(f"{path}: is missing, or a link out of {root}; export the bundle again, without links")
    other = "application/json" if path.suffix == ".json" else "application/octet-stream"
    kind = PAGE_TYPES.get(path.suffix, other)
    return Resource(kind, real.stat().st_size, file_digest(real), real, revalidated=revalidated)


def json_resource(content: Any) -> Resource:
    """A JSON answer made beforehand."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    return Resource("application/json", len(body), hashlib.sha256(body).hexdigest(), body=body)


def page_resources(web: Path) -> dict[str, Resource]:
    """Address -> file of the page in `export/web/`. BadInput where its vendored libraries are missing."""
    if not (web / "vendor" / "onnxruntime-web").is_dir():
        raise BadInput(
            f"{web / 'vendor'}: the page's libraries are missing, as this was installed without them; in a "
            "checkout `make web` fetches them (needs npm), and `make wheel` then packs them"
        )
    files = [path for path in sorted(web.rglob("*")) if path.suffix in PAGE_TYPES]
    resources = {path.relative_to(web).as_posix(): file_resource(path, web, True) for path in files}
    return {**resources, "": resources["index.html"]}


class PageServer:
    """Context manager: serves `resources` (address below the token -> what it gives) until it ends.

    read_upload: makes an upload of a request's body; ValueError says why it is refused. note: takes the lines
    of the log. port: 0 is any free one. https: with a new certificate, whose SHA-256 is `fingerprint`.
    `received` queues (upload, client's address). Raises BadInput for a host or port that cannot be used, and
    without the package that makes certificates.
    """

    def __init__(
        self,
        resources: Mapping[str, Resource],
        read_upload: Callable[[bytes], Any],
        note: Callable[[str], None],
        host: str = "127.0.0.1",
        port: int = 0,
        https: bool = False,
    ) -> None:
        self.token = secrets.token_urlsafe(16)  # 128 bits
        self.resources = {quote(address): resource for address, resource in resources.items()}
        self.read_upload, self.note = read_upload, note
        self.received: queue.Queue[tuple[Any, str]] = queue.Queue()
        tls, self.fingerprint = _self_signed(host) if https else (None, "")
        self._server = _Server((host, port), self)
        if tls is not None:  # the handshake waits for the connection's own thread
            wrapped = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
            self._server.socket = wrapped
        self.port: int = self._server.server_address[1]
        url_host = f"[{host}]" if ":" in host else host
        self.address = f"{'https' if https else 'http'}://{url_host}:{self.port}/{self.token}/"

    def __enter__(self) -> PageServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _self_signed(host: str) -> tuple[ssl.SSLContext, str]:
    """A TLS context for `host` with a new certificate, and its SHA-256 as browsers write it ("AB:CD:...").

    BadInput where the package `trustme` is missing, or for a host that no certificate can name.
    """
    try:
        import trustme
    except ModuleNotFoundError as error:
        raise BadInput('--https needs trustme: pip install "edgedisp[phone]"') from error
    try:
        certificate = trustme.CA().issue_cert(host)
    except ValueError as error:
        raise BadInput(f"--host {host}: is neither an address nor a name in ASCII letters") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with tempfile.TemporaryDirectory(prefix="edgedisp-") as folder:  # 0700; ssl reads keys from files alone
        path = Path(folder) / "server.pem"
        certificate.private_key_and_cert_chain_pem.write_to_path(str(path))
        context.load_cert_chain(path)
    der = ssl.PEM_cert_to_DER_cert(certificate.cert_chain_pems[0].bytes().decode())
    return context, hashlib.sha256(der).digest().hex(":").upper()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread for each connection, up to MOST_STRANGERS; one more is closed at once."""

    daemon_threads = True
    block_on_close = False  # a phone in the middle of a download must not hold up the end
    request_queue_size = 128
    allow_reuse_address = os.name != "nt"  # on Windows it would allow two servers on one port

    def __init__(self, address: tuple[str, int], page: PageServer) -> None:
        self.page = page
        self.requests = threading.BoundedSemaphore(MOST_REQUESTS)
        self._connections = threading.BoundedSemaphore(MOST_STRANGERS)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(address, _Request)
        except (OSError, OverflowError) as error:
            host, port = address
            raise BadInput(
                f"--host {host} --port {port}: cannot be listened on: {error}; the host must be an address "
                "of this machine (leave --host away to have it found), the port a free one, or 0"
            ) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Not an error: a client that goes away, or does not trust the certificate."""
        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError)):
            self.page.note(f"{client_address[0]}: {type(error).__name__}: {printable(str(error))[:200]}")


class _Request(BaseHTTPRequestHandler):
    """One connection, which may bring several requests."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self._deadline = threading.Timer(FIRST_REQUEST_S, self._cut)
        self._deadline.daemon = True
        self._deadline.start()

    def finish(self) -> None:
        self._deadline.cancel()
        super().finish()

    def _cut(self) -> None:
        """The token was not named in time. Also ends a handshake, or a request line that comes in drops."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        """Answer below the token if a request is free; all else is 404."""
        token, slash, address = self.path.partition("?")[0].removeprefix("/").partition("/")
        right = hmac.compare_digest(token.encode("utf-8", "replace"), self.server.page.token.encode())
        if not right or not slash:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self._deadline.cancel()
        self.connection.settimeout(IDLE_S)
        if not self.server.requests.acquire(blocking=False):
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        try:
            (self._receive if self.command == "POST" else self._give)(address)
        finally:
            self.server.requests.release()

    do_HEAD = do_POST = do_GET

    def _give(self, address: str) -> None:
        resource = self.server.page.resources.get(address)
        if resource is None:
            self._end(HTTPStatus.NOT_FOUND)
            return
        cached = {"ETag": f'"{resource.tag}"', "Cache-Control": "no-cache"} if resource.revalidated else {}
        if cached and self.headers.get("If-None-Match") == cached["ETag"]:
            self._start(HTTPStatus.NOT_MODIFIED, cached)
            return
        try:
            file = resource.open()
        except OSError as error:
            self.server.page.note(f"{resource.path}: {error}")
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        with file:
            sizes = {"Content-Type": resource.content_type, "Content-Length": str(resource.size_bytes)}
            self._start(HTTPStatus.OK, sizes | cached)
            if self.command == "GET":
                shutil.copyfileobj(file, self.wfile, 1 << 18)

    def _receive(self, address: str) -> None:
        """Take an upload at `<token>/report`; what is refused is one line in the log."""
        self.close_connection = True  # unless the whole body is read
        status, why = self._read_upload() if address == "report" else (HTTPStatus.NOT_FOUND, None)
        if why:
            self.server.page.note(f"refused what {self.client_address[0]} sent: {printable(why)[:200]}")
        self._end(status)

    def _read_upload(self) -> tuple[HTTPStatus, str | None]:
        """Read, check and queue an upload: status, and why it was refused."""
        length = self.headers.get("Content-Length") or ""
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
            upload = self.server.page.read_upload(body)
        except ValueError as error:
            return HTTPStatus.BAD_REQUEST, str(error)
        self.server.page.received.put((upload, self.client_address[0]))
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
        """Also for what the base class refuses (methods, malformed requests): no body, and the end."""
        self.close_connection = True
        self._end(HTTPStatus(code))

    def version_string(self) -> str:
        """No version for strangers."""
        return "edgedisp"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged; what is refused is."""
