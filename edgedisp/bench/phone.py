"""`edgedisp phone`: serve the phone page on the local network and collect what phones measure.

The address and its QR code are shown, then whatever arrives: progress in one line each, figures as a table.
Several phones may measure at the same time; each page load is one result, and its later sendings replace the
earlier ones, so that a phone that is lost in the middle leaves what it had (`complete` false).

The server listens on one address of this machine, the one that leads to the network, and not on all of them.
Left out: finding phones by themselves, and measuring on a phone whose screen is off.
"""

from __future__ import annotations

import io
import queue
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgedisp.bench.certificate import self_signed
from edgedisp.bench.page_plan import PagePlan, measured
from edgedisp.bench.page_resources import page_resources
from edgedisp.bench.page_scores import Collected
from edgedisp.bench.page_server import PageServer, Received
from edgedisp.bench.uploads import Figures, Scores, Step, Trouble
from edgedisp.core.errors import BadInput

PORT = 8717  # a browser keeps what it downloaded by address and port: the same one each time
MOST_RUNS = 256
GRACE_S = 0.5  # what a phone sent in the last moment
COLUMNS = (
    ("bundle", "label", 28, ""),
    ("ttft ms", "ttft_ms", 9, ".1f"),
    ("prefill t/s", "prefill_tokens_per_s", 12, ".0f"),
    ("decode t/s", "decode_tokens_per_s", 11, ".1f"),
    ("p50 ms", "token_ms_p50", 8, ".1f"),
    ("p90 ms", "token_ms_p90", 8, ".1f"),
    ("load s", "load_s", 7, ".2f"),
    ("heap MB", "peak_memory_bytes", 8, "MB"),
    ("MB", "download_bytes", 6, "MB"),
)


def serve(
    plan: PagePlan,
    web: Path,
    *,
    host: str | None = None,
    port: int = PORT,
    https: bool = False,
    once: bool = False,
    note: Callable[[str], None],
    arrived: Callable[[dict[str, Any]], None] = lambda result: None,
    started: Callable[[str], None] = lambda address: None,
) -> list[dict[str, Any]]:
    """Serve until Ctrl-C, or until the first complete result where `once`; the results, in order of arrival.

    `web` is export/web. `note` takes lines for people, `arrived` each complete result, `started` the address.
    Each result is what `page_plan.measured` returns. Raises BadInput for a host or port that cannot be had,
    where packages of the extra [phone] are missing, and where the page's libraries are.
    """
    host = _one_address(host)
    tls, fingerprint = self_signed(host) if https else (None, "")
    found = Results(plan, note, arrived)
    resources = {**page_resources(web), **plan.resources()}
    with PageServer(resources, host=host, port=port, accepts=plan.accepts, note=note, tls=tls) as server:
        note(invitation(server.address, fingerprint))
        started(server.address)
        with suppress(KeyboardInterrupt):
            while not (once and found.complete):
                with suppress(queue.Empty):  # a wait without end cannot be interrupted on Windows
                    found.take(server.received.get(timeout=1.0))
        time.sleep(GRACE_S)
        while not server.received.empty():
            found.take(server.received.get())
    return found.results()


class Results:
    """What has been received, by page load."""

    def __init__(
        self, plan: PagePlan, note: Callable[[str], None], arrived: Callable[[dict[str, Any]], None]
    ) -> None:
        self.plan, self.note, self.arrived = plan, note, arrived
        self.figures: dict[str, tuple[Figures, str]] = {}
        self.scores: dict[str, Collected] = {}

    @property
    def complete(self) -> bool:
        """Whether any page came to its end."""
        return any(self._ended(run) for run in self.figures)

    def _ended(self, run: str) -> bool:
        return self.figures[run][0].complete and self.scores[run].complete

    def take(self, received: Received) -> None:
        """Keep figures, tell the rest."""
        upload, client = received.upload, received.client
        if isinstance(upload, Step):
            self.note(f"{client}: {upload.done}/{upload.total} {upload.note}")
        elif isinstance(upload, Trouble):
            self.note(f"{client}: could not go on: {upload.message}")
        elif isinstance(upload, Scores):
            self._take_scores(upload)
        elif upload.run not in self.figures and len(self.figures) >= MOST_RUNS:
            self.note(f"{client}: not kept, there are {MOST_RUNS} results already")
        else:
            known = self.figures.get(upload.run)
            self.figures[upload.run] = (upload, client)
            scores = self.scores.setdefault(upload.run, Collected(self.plan.requests))
            if upload.complete and scores.complete and not (known and known[0].complete):
                self.arrived(self._result(upload, client))

    def _take_scores(self, upload: Scores) -> None:
        """Scores follow the figures of their page; those of a page that sent none are left."""
        scores = self.scores.get(upload.run)
        if scores is None or scores.complete:
            return
        scores.take(upload)
        if self._ended(upload.run):
            self.arrived(self._result(*self.figures[upload.run]))

    def results(self) -> list[dict[str, Any]]:
        """Every result with at least one timed turn."""
        return [self._result(*kept) for kept in self.figures.values() if kept[0].repetitions]

    def _result(self, figures: Figures, client: str) -> dict[str, Any]:
        told = figures.device.model
        found = measured(self.plan, figures, device=f"phone {told}" if told else "phone")
        lost = {} if self._ended(figures.run) else {"lost": "the phone has not sent the rest"}
        scores = self.scores[figures.run].result()
        return {**found, **scores, "kind": "phone", "client": client, "run": figures.run, **lost}


def _one_address(host: str | None) -> str:
    """Where to listen: `host`, else this machine's address on its network. BadInput for all of them."""
    if host in ("0.0.0.0", "::"):
        raise BadInput(
            f"--host {host}: stands for every address of this machine, and a phone cannot open it; name one, "
            f"or leave --host away ({local_address()})"
        )
    return host or local_address()


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
    drawn = io.StringIO()
    segno.make(address, error="l").terminal(drawn, border=2, compact=True)
    lines = [drawn.getvalue().rstrip("\n"), "", f"Open on the phone, in the same network: {address}"]
    if "//127." in address:
        lines.append("This address is this machine's own; name one that the phone can reach with --host.")
    if fingerprint:
        lines.append("The browser will warn of the certificate, which nobody has signed. Its SHA-256 is")
        lines.append(fingerprint)
    return "\n".join([*lines, "Ctrl-C ends."])


def render(result: Mapping[str, Any]) -> str:
    """A result as a table for people, with the device above it and warnings below."""
    device = result["machine"]["browser"]
    name = device["model"] or device["user_agent"]
    facts = [f"{device['cores'] or '?'} cores", f"{device['threads']} threads", device["runtime"]]
    if not result["complete"]:
        facts.append("NOT COMPLETE")
    lines = [f"{name} ({', '.join(facts)})"]
    lines.append(" ".join(f"{head:<{wide}}" if key == "label" else f"{head:>{wide}}"
                          for head, key, wide, _ in COLUMNS))  # fmt: skip
    for row in result["rows"]:
        lines.append(" ".join(_cell(row[key], wide, form) for _, key, wide, form in COLUMNS))
        lines += [f"  {warning}" for warning in row["warnings"]]
    return "\n".join(lines)


def _cell(value: Any, wide: int, form: str) -> str:
    if isinstance(value, str):
        return f"{value:<{wide}}"
    if value is None:
        return f"{'-':>{wide}}"
    return f"{value / 1e6:{wide}.0f}" if form == "MB" else f"{value:{wide}{form}}"
