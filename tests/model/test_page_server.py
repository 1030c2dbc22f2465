"""The phone page's server, spoken to over real connections."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from fake_page import DEVICE, RUN, figures
from tiny_bundle import Bundles, copy_with, order

from edgedisp.bench import page_server
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.page_protocol import PagePlan, Upload, page_result
from edgedisp.bench.page_server import MOST_UPLOAD_BYTES, PageServer
from edgedisp.bench.phone import receive
from edgedisp.bench.results import label_bundles
from edgedisp.bench.system import runner
from edgedisp.core.errors import BadInput
from edgedisp.core.results import DeviceResult, Estimate

PROMPT, GENERATE, REPETITIONS = 6, 4, 3
SIZES = BenchOptions(PROMPT, GENERATE, REPETITIONS)
Response = tuple[int, http.client.HTTPMessage, bytes]  # status, headers, body


@pytest.fixture(scope="module", autouse=True)
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A page that needs no vendored libraries."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "vendor" / "onnxruntime-web").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html>hello")
    (folder / "app.js").write_text("1")
    (folder / "secret.txt").write_text("not of the page")
    (folder / "vendor" / "onnxruntime-web" / "a.wasm").write_bytes(b"\0asm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_server, "WEB", folder)
        yield folder


@pytest.fixture(scope="module")
def plan(bundles: Bundles, web: Path) -> PagePlan:
    return PagePlan({label: bundles[label] for label in ("fp32", "twin")}, SIZES)


@pytest.fixture(scope="module")
def plan_json(plan: PagePlan) -> dict[str, Any]:
    """plan.json, as a page gets it."""
    return dict(json.loads(plan.resources["plan.json"].body))


class Site:
    """A running server with its log."""

    def __init__(self, server: PageServer, log: list[str]) -> None:
        self.server, self.log, self.token = server, log, server.token

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Response:
        """`path` is sent as it stands: nothing is normalised on the way."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
        with contextlib.closing(connection):
            fields = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, fields)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def get(self, address: str) -> Response:
        return self.request("GET", f"/{self.token}/{address}")

    def post(self, content: Any) -> int:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.request("POST", f"/{self.token}/report", body, Content_Type="application/json")[0]


@pytest.fixture
def site(plan: PagePlan) -> Iterator[Site]:
    log: list[str] = []
    with PageServer(plan.resources, plan.read_upload, log.append) as server:
        yield Site(server, log)


def test_the_page_its_plan_and_every_file_of_a_bundle_come_whole(site: Site, plan: PagePlan) -> None:
    assert site.get("")[2] == site.get("index.html")[2] == b"<!doctype html>hello"
    for row in json.loads(site.get("plan.json")[2])["bundles"]:
        config = json.loads((plan.folders[row["label"]] / "genai_config.json").read_text())["model"]
        assert row["prompt_ids"] == runner().prompt_ids(config["vocab_size"], PROMPT, 0)[0].tolist()
        assert {"model.onnx", "model.onnx.data", "tokenizer.json", "genai_config.json"} <= set(row["files"])
        for name, file in row["files"].items():
            status, headers, body = site.get(file["url"])
            assert status == 200 and body == (plan.folders[row["label"]] / name).read_bytes()
            assert int(headers["Content-Length"]) == file["size_bytes"] == len(body)


def test_without_the_token_all_is_404(site: Site) -> None:
    wrong = site.token[:-1] + ("A" if site.token[-1] != "A" else "B")
    paths = ["/", "/index.html", f"/{wrong}/", f"/{site.token}", f"/{site.token[:-1]}/", "/plan.json", "//"]
    for path in paths:
        assert site.request("GET", path)[::2] == (404, b"")
    assert site.request("POST", f"/{wrong}/report", b"{}", Content_Type="application/json")[0] == 404
    with PageServer({}, bytes, print) as other:
        assert other.token != site.token and len(other.token) >= 22


