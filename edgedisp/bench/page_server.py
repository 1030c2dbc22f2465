"""A small web server for the phone page: one page, some bundles, one address for uploads, a secret token.

Addresses are a table made before it starts: no request is looked up in the file system. Every address begins
with a random token; without it all is 404, and a connection has five seconds to name it. A client may send
JSON of bounded size that `read_upload` accepts; anything else is refused with one line in the log. The
headers allow what the page needs (its own scripts, WebAssembly) and give it the isolation without which
browsers have no threads (COOP, COEP, CORP), which they honour over https and on localhost only.
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
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from edgedisp.core.errors import BadInput
from edgedisp.core.files import data_folder, file_digest
from edgedisp.core.progress import printable

WEB = data_folder("export") / "web"
MOST_UPLOAD_BYTES = 8 << 20  # 5 repetitions of 128 tokens for 20 bundles are 200 KB, 10,000 scores 250 KB
FIRST_REQUEST_S, IDLE_S = 5.0, 60.0  # until the token is named; between requests after that
MOST_STRANGERS = 64  # connections that have not named it; a further one takes the place of the oldest
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
    "Cache-Control": "no-store",
    "Content-Length": "0",
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


def page_resources() -> dict[str, Resource]:
    """Address -> file of the page in export/web. BadInput where its vendored libraries are missing."""
    if not (WEB / "vendor" / "onnxruntime-web").is_dir():
        raise BadInput(
            f"{WEB / 'vendor'}: the page's libraries are missing, as this was installed without them; in a "
            "checkout `make web` fetches them (needs npm), and `make wheel` then packs them"
        )
    files = [path for path in sorted(WEB.rglob("*")) if path.suffix in PAGE_TYPES]
    resources = {path.relative_to(WEB).as_posix(): file_resource(path, WEB, True) for path in files}
    return {**resources, "": resources["index.html"]}


class PageServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Context manager: serves `resources` (address below the token -> what it gives) until it ends.

    read_upload: makes an upload of a request's body; ValueError says why it is refused. note: takes the lines
    of the log. address: host and port, 0 for any free one. https: with a new certificate, whose SHA-256 is
    `fingerprint`. `received` queues (upload, client's address). Raises BadInput for what cannot be served.
    """

    daemon_threads = True
    block_on_close = False  # a phone in the middle of a download must not hold up the end
    request_queue_size = 128
    allow_reuse_address = os.name != "nt"  # on Windows it would allow two servers on one port

    def __init__(
        self,
        resources: Mapping[str, Resource],
        read_upload: Callable[[bytes], Any],
        note: Callable[[str], None],
        address: tuple[str, int] = ("127.0.0.1", 0),
        https: bool = False,
    ) -> None:
        self.token, (host, port) = secrets.token_urlsafe(16), address  # 128 bits
        self.resources = {quote(name): resource for name, resource in resources.items()}
        self.read_upload, self.note = read_upload, note
        self.received: queue.Queue[tuple[Any, str]] = queue.Queue()
        self.latest: deque[_Request] = deque()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tls, self.fingerprint = _self_signed(host) if https else (None, "")
        try:
            super().__init__(address, _Request)
        except (OSError, OverflowError) as error:
            raise BadInput(
                f"--host {host} --port {port}: cannot be listened on: {error}; the host must be an address "
                "of this machine (leave --host away to have it found), the port a free one, or 0"
            ) from error
        if tls is not None:  # the handshake waits for the connection's own thread
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.port: int = self.server_address[1]
        url_host = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if https else 'http'}://{url_host}:{self.port}/{self.token}/"

    def __enter__(self) -> PageServer:
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Not an error: a client that goes away, or does not trust the certificate."""
        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError)):
            self.note(f"{client_address[0]}: {type(error).__name__}: {printable(str(error))[:200]}")


def _self_signed(host: str) -> tuple[ssl.SSLContext, str]:
    """A TLS context for `host` with a new certificate, and its SHA-256 as browsers write it ("AB:CD:...")."""
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
    certificate.configure_cert(context)
    der = ssl.PEM_cert_to_DER_cert(certificate.cert_chain_pems[0].bytes().decode())
    return context, hashlib.sha256(der).digest().hex(":").upper()


class _Request(BaseHTTPRequestHandler):
    """One connection, which may bring several requests."""

    protocol_version = "HTTP/1.1"
    server: PageServer

    def setup(self) -> None:
        super().setup()
        self._is_stranger = True
        self.server.latest.append(self)
        if len(self.server.latest) > MOST_STRANGERS:
            self.server.latest.popleft()._cut()
        self._deadline = threading.Timer(FIRST_REQUEST_S, self._cut)
        self._deadline.daemon = True
        self._deadline.start()

    def finish(self) -> None:
        self._deadline.cancel()
        super().finish()

    def _cut(self) -> None:
        """End who has not named the token: also a handshake, or a request line that comes in drops."""
        with suppress(OSError):
            if self._is_stranger:
                self.connection.shutdown(socket.SHUT_RDWR)

    def _address(self) -> str | None:
        """What is asked for below the token; None without it."""
        token, slash, address = self.path.partition("?")[0].removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode()):
            return None
        self._is_stranger = False
        self._deadline.cancel()
        self.connection.settimeout(IDLE_S)
        return address

    def do_GET(self) -> None:
        address = self._address()
        resource = None if address is None else self.server.resources.get(address)
        if resource is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        headers = {"Content-Type": resource.content_type, "Content-Length": str(resource.size_bytes)}
        if resource.revalidated:
            headers |= {"ETag": f'"{resource.tag}"', "Cache-Control": "no-cache"}
            if self.headers.get("If-None-Match") == headers["ETag"]:
                self._answer(HTTPStatus.NOT_MODIFIED, headers)
                return
        try:
            file = resource.open()
        except OSError as error:
            self.server.note(f"{resource.path}: {error}")
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        with file:
            self._answer(HTTPStatus.OK, headers)
            shutil.copyfileobj(file, self.wfile, 1 << 18)

    def do_POST(self) -> None:
        """Take an upload at `<token>/report`; what is refused is one line in the log."""
        if self._address() != "report":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        client = self.client_address[0]
        try:
            upload = self.server.read_upload(self._body())
        except ValueError as error:
            self.server.note(f"refused what {client} sent: {printable(str(error))[:200]}")
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        self.server.received.put((upload, client))
        self._answer(HTTPStatus.OK, {})

    def _body(self) -> bytes:
        """The body of an upload. Raises ValueError."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise ValueError("no Content-Length")
        if int(length) > MOST_UPLOAD_BYTES:
            raise ValueError(f"{length[:20]} bytes, at most {MOST_UPLOAD_BYTES}")
        if self.headers.get_content_type() != "application/json":
            raise ValueError(f"{self.headers.get_content_type()}, not JSON")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ValueError("ended early")
        return body

    def _answer(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Also for what the base class refuses (methods, malformed requests): no body, and the end."""
        self.close_connection = True
        self._answer(HTTPStatus(code), {})

    def version_string(self) -> str:
        """No version for strangers."""
        return "edgedisp"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged; what is refused is."""
