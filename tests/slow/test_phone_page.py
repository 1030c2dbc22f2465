"""The phone page in a real Chromium: what it answers, measures, keeps, and says when it cannot.

The browser is driven by playwright-core (`make runtimes`), the page needs its libraries (`make web`). Where
something is missing the tests are skipped and say so. EDGEDISP_PICTURES names a folder for screenshots.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_bundle import order, recompute

from edgedisp.bench.browser import BrowserPage, find_browser
from edgedisp.bench.bundles import read_bundle
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.interleaved_timing import Local
from edgedisp.bench.page_protocol import Figures, PagePlan, Upload
from edgedisp.bench.page_server import PageServer, page_resources
from edgedisp.bench.phone import local_address
from edgedisp.bench.system import runner
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import silent
from edgedisp.core.results import DeviceResult

TOP = Path(__file__).resolve().parents[2]
WEB = TOP / "export" / "web"
PLAYWRIGHT = TOP / ".runtimes" / "node" / "node_modules" / "playwright-core"
TEXTS = ["the cat sat on the mat", "and the dog?"]
CONTEXT, LONGEST = 256, 128  # of the tiny models; an answer has at most half of the context
SECONDS = 400  # many times what an idle machine takes


def chromium() -> str | None:
    with contextlib.suppress(BadInput):
        return find_browser()
    return None


pytestmark = [
    pytest.mark.skipif(chromium() is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(not (WEB / "vendor").is_dir(), reason="needs the page's libraries: make web"),
]
driven = pytest.mark.skipif(
    shutil.which("node") is None or not PLAYWRIGHT.is_dir(),
    reason="needs node and playwright-core: make runtimes",
)


@contextmanager
def served(
    folders: dict[str, Path], host: str = "127.0.0.1", **options: Any
) -> Iterator[tuple[PageServer, PagePlan]]:
    bundles = tuple(read_bundle(label, folder) for label, folder in folders.items())
    plan = PagePlan(bundles, BenchOptions(**options))
    resources = {**page_resources(WEB), **plan.resources()}

    def complain(line: str) -> None:
        raise AssertionError(line)

    with PageServer(resources, plan.read_upload, complain, host) as server:
        yield server, plan


def drive(server: PageServer, scenario: str, texts: Sequence[str] = TEXTS, **given: Any) -> dict[str, Any]:
    """What the page did in a scenario of phone_page.mjs; it must not have complained."""
    told = {
        "playwright": str(PLAYWRIGHT), "chromium": chromium(), "url": server.address, "scenario": scenario,
        "texts": list(texts), "pictures": os.environ.get("EDGEDISP_PICTURES"), **given,
    }  # fmt: skip
    done = subprocess.run(
        ["node", str(TOP / "tests" / "slow" / "phone_page.mjs"), json.dumps(told)],
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def received(server: PageServer) -> list[Upload]:
    found = []
    while not server.received.empty():
        found.append(server.received.get()[0])
    return found


def answered(bundle: Path, messages: list[dict[str, str]]) -> tuple[list[int], str]:
    """Greedy tokens and text after a conversation, by onnxruntime over the whole sequence for each token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    tokens = recompute(bundle, ids, LONGEST)
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    ends = [place for place, token in enumerate(tokens) if token in stops]
    tokens = tokens[: ends[0] + 1] if ends else tokens
    return tokens, tokenizer.decode(tokens, skip_special_tokens=True)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@driven
def test_chat_gives_the_tokens_of_onnxruntime_and_a_reload_downloads_nothing(
    bundles: dict[str, Path],
) -> None:
    with served({"fp32": bundles["fp32"]}, prompt=4, generate=4) as (server, plan):
        found = drive(server, "chat")
    tokens, text = answered(bundles["fp32"], [user(TEXTS[0])])
    first, second = found["turns"]
    assert first["tokens"] == tokens and first["text"] == text
    assert text in found["shown"]
    history = [user(TEXTS[0]), {"role": "assistant", "content": text}, user(TEXTS[1])]
    kept = history if second["dropped_turns"] == 0 else history[2:]
    assert second["prompt_tokens"] + LONGEST <= CONTEXT
    assert second["reused_tokens"] > 0
    assert second["tokens"] == answered(bundles["fp32"], kept)[0]
    assert "tokens/s" in found["speed"]
    assert sorted(found["first"]) == sorted(f"0/{name}" for name in plan.bundles[0].files)
    assert found["second"] == [] and "all here already" in found["about"]
    assert found["again"]["tokens"] == tokens
    assert found["overflow"] <= 0 and found["small"] == []
    assert found["complaints"] == []


@driven
def test_an_answer_can_be_stopped_and_a_new_conversation_starts_afresh(bundles: dict[str, Path]) -> None:
    with served({"fp32": bundles["fp32"]}, prompt=4, generate=4) as (server, _):
        found = drive(server, "stop")
    tokens = answered(bundles["fp32"], [user(TEXTS[0])])[0]
    stopped = found["stopped"]
    assert stopped["reason"] in ("stopped", "length", "end")  # the model is tiny: it may be done by then
    assert stopped["tokens"] == tokens[: len(stopped["tokens"])]
    assert found["first"]["tokens"] == found["again"]["tokens"] == tokens
    assert found["again"]["reused_tokens"] == 0  # the cache was emptied, not only the screen