def test_only_listed_files_are_served(site: Site) -> None:
    paths = [
        "../secret", "bundle/0/../../../etc/passwd", "bundle/0/%2e%2e/%2e%2e/etc/passwd",
        "bundle/0/..%2f..%2fx", "bundle/0/..\\..\\x", "bundle/0//etc/passwd", "/etc/passwd",
        "%2fetc%2fpasswd", "bundle/0/record.json", "bundle/0/", "bundle/9/model.onnx",
        "bundle/0/model.onnx%00.json", "secret.txt", "./index.html", "vendor/../index.html",
        "bundle/0/%6dodel.onnx", "bundle/0/%252e%252e/x",
    ]  # fmt: skip
    for path in paths:
        assert site.get(path)[::2] == (404, b""), path


def test_a_link_out_of_the_bundle_is_refused_also_later(bundles: Bundles, tmp_path: Path) -> None:
    bundle = copy_with(bundles["fp32"], tmp_path / "bundle")
    plan = PagePlan({"later": bundle}, SIZES)
    log: list[str] = []
    with PageServer(plan.resources, plan.read_upload, log.append) as server:
        site = Site(server, log)
        (bundle / "genai_config.json").write_text("{}")
        (bundle / "tokenizer.json").unlink()
        (bundle / "tokenizer.json").symlink_to("/etc/passwd")
        for name in ("genai_config", "tokenizer"):
            assert site.get(f"bundle/0/{name}.json")[::2] == (500, b"")
    assert "has changed" in log[0] and len(log) == 2
    with pytest.raises(BadInput, match=r"tokenizer\.json: is missing, or a link out of"):
        PagePlan({"linked": bundle}, SIZES)


