"""The phone page's server, spoken to over real connections."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from tiny_bundle import RUNNER, tiny_bundles

from edgedisp.bench import page_server
from edgedisp.bench.page_bundle import prompt_ids, read_bundle
from edgedisp.bench.page_plan import PagePlan, measured
from edgedisp.bench.page_resources import page_resources
from edgedisp.bench.page_server import MOST_UPLOAD_BYTES, PageServer
from edgedisp.bench.phone import Results, render
from edgedisp.bench.spread import percentile
from edgedisp.bench.summary import labelled
from edgedisp.bench.uploads import UPLOAD
from edgedisp.core.errors import BadInput

RUN = "0123456789abcdef"
PROMPT, GENERATE, REPETITIONS = 6, 4, 3
DEVICE = {
    "user_agent": "Test/1.0", "model": None, "platform": "Linux", "cores": 8, "device_memory_gb": 8.0,
    "simd": True, "isolated": False, "secure": False, "threads": 1, "clock_resolution_ms": 0.1,
    "runtime": "onnxruntime-web 1.30.0", "width": 360, "height": 640,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_bundles(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def plan(bundles: dict[str, Path]) -> PagePlan:
    served = tuple(read_bundle(label, bundles[label]) for label in ("fp32", "twin"))
    return PagePlan(served, PROMPT, GENERATE, REPETITIONS)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of our own, so that this file needs no vendored libraries."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "vendor" / "onnxruntime-web").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html>hello")
    (folder / "app.js").write_text("1")
    (folder / "secret.txt").write_text("not of the page")
    (folder / "vendor" / "onnxruntime-web" / "a.wasm").write_bytes(b"\0asm")
    return folder


class Site:
    """A running server with what it noted."""

    def __init__(self, server: PageServer, log: list[str]) -> None:
        self.server, self.log = server, log
        self.token = server.token

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request with `path` sent as it stands: nothing is normalised on the way."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def get(self, address: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        return self.ask("GET", f"/{self.token}/{address}")

    def post(self, content: Any) -> int:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.ask("POST", f"/{self.token}/report", body, Content_Type="application/json")[0]


@pytest.fixture
def site(plan: PagePlan, web: Path) -> Iterator[Site]:
    log: list[str] = []
    resources = {**page_resources(web), **plan.resources()}
    with PageServer(resources, host="127.0.0.1", port=0, accepts=plan.accepts, note=log.append) as server:
        yield Site(server, log)


def figures(plan: PagePlan, turns: int | None = None, **changes: Any) -> dict[str, Any]:
    """Figures as a page sends them after `turns` turns: turn t takes 100 + t ms, then 10 + t ms a token."""
    order = plan.order()[:turns]
    timed = [
        {
            "label": label, "repetition": repetition, "turn": turn, "ttft_ms": 100.0 + turn,
            "token_ms": [10.0 + turn] * (GENERATE - 1), "tokens": [1] * GENERATE, "wall_s": 1.0,
            "heap_bytes": 1 << 26, "hidden": False,
        }
        for turn, (repetition, label) in enumerate(order)
    ]  # fmt: skip
    loaded = [
        {
            "label": bundle.label, "load_s": [0.5, 0.7, 0.6], "runtime_load_s": 0.2, "download_s": None,
            "layers": 2, "vocab_size": bundle.vocab_size, "kv_cache_bytes_per_position": 512,
        }
        for bundle in plan.bundles
    ]  # fmt: skip
    return {
        "kind": "figures", "run": RUN, "complete": turns is None, "held_open": True, "device": DEVICE,
        "loaded": loaded, "repetitions": timed, **changes,
    }  # fmt: skip


def test_the_page_its_plan_and_every_file_of_a_bundle_come_whole(site: Site, plan: PagePlan) -> None:
    assert site.get("")[2] == site.get("index.html")[2] == b"<!doctype html>hello"
    told = json.loads(site.get("plan.json")[2])
    for shown, bundle in zip(told["bundles"], plan.bundles):
        assert {"model.onnx", "model.onnx.data", "tokenizer.json", "genai_config.json"} <= set(shown["files"])
        for name, file in shown["files"].items():
            status, headers, body = site.get(file["url"])
            assert status == 200 and body == (bundle.folder / name).read_bytes()
            assert int(headers["Content-Length"]) == file["size_bytes"] == len(body)


def test_without_the_token_all_is_404(site: Site) -> None:
    wrong = site.token[:-1] + ("A" if site.token[-1] != "A" else "B")
    paths = ["/", "/index.html", f"/{wrong}/", f"/{site.token}", f"/{site.token[:-1]}/", "/plan.json", "//"]
    answers = [site.ask("GET", path) for path in paths]
    assert {status for status, _, _ in answers} == {404}
    assert all(body == b"" for _, _, body in answers)
    assert site.ask("POST", f"/{wrong}/report", b"{}", Content_Type="application/json")[0] == 404


def test_the_token_is_long_and_another_each_time(plan: PagePlan) -> None:
    def token() -> str:
        with PageServer({}, host="127.0.0.1", port=0, accepts=plan.accepts, note=print) as server:
            return server.token

    first, second = token(), token()
    assert first != second and len(first) >= 22


@pytest.mark.parametrize(
    "path",
    [
        "../secret", "bundle/0/../../../etc/passwd", "bundle/0/%2e%2e/%2e%2e/etc/passwd",
        "bundle/0/..%2f..%2fx", "bundle/0/..\\..\\x", "bundle/0//etc/passwd", "/etc/passwd",
        "%2fetc%2fpasswd", "bundle/0/record.json",
        "bundle/0/", "bundle/9/model.onnx", "bundle/0/model.onnx%00.json", "secret.txt", "./index.html",
        "vendor/../index.html", "bundle/0/%6dodel.onnx", "bundle/0/%252e%252e/x",
    ],
)  # fmt: skip
def test_nothing_but_what_was_listed_can_be_had(site: Site, path: str) -> None:
    status, _, body = site.get(path)
    assert (status, body) == (404, b"")


def test_a_link_that_leads_out_of_the_bundle_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for file in bundles["fp32"].iterdir():
        if file.name != "tokenizer.json":
            (bundle / file.name).write_bytes(file.read_bytes())
    (bundle / "tokenizer.json").symlink_to(outside)
    with pytest.raises(BadInput, match=r"tokenizer\.json: lies outside the bundle"):
        read_bundle("linked", bundle)


def test_a_file_that_is_changed_or_linked_later_is_not_given(
    bundles: dict[str, Path], web: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for file in bundles["fp32"].iterdir():
        if file.is_file():
            (bundle / file.name).write_bytes(file.read_bytes())
    later = PagePlan((read_bundle("later", bundle),), PROMPT, GENERATE)
    log: list[str] = []
    resources = later.resources()
    with PageServer(resources, host="127.0.0.1", port=0, accepts=later.accepts, note=log.append) as server:
        site = Site(server, log)
        (bundle / "genai_config.json").write_text("{}")
        assert site.get("bundle/0/genai_config.json")[0] == 500
        (bundle / "tokenizer.json").unlink()
        (bundle / "tokenizer.json").symlink_to("/etc/passwd")
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            site.get("bundle/0/tokenizer.json")
    assert "has changed" in log[0]


def test_every_answer_isolates_the_page_and_keeps_others_out(site: Site) -> None:
    for status, headers, _ in (site.get(""), site.get("plan.json"), site.get("nothing")):
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin", status
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "'unsafe" not in policy and "*" not in policy
        assert "Python" not in headers["Server"]


def test_the_page_is_asked_for_again_but_not_sent_again(site: Site) -> None:
    tag = site.get("app.js")[1]["ETag"]
    status, _, body = site.ask("GET", f"/{site.token}/app.js", If_None_Match=tag)
    assert (status, body) == (304, b"")
    assert site.get("plan.json")[1]["Cache-Control"] == "no-store"


def test_head_gives_sizes_without_bodies_and_other_methods_are_refused(site: Site) -> None:
    status, headers, body = site.ask("HEAD", f"/{site.token}/app.js")
    assert (status, headers["Content-Length"], body) == (200, "1", b"")
    assert {site.ask(method, f"/{site.token}/app.js")[0] for method in ("PUT", "DELETE", "OPTIONS")} == {501}


def test_figures_that_fit_are_received(site: Site, plan: PagePlan) -> None:
    assert site.post(figures(plan)) == 204
    assert site.server.received.get(timeout=5).upload.run == RUN
    assert site.log == []


def broken(plan: PagePlan) -> dict[str, Any]:
    """Uploads that must be refused, by what is wrong with them."""
    good = figures(plan)
    first, *rest = good["repetitions"]

    def turn(**changes: Any) -> dict[str, Any]:
        return {**good, "repetitions": [{**first, **changes}, *rest]}

    return {
        "no JSON": b"{",
        "not UTF-8": b"\xff\xfe",
        "an array": [],
        "nested without end": b"[" * 100_000,
        "another kind": {"kind": "shell", "run": RUN},
        "a key too many": {**good, "extra": 1},
        "no run": {**good, "run": "../../x"},
        "a text for a number": turn(ttft_ms="100"),
        "not finite": json.dumps(turn(ttft_ms=float("nan"))).encode(),
        "negative": turn(token_ms=[-1.0] * (GENERATE - 1)),
        "no time at all": turn(token_ms=[0.0] * (GENERATE - 1)),
        "fewer tokens": turn(tokens=[1]),
        "fewer times": turn(token_ms=[1.0]),
        "another bundle": turn(label="other"),
        "another order": turn(repetition=2),
        "a missing turn": {**good, "repetitions": rest},
        "complete too early": {**good, "repetitions": good["repetitions"][:2]},
        "a bundle twice": {**good, "loaded": [good["loaded"][0]] * 2},
        "a long text": {**good, "device": {**DEVICE, "user_agent": "x" * 501}},
        "a huge number": {**good, "device": {**DEVICE, "cores": 10**30}},
    }


def test_nonsense_is_refused_with_one_line_and_nothing_is_kept(site: Site, plan: PagePlan) -> None:
    cases = broken(plan)
    for count, (name, content) in enumerate(cases.items(), 1):
        assert site.post(content) == 400, name
        assert len(site.log) == count and "\n" not in site.log[-1], (name, site.log[-1])
    assert site.server.received.empty()
    assert site.post(figures(plan)) == 204  # and it goes on


def test_uploads_have_a_size_a_length_and_a_type(site: Site, plan: PagePlan) -> None:
    path, kind = f"/{site.token}/report", {"Content_Type": "application/json"}
    assert site.ask("POST", path, b"", Content_Length=str(MOST_UPLOAD_BYTES + 1), **kind)[0] == 413
    assert site.ask("POST", path, b"", Content_Length="9" * 40, **kind)[0] == 413
    assert site.ask("POST", path, b"", Content_Length="-1", **kind)[0] == 411
    body = json.dumps(figures(plan)).encode()
    assert site.ask("POST", path, body, Content_Type="text/plain")[0] == 415
    assert site.ask("POST", f"/{site.token}/plan.json", body, **kind)[0] == 404
    assert site.server.received.empty()


def test_what_a_phone_says_cannot_move_the_terminal(site: Site, plan: PagePlan) -> None:
    assert site.post({"kind": "trouble", "run": RUN, "message": "a\x1b[2J\nb"}) == 204
    lines: list[str] = []
    results = Results(plan, lines.append, lambda result: None)
    results.take(site.server.received.get(timeout=5))
    assert lines == ["127.0.0.1: could not go on: a [2J b"]


def test_a_crowd_is_turned_away_and_the_server_goes_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = [
        socket.create_connection(("127.0.0.1", site.server.port)) for _ in range(page_server.MOST_CONNECTIONS)
    ]
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        for _ in range(50):  # the last of the crowd may still be on its way in
            site.get("app.js")
    for one in crowd:
        one.close()
    for _ in range(200):
        try:
            assert site.get("app.js")[0] == 200
            break
        except (http.client.HTTPException, ConnectionError):
            continue
    else:
        pytest.fail("no place became free")


def test_a_port_in_use_and_an_address_of_others_are_named(plan: PagePlan) -> None:
    def start(host: str, port: int) -> PageServer:
        return PageServer({}, host=host, port=port, accepts=plan.accepts, note=print)

    with start("127.0.0.1", 0) as first, pytest.raises(BadInput, match=rf"--port {first.port}: is in use"):
        start("127.0.0.1", first.port)
    with pytest.raises(BadInput, match=r"--host 192\.0\.2\.1: cannot be listened on"):
        start("192.0.2.1", 0)


def test_https_has_a_certificate_of_its_own(plan: PagePlan, web: Path) -> None:
    pytest.importorskip("cryptography", reason='needs the extra [phone]: pip install "edgedisp[phone]"')
    from edgedisp.bench.certificate import self_signed

    tls, fingerprint = self_signed("127.0.0.1")
    log: list[str] = []
    resources = page_resources(web)
    with PageServer(
        resources, host="127.0.0.1", port=0, accepts=plan.accepts, note=log.append, tls=tls
    ) as server:
        assert server.address.startswith("https://127.0.0.1:")
        silent = socket.create_connection(("127.0.0.1", server.port))  # no handshake: must not block others
        plain = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        with pytest.raises((http.client.HTTPException, OSError)):
            plain.request("GET", urlsplit(server.address).path)
            plain.getresponse()
        # The certificate is trusted if it is given, for this address alone.
        pem = ssl.get_server_certificate(("127.0.0.1", server.port))
        context = ssl.create_default_context(cadata=pem)
        asked = http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=10)
        asked.request("GET", urlsplit(server.address).path)
        assert asked.getresponse().read() == b"<!doctype html>hello"
        der = ssl.PEM_cert_to_DER_cert(pem)
        import hashlib

        assert hashlib.sha256(der).hexdigest().upper() == fingerprint.replace(":", "")
        silent.close()
    assert log == []


def test_the_prompt_is_the_runners(plan: PagePlan) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("edgedisp_runner", RUNNER)
    assert spec is not None and spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    for vocabulary, count, seed in ((160, 128, 0), (49152, 7, 3)):
        assert prompt_ids(vocabulary, count, seed) == runner.prompt_ids(vocabulary, count, seed)[0].tolist()


def test_rows_follow_from_the_times_that_were_sent(plan: PagePlan) -> None:
    upload = UPLOAD.validate_json(json.dumps(figures(plan)))
    found = measured(plan, upload, device="phone", pairs=[("fp32", "twin")])
    assert found["order"] == ["fp32", "twin", "twin", "fp32", "fp32", "twin"]
    row, _ = found["rows"]
    first = [100.0, 103.0, 104.0]  # turns 0, 3, 4
    assert row["ttft_ms"] == 103.0
    assert row["prefill_tokens_per_s"] == pytest.approx(np.median([PROMPT / t * 1000 for t in first]))
    assert row["decode_tokens_per_s"] == pytest.approx(1000 / 13.0)
    pooled = [10.0] * 3 + [13.0] * 3 + [14.0] * 3
    assert row["token_ms_p90"] == pytest.approx(percentile(pooled, 0.9))
    assert row["load_s"] == 0.6 and row["peak_memory_bytes"] == 1 << 26
    assert row["weights_bytes"] == sum(f.stat().st_size for f in plan.bundles[0].folder.glob("model.onnx*"))
    assert found["pairs"][0]["same_graph"]["same"]
    assert json.loads(json.dumps(found, allow_nan=False))["machine"]["browser"]["cores"] == 8
    assert "fp32" in render(found) and "Test/1.0" in render(found)


def test_a_phone_lost_in_the_middle_leaves_what_it_had(plan: PagePlan) -> None:
    upload = UPLOAD.validate_json(json.dumps(figures(plan, turns=1)))
    found = measured(plan, upload, device="phone")
    assert not found["complete"] and [row["label"] for row in found["rows"]] == ["fp32"]
    assert "NOT COMPLETE" in render(found)


def test_time_in_the_background_is_told(plan: PagePlan) -> None:
    sent = figures(plan)
    sent["repetitions"][0]["hidden"] = True
    found = measured(plan, UPLOAD.validate_json(json.dumps(sent)), device="phone")
    assert "the page was in the background during 1 repetitions" in found["rows"][0]["warnings"]


def test_a_context_too_short_is_told_before_anything_is_served(bundles: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match=r"needs 300 positions, its context is 256"):
        PagePlan((read_bundle("fp32", bundles["fp32"]),), 200, 100)


def test_the_same_bundle_twice_and_a_folder_without_graph_are_refused(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="named twice"):
        labelled([bundles["fp32"], bundles["fp32"]])
    with pytest.raises(BadInput, match=r"holds no model\.onnx"):
        read_bundle("empty", tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        read_bundle("none", tmp_path / "none")


def test_a_page_without_its_libraries_says_how_to_get_them(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("")
    with pytest.raises(BadInput, match="make web"):
        page_resources(tmp_path)
