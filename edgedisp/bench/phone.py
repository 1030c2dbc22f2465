"""`edgedisp phone`: serve the phone page on the local network and collect what phones measure.

Several phones may measure at the same time. Each page load is one result, and each of its uploads replaces
the one before, so a phone that is lost in the middle leaves what it had. The server listens on one address of
this machine, the one that leads to the network.
"""

from __future__ import annotations

import io
import queue
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from edgedisp.bench.page_protocol import PagePlan, Upload, page_result
from edgedisp.bench.page_server import PageServer
from edgedisp.core.errors import BadInput
from edgedisp.core.results import DeviceResult

PORT = 8717  # a browser keeps what it downloaded by address and port: the same one each time
MOST_RUNS = 256
GRACE_S = 0.5  # what a phone sent in the last moment


@dataclass(frozen=True)
class PhoneOptions:
    """host: None finds this machine's address. once: end after the first complete result.

    out: every result is written to this JSON file. report: results join the reports of the bundles' runs.
    as_json: one line of JSON at the end instead of tables.
    """

    host: str | None = None
    port: int = PORT
    https: bool = False
    once: bool = False
    out: Path | None = None
    report: bool = True
    as_json: bool = False


def serve(
    plan: PagePlan,
    options: PhoneOptions,
    note: Callable[[str], None],
    arrived: Callable[[str, DeviceResult], None],
) -> None:
    """Serve until Ctrl-C, or until the first complete result.

    arrived: takes (page load, result), of a complete result at once, at the end of those that phones have not
    completed. note: takes lines for people. Raises BadInput for a host or port that cannot be used.
    """
    if options.host in ("0.0.0.0", "::"):
        raise BadInput(
            f"--host {options.host}: stands for every address of this machine, and a phone cannot open it; "
            f"name one, or leave --host away ({local_address()})"
        )
    runs: dict[str, Upload] = {}  # by page load
    handled: set[str] = set()
    address = options.host or local_address(), options.port
    with PageServer(plan.resources, plan.read_upload, note, address, options.https) as server:
        note(invitation(server.url, server.fingerprint))
        with suppress(KeyboardInterrupt):  # also of what is done with a result, which is then done below
            while not (options.once and handled):
                with suppress(queue.Empty):  # a wait without end cannot be interrupted on Windows
                    upload = receive(server, runs, timeout_s=1.0)
                    if upload.complete and upload.run not in handled:
                        arrived(upload.run, _result(plan, upload))
                        handled.add(upload.run)
        time.sleep(GRACE_S)
        while not server.received.empty():
            receive(server, runs)
    for name, upload in runs.items():
        if upload.repetitions and name not in handled:
            arrived(name, _result(plan, upload))


def receive(server: PageServer, runs: dict[str, Upload], timeout_s: float = 0.0) -> Upload:
    """The next upload, which replaces the one before of its run. Raises queue.Empty."""
    upload: Upload
    upload, client = server.received.get(timeout=timeout_s)
    if upload.trouble:
        server.note(f"{client}: could not go on: {upload.trouble}")
    elif upload.run not in runs or upload.note != runs[upload.run].note:
        server.note(f"{client}: {upload.done}/{upload.total} {upload.note}")
    if upload.run in runs or len(runs) < MOST_RUNS:
        runs[upload.run] = upload
    return upload


def _result(plan: PagePlan, upload: Upload) -> DeviceResult:
    result = page_result(plan, upload, "phone")
    name = f"phone {result.machine['cpu']}" if result.machine["cpu"] else "phone"
    return replace(result, device=name, lost=None if upload.complete else "the phone has not sent the rest")


def local_address() -> str:
    """This machine's address on the network of its default route; 127.0.0.1 where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address kept for documentation; UDP sends nothing to connect
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def invitation(url: str, fingerprint: str = "") -> str:
    """The address with its QR code, and what to do with it. BadInput where the package `segno` is missing."""
    try:
        import segno
    except ModuleNotFoundError as error:
        raise BadInput('phone needs segno for the QR code: pip install "edgedisp[phone]"') from error
    qr_code = io.StringIO()
    segno.make(url, error="l").terminal(qr_code, border=2, compact=True)
    lines = [qr_code.getvalue().rstrip("\n"), "", f"Open on the phone, in the same network: {url}"]
    if "//127." in url:
        lines.append("This address is this machine's own; name one that the phone can reach with --host.")
    if fingerprint:
        lines.append("The browser will warn of the certificate, which nobody has signed. Its SHA-256 is")
        lines.append(fingerprint)
    return "\n".join([*lines, "Ctrl-C ends."])