def test_every_answer_isolates_the_page_and_keeps_others_out(site: Site) -> None:
    expected = {
        "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp",
        "Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }  # fmt: skip
    for _, headers, _ in (site.get(""), site.get("plan.json"), site.get("nothing")):
        assert {name: headers[name] for name in expected} == expected
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "'unsafe" not in policy and "*" not in policy
        assert "Python" not in headers["Server"]


def test_etags_and_other_methods(site: Site) -> None:
    path, tag = f"/{site.token}/app.js", site.get("app.js")[1]["ETag"]
    assert site.request("GET", path, If_None_Match=tag)[::2] == (304, b"")
    assert site.get("plan.json")[1]["Cache-Control"] == "no-store"
    assert {site.request(method, path)[0] for method in ("HEAD", "PUT", "DELETE", "OPTIONS")} == {501}


def test_nonsense_is_refused_with_one_line_and_nothing_is_stored(
    site: Site, plan_json: dict[str, Any]
) -> None:
    good = figures(plan_json)
    first, *rest = good["repetitions"]

    def turn(**changes: Any) -> dict[str, Any]:
        return {**good, "repetitions": [{**first, **changes}, *rest]}

    cases = {
        "no JSON": b"{", "not UTF-8": b"\xff\xfe", "an array": [], "nested without end": b"[" * 100_000,
        "a key too many": {**good, "extra": 1},
        "no run": {**good, "run": "../../x"},
        "a text for a number": turn(ttft_ms="100"),
        "not finite": json.dumps(turn(ttft_ms=float("nan"))).encode(),
        "negative": turn(token_ms=[-1.0] * (GENERATE - 1)),
        "no time at all": turn(ttft_ms=0.0),
        "fewer tokens": turn(tokens=[1]), "fewer times": turn(token_ms=[1.0]),
        "another bundle": turn(label="other"), "another order": turn(repetition=2),
        "a missing turn": {**good, "repetitions": rest},
        "complete too early": {**good, "repetitions": good["repetitions"][:2]},
        "a bundle twice": {**good, "loaded": [good["loaded"][0]] * 2}, "no device": {**good, "device": None},
        "a long text": {**good, "device": {**DEVICE, "user_agent": "x" * 501}},
        "a huge number": {**good, "device": {**DEVICE, "cores": 10**30}},
    }  # fmt: skip
    for count, (name, content) in enumerate(cases.items(), 1):
        assert site.post(content) == 400, name
        assert len(site.log) == count and "\n" not in site.log[-1], (name, site.log[-1])
    assert site.server.received.empty()
    assert site.post(good) == 200  # and it goes on
    assert site.server.received.get(timeout=5)[0].run == RUN and len(site.log) == len(cases)


def test_uploads_have_a_size_a_length_and_a_type(site: Site, plan_json: dict[str, Any]) -> None:
    path, kind = f"/{site.token}/report", {"Content_Type": "application/json"}
    for length in (str(MOST_UPLOAD_BYTES + 1), "9" * 40, "-1"):
        assert site.request("POST", path, b"", Content_Length=length, **kind)[0] == 400
    body = json.dumps(figures(plan_json)).encode()
    assert site.request("POST", path, body, Content_Type="text/plain")[0] == 400
    assert site.request("POST", f"/{site.token}/plan.json", body, **kind)[0] == 404
    assert site.server.received.empty()


def test_what_a_phone_says_cannot_move_the_terminal(site: Site, plan_json: dict[str, Any]) -> None:
    assert site.post(figures(plan_json, 0, trouble="a\x1b[2J\nb")) == 200
    receive(site.server, {}, 5.0)
    assert site.log == ["127.0.0.1: could not go on: a [2J b"]


def test_strangers_take_one_anothers_places_and_have_a_moment_to_name_the_token(
    plan: PagePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PageServer(plan.resources, plan.read_upload, print) as server:
        known = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        for _ in range(3):
            known.request("GET", f"/{server.token}/app.js")
            assert known.getresponse().read() == b"1"
            crowd = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(100)]
            assert crowd[0].recv(9) == b""  # at once: the places are for the latest
            for connection in crowd:
                connection.close()
    monkeypatch.setattr(page_server, "FIRST_REQUEST_S", 0.5)
    with PageServer(plan.resources, plan.read_upload, print) as server:
        crowd = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(128)]
        crowd[0].sendall(b"GET /")
        assert Site(server, []).get("app.js")[0] == 200
        assert crowd[0].recv(9) == crowd[1].recv(9) == b""  # cut, also in the middle of a request line
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
        for pause_s in (0.0, 0.8):  # whoever named it may rest
            time.sleep(pause_s)
            client.request("GET", f"/{server.token}/app.js")
            assert client.getresponse().read() == b"1"
        for connection in crowd:
            connection.close()


def test_a_port_in_use_and_an_address_of_others_are_named() -> None:
    def start(host: str, port: int) -> PageServer:
        return PageServer({}, bytes, print, (host, port))

    with start("127.0.0.1", 0) as first, pytest.raises(BadInput, match=rf"--port {first.port}: .* in use"):
        start("127.0.0.1", first.port)
    for host, port in (("192.0.2.1", 0), ("127.0.0.1", 70_000)):
        with pytest.raises(BadInput, match=rf"--host {host} --port {port}: cannot be listened on"):
            start(host, port)


def test_https_has_a_new_certificate(plan: PagePlan) -> None:
    pytest.importorskip("trustme", reason='needs the extra [phone]: pip install "edgedisp[phone]"')
    log: list[str] = []
    with PageServer(plan.resources, plan.read_upload, log.append, https=True) as server:
        assert server.url.startswith("https://127.0.0.1:")
        silent = socket.create_connection(("127.0.0.1", server.port))  # no handshake: must not block others
        plain = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        with pytest.raises((http.client.HTTPException, OSError)):
            plain.request("GET", urlsplit(server.url).path)
            plain.getresponse()
        # The certificate is trusted if it is given, for this address alone.
        pem = ssl.get_server_certificate(("127.0.0.1", server.port))
        context = ssl.create_default_context(cadata=pem)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its issuer is thrown away
        client = http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=10)
        client.request("GET", urlsplit(server.url).path)
        assert client.getresponse().read() == b"<!doctype html>hello"
        der = ssl.PEM_cert_to_DER_cert(pem)
        assert hashlib.sha256(der).hexdigest().upper() == server.fingerprint.replace(":", "")
        silent.close()
    assert log == []


