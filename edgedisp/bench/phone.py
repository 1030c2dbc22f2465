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

from edgedisp.bench.page_protocol import Figures, PagePlan, PageRun, Step, Trouble, Upload
from edgedisp.bench.page_server import PageServer, page_resources
from edgedisp.core.errors import BadInput
from edgedisp.core.results import DeviceResult

PORT = 8717  # a browser keeps what it downloaded by address and port: the same one each time
MOST_RUNS = 256
GRACE_S = 0.5  # what a phone sent in the last moment


@dataclass(frozen=True)
class ServeOptions:
    """host: None finds this machine's address. once: end after the first complete result."""

    host: str | None = None
    port: int = PORT
    https: bool = False
    once: bool = False


def serve(
    plan: PagePlan,
    web: Path,
    options: ServeOptions,
    *,
    note: Callable[[str], None],
    arrived: Callable[[str, DeviceResult], None],
) -> dict[str, DeviceResult]:
    """Serve until Ctrl-C, or until the first complete result; page load -> result, in order of arrival.

    `web` is export/web. `note` takes lines for people, `arrived` each complete result. Raises BadInput for a
    host or port that cannot be used, and without the extra [phone] or the page's libraries.
    """
    if options.host in ("0.0.0.0", "::"):
        raise BadInput(
            f"--host {options.host}: stands for every address of this machine, and a phone cannot open it; "
            f"name one, or leave --host away ({local_address()})"
        )
    host = options.host or local_address()
    results = PhoneResults(plan, note, arrived)
    resources = {**page_resources(web), **plan.resources()}
    with PageServer(resources, plan.read_upload, note, host, options.port, options.https) as server:
        note(invitation(server.address, server.fingerprint))
        with suppress(KeyboardInterrupt):
            while not (options.once and results.complete):
                with suppress(queue.Empty):  # a wait without end cannot be interrupted on Windows
                    results.add(*server.received.get(timeout=1.0))
        time.sleep(GRACE_S)
        while not server.received.empty():
            results.add(*server.received.get())
    return results.all()


class PhoneResults:
    """What has been received, by page load."""

    def __init__(
        self, plan: PagePlan, note: Callable[[str], None], arrived: Callable[[str, DeviceResult], None]
    ) -> None:
        self.plan, self.note, self.arrived = plan, note, arrived
        self.runs: dict[str, PageRun] = {}
        self.complete: set[str] = set()

    def add(self, upload: Upload, client: str) -> None:
        """Keep figures and scores, note the rest. Scores of a page that sent no figures are ignored."""
        name = upload.run
        if isinstance(upload, Step):
            self.note(f"{client}: {upload.done}/{upload.total} {upload.note}")
        elif isinstance(upload, Trouble):
            self.note(f"{client}: could not go on: {upload.message}")
        elif name in self.runs:
            self.runs[name].add(upload)
        elif len(self.runs) >= MOST_RUNS:
            self.note(f"{client}: not kept, there are {MOST_RUNS} results already")
        elif isinstance(upload, Figures):
            self.runs[name] = PageRun(self.plan)
            self.runs[name].add(upload)
        if name in self.runs and self.runs[name].complete and name not in self.complete:
            self.complete.add(name)
            self.arrived(name, self._result(name))

    def all(self) -> dict[str, DeviceResult]:
        """Every result with at least one timed turn."""
        return {name: self._result(name) for name, run in self.runs.items() if run.turns}

    def _result(self, name: str) -> DeviceResult:
        result = self.runs[name].result("phone")
        lost = None if name in self.complete else "the phone has not sent the rest"
        return replace(result, device=" ".join(filter(None, ("phone", result.machine["cpu"]))), lost=lost)


def local_address() -> str:
    """This machine's address on the network of its default route; 127.0.0.1 where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address kept for documentation; UDP sends nothing to connect
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def invitation(address: str, fingerprint: str = "") -> str:
    """The address with its QR code, and what to do with it. BadInput where the package `segno` is missing."""
    try:
        import segno
    except ModuleNotFoundError as error:
        raise BadInput('phone needs segno for the QR code: pip install "edgedisp[phone]"') from error
    qr_code = io.StringIO()
    segno.make(address, error="l").terminal(qr_code, border=2, compact=True)
    lines = [qr_code.getvalue().rstrip("\n"), "", f"Open on the phone, in the same network: {address}"]
    if "//127." in address:
        lines.append("This address is this machine's own; name one that the phone can reach with --host.")
    if fingerprint:
        lines.append("The browser will warn of the certificate, which nobody has signed. Its SHA-256 is")
        lines.append(fingerprint)
    return "\n".join([*lines, "Ctrl-C ends."])