@driven
def test_the_benchmark_arrives_and_its_tokens_are_those_of_onnxruntime(bundles: dict[str, Path]) -> None:
    options = {"prompt": 6, "generate": 5, "repetitions": 2}
    with served({"fp32": bundles["fp32"], "twin": bundles["twin"]}, **options) as (server, plan):
        found = drive(server, "bench", dark=True)
        last = [upload for upload in received(server) if isinstance(upload, Figures)][-1]
    assert "The figures are on the computer" in found["sent"]
    assert last.complete and last.open_together
    assert [(one.repetition, one.label) for one in last.repetitions] == plan.order()
    for one in last.repetitions:
        prompt = runner().prompt_ids(plan.bundles[0].vocab_size, 6, 0)[0].tolist()
        assert one.tokens == recompute(bundles[one.label], prompt, 5)
        assert one.heap_bytes is not None and one.heap_bytes >= 1 << 24
    assert last.device.isolated and last.device.simd and last.device.threads == 1
    assert found["overflow"] <= 0 and found["small"] == [] and found["complaints"] == []


@driven
def test_plain_http_chats_with_one_thread_and_says_what_is_not_verified(bundles: dict[str, Path]) -> None:
    address = local_address()
    if address.startswith("127."):
        pytest.skip("needs an address of this machine other than localhost")
    with served({"fp32": bundles["fp32"]}, address, prompt=4, generate=4) as (server, _):
        found = drive(server, "plain")
    assert found["facts"] == [False, False, 1]
    assert "an attacker in your network is not" in found["checked"]
    assert found["turn"]["tokens"] == answered(bundles["fp32"], [user(TEXTS[0])])[0]


@driven
def test_a_browser_without_simd_is_told_so(bundles: dict[str, Path]) -> None:
    with served({"fp32": bundles["fp32"]}, prompt=4, generate=4) as (server, _):
        found = drive(server, "unable")
    assert "no WebAssembly SIMD" in found["fault"] and not found["main"]


@driven
def test_a_file_that_arrives_damaged_is_not_used_and_fetched_again(bundles: dict[str, Path]) -> None:
    with served({"fp32": bundles["fp32"]}, prompt=4, generate=4) as (server, _):
        found = drive(server, "damaged")
    assert "tokenizer.json arrived damaged" in found["turn"]["trouble"]
    assert found["again"]["tokens"] == answered(bundles["fp32"], [user(TEXTS[0])])[0]


def in_browser(bundles: dict[str, Path], **options: Any) -> DeviceResult:
    return BrowserPage(bundles, BenchOptions(**options)).measure(silent)


def test_the_browser_gives_the_rows_of_the_local_device(bundles: dict[str, Path]) -> None:
    pair = {"fp32": bundles["fp32"], "twin": bundles["twin"]}
    options: dict[str, Any] = {"prompt": 6, "generate": 5, "repetitions": 3, "threads": 1}
    options["pairs"] = (("fp32", "twin"),)
    found, here = in_browser(pair, **options), Local(pair, BenchOptions(**options)).measure()
    assert order(found) == order(here)
    for mine, other in zip(found.rows, here.rows):
        for name in ("label", "weights_bytes", "weight_bits", "bytes_read_per_token", "repetitions"):
            assert getattr(mine, name) == getattr(other, name), name
    assert [turn["tokens"] for turn in found.repetitions] == [turn["tokens"] for turn in here.repetitions]
    assert found.pairs[0]["same_graph"] and found.machine["browser"]["isolated"]


def test_bundles_that_do_not_fit_together_are_loaded_for_each_turn(bundles: dict[str, Path]) -> None:
    pair = {"fp32": bundles["fp32"], "twin": bundles["twin"]}
    found = in_browser(pair, prompt=6, generate=5, repetitions=2, memory_bytes=1)
    assert found.options["groups"] == [["fp32"], ["twin"]]
    assert order(found) == ["fp32", "twin", "twin", "fp32"]
    assert found.repetitions[0]["tokens"] == found.repetitions[3]["tokens"]


def test_the_browser_bundle_of_an_export_is_timed(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    from edgedisp.commands.export import export_bundle

    export_bundle(tiny_folder["llama"], "browser", tmp_path / "bundle", silent)
    found = in_browser({"web": tmp_path / "bundle"}, prompt=6, generate=5, repetitions=2, threads=2)
    assert found.rows[0].weights_bytes == sum(
        file.stat().st_size for file in (tmp_path / "bundle" / "onnx").iterdir()
    )
    assert found.rows[0].threads == 2
    assert found.repetitions[0]["tokens"] == found.repetitions[1]["tokens"]


def test_a_graph_that_does_not_open_ends_with_what_the_page_says(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bundles["fp32"], broken)
    weights = broken / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BuildFailed, match="the page could not go on"):
        in_browser({"broken": broken}, prompt=4, generate=4, repetitions=1)


def test_a_browser_whose_program_is_killed_ends_by_itself(bundles: dict[str, Path], tmp_path: Path) -> None:
    script = (
        "import tempfile; from pathlib import Path; from edgedisp.bench.browser import BrowserPage; "
        "from edgedisp.bench.devices import BenchOptions; "
        f"tempfile.tempdir = {str(tmp_path)!r}; bundles = {{'fp32': Path({str(bundles['fp32'])!r})}}; "
        "BrowserPage(bundles, BenchOptions(prompt=100, generate=100, repetitions=1000)).measure("
        "lambda *step: print(*step, flush=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "repetition 2" in line:
            break
    assert of_profiles_in(tmp_path)
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(600):
        if not of_profiles_in(tmp_path):
            break
        time.sleep(0.1)
    assert not of_profiles_in(tmp_path)


def of_profiles_in(folder: Path) -> list[int]:
    """Processes that have a file or folder below `folder` on their command line."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(f"--user-data-dir={folder}" in word for word in process.cmdline()):
                found.append(process.pid)
    return found