def result_of(plan: PagePlan, content: dict[str, Any], **sensors: Any) -> DeviceResult:
    return page_result(plan, plan.read_upload(json.dumps(content).encode()), "phone", {3: sensors})


def test_rows_follow_from_the_times_that_were_sent(bundles: Bundles) -> None:
    folders = {"baseline/x": bundles["fp32"], "twin/x": bundles["twin"]}
    plan = PagePlan(folders, SIZES)
    plan_json = json.loads(plan.resources["plan.json"].body)
    result = result_of(plan, figures(plan_json), clock_mhz=7.0)
    baseline, twin = folders
    assert order(result) == [baseline, twin, twin, baseline, baseline, twin]
    assert [turn.get("clock_mhz") for turn in result.repetitions] == [None, None, None, 7.0, None, None]
    row, _ = result.rows
    first = [100.0, 103.0, 104.0]  # turns 0, 3, 4
    assert row.ttft_ms == Estimate(103.0, 100.0, 104.0)
    assert row.prefill_tokens_per_s and row.decode_tokens_per_s
    assert row.prefill_tokens_per_s.value == pytest.approx(np.median([PROMPT / t * 1000 for t in first]))
    assert row.decode_tokens_per_s.value == pytest.approx(1000 / 13.0)
    pooled = [10.0] * 3 + [13.0] * 3 + [14.0] * 3
    assert row.token_ms_p90 == pytest.approx(np.percentile(pooled, 90))
    assert row.load_s == 0.6 and row.peak_memory_bytes == 1 << 26
    assert row.weights_bytes == sum(f.stat().st_size for f in folders[baseline].glob("model.onnx*"))
    assert result.pairs[0]["same_graph"] and result.machine["browser"]["cores"] == 8
    # a phone lost after its first turn, which it spent in the background
    content = figures(plan_json, turns=1)
    content["repetitions"][0]["hidden"] = True
    (row,) = result_of(plan, content).rows
    assert row.label == baseline and "the page was in the background during 1 repetitions" in row.warnings


def test_scores_that_do_not_fit_schema_or_plan_are_refused(bundles: Bundles) -> None:
    item = [([1], [2]), ([1], [3])]
    plan = PagePlan({"a": bundles["fp32"]}, replace(SIZES, requests={"a": [item] * 3}))
    plan_json = json.loads(plan.resources["plan.json"].body)
    pair = [[-1.0, True], [-2.0, False]]

    def read(answers: Any, label: str = "a", complete: bool = False) -> Upload:
        content = figures(plan_json, answers={label: answers}, complete=complete)
        return plan.read_upload(json.dumps(content).encode())

    for words, why in [
        (([[[1.0, True]]],), "less than or equal to 0.01"),  # a probability above 1
        (([[[-1.0, 1]]],), "valid boolean"),
        (([[[float("nan"), True]]],), "(?i)finite|json|valid"),
        (([pair[:1]],), "do not answer the items"),
        (([pair] * 4,), "do not answer the items"),
        (([pair], "b"), "do not answer the items"),
        (([pair], "a", True), "something is missing"),
    ]:
        with pytest.raises(ValueError, match=why):
            read(*words)
    assert len(read([pair] * 2).answers["a"]) == 2 and read([pair] * 3, complete=True).complete


def test_what_cannot_be_served_is_refused(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="named twice"):
        label_bundles([bundles["fp32"], bundles["fp32"]])
    with pytest.raises(BadInput, match=r"needs 300 positions, its context is 256"):
        PagePlan({"fp32": bundles["fp32"]}, BenchOptions(200, 100))
    monkeypatch.setattr(page_server, "WEB", tmp_path)
    with pytest.raises(BadInput, match="make web"):
        PagePlan({}, SIZES)
