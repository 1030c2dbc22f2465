"""The phone page in a real Chromium: what it answers, measures, keeps, and says when it cannot.

EDGEDISP_PICTURES names a folder for screenshots.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from browsers import NODE_MODULES, SLOW, WEB, chromium, needs_chromium, needs_playwright, needs_web, output
from shared_store import SharedStore
from taught_model import ANSWER, CALL, REQUEST, taught_bundle
from tiny_build import write_documents
from tiny_bundle import (
    CONVERSATIONS,
    LINES,
    WITH_BOS,
    Bundles,
    copy_with,
    order,
    recompute,
    with_template,
)

from edgedisp.bench.browser import BrowserPage
from edgedisp.bench.devices import BenchOptions, DeviceTasks
from edgedisp.bench.interleaved_timing import Local
from edgedisp.bench.page_protocol import PagePlan
from edgedisp.bench.page_server import PageServer
from edgedisp.bench.phone import local_address
from edgedisp.commands.devices import time_bundles
from edgedisp.commands.export import export_bundle
from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import silent
from edgedisp.core.results import DeviceResult
from edgedisp.models import load_tokenizer, prompt_ids
from edgedisp.models.tiny_model import CHAT_TEMPLATE

pytestmark = [needs_chromium, needs_web]
TEXTS = ["the cat sat on the mat", "and the dog?"]
CONTEXT, LONGEST = 256, 128  # of the tiny models; an answer has at most half of the context
Answer = tuple[list[int], str]  # tokens and text
Chat = Callable[..., dict[str, Any]]


@contextmanager
def served(
    folders: dict[str, Path], host: str = "127.0.0.1", **options: Any
) -> Iterator[tuple[PageServer, PagePlan]]:
    plan = PagePlan(folders, BenchOptions(**options))

    def fail(line: str) -> None:
        raise AssertionError(line)

    with PageServer(plan.resources, plan.read_upload, fail, (host, 0)) as server:
        yield server, plan


def drive(server: PageServer, scenario: str, **options: Any) -> dict[str, Any]:
    """What the page did in a scenario of phone_page.mjs."""
    words = {
        "playwright": str(NODE_MODULES / "playwright-core"), "chromium": chromium(), "url": server.url,
        "scenario": scenario, "texts": TEXTS, "pictures": os.environ.get("EDGEDISP_PICTURES"), **options,
    }  # fmt: skip
    printed = output(["node", SLOW / "phone_page.mjs", json.dumps(words)], SLOW)
    return dict(json.loads(printed.splitlines()[-1]))


@pytest.fixture
def chat(bundles: Bundles) -> Chat:
    """Runs a scenario with the fp32 bundle."""

    def run(scenario: str, host: str = "127.0.0.1") -> dict[str, Any]:
        with served({"fp32": bundles["fp32"]}, host, prompt=4, generate=4) as (server, _):
            return drive(server, scenario)

    return run


def expected(bundle: Path, messages: list[dict[str, str]]) -> Answer:
    """Greedy tokens and text after a conversation, by onnxruntime over the whole sequence for each token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    tokens = recompute(bundle, ids, LONGEST)
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    length = next((index + 1 for index, token in enumerate(tokens) if token in stops), LONGEST)
    return tokens[:length], tokenizer.decode(tokens[:length], skip_special_tokens=True)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def answer(bundles: Bundles) -> Answer:
    """Tokens and text of the first answer."""
    return expected(bundles["fp32"], [user(TEXTS[0])])


@needs_playwright
def test_chat_gives_the_tokens_of_onnxruntime_and_a_reload_downloads_nothing(
    bundles: Bundles, chat: Chat, answer: Answer
) -> None:
    page, (tokens, text) = chat("chat"), answer
    first, second = page["turns"]
    assert first["tokens"] == tokens and first["text"] == text and text in page["shown"]
    history = [user(TEXTS[0]), {"role": "assistant", "content": text}, user(TEXTS[1])]
    messages = history if second["dropped_turns"] == 0 else history[2:]
    assert second["prompt_tokens"] + LONGEST <= CONTEXT and second["reused_tokens"] > 0
    assert second["tokens"] == expected(bundles["fp32"], messages)[0]
    assert "tokens/s" in page["speed"]
    files = PagePlan({"fp32": bundles["fp32"]}, BenchOptions()).bundles["fp32"].files
    assert sorted(page["first"]) == sorted(f"0/{name}" for name in files)
    assert page["second"] == [] and "all here already" in page["about"]
    assert page["again"]["tokens"] == tokens
    assert page["overflow"] <= 0 and page["small"] == [] and page["complaints"] == []


@needs_playwright
@pytest.mark.parametrize(("width", "dark"), [(400, False), (900, True)])
def test_a_tool_call_is_a_card(store: SharedStore, width: int, dark: bool) -> None:
    with served({"taught": taught_bundle(store)}, prompt=4, generate=4) as (server, _):
        page = drive(server, "call", texts=[REQUEST], width=width, dark=dark)
    assert page["turn"]["text"] == ANSWER and page["turn"]["calls"] == [CALL]
    assert [card.split() for card in page["cards"]] == [
        ["turn_on", "device", "desk", "lamp", "brightness", "70"]
    ]
    assert page["trouble"] == "" and page["overflow"] <= 0 and page["complaints"] == []
    assert "prompts as in training, 38 of 38 ids" in page["about"]


@needs_playwright
def test_another_tokenizer_than_in_training_is_named_by_its_first_token(
    store: SharedStore, tmp_path: Path
) -> None:
    bundle = copy_with(taught_bundle(store), tmp_path / "taught")
    app = json.loads((bundle / "app.json").read_text())
    app["example"]["prompt_ids"][2] += 1
    (bundle / "app.json").write_text(json.dumps(app))
    with served({"taught": bundle}, prompt=4, generate=4) as (server, _):
        page = drive(server, "call", texts=[REQUEST], width=400)
    assert "other ids on this page than in training: token 3 of 38 is" in page["trouble"]
    assert len(page["cards"]) == 1  # it answers all the same


@needs_playwright
def test_an_answer_can_be_stopped_and_a_new_conversation_starts_afresh(chat: Chat, answer: Answer) -> None:
    page, (tokens, _) = chat("stop"), answer
    part = page["stopped"]["tokens"]
    assert part == tokens[: len(part)]
    assert page["first"]["tokens"] == page["again"]["tokens"] == tokens
    assert page["again"]["reused_tokens"] == 0  # the cache was emptied, not only the screen


@needs_playwright
def test_the_benchmark_arrives_and_its_tokens_are_those_of_onnxruntime(bundles: Bundles) -> None:
    options = {"prompt": 6, "generate": 5, "repetitions": 2}
    with served({"fp32": bundles["fp32"], "twin": bundles["twin"]}, **options) as (server, plan):
        page = drive(server, "bench", dark=True)
        uploads = [server.received.get()[0] for _ in range(server.received.qsize())]
    last = uploads[-1]
    assert "The figures are on the computer" in page["sent"] and last.complete and last.open_together
    assert [(row.repetition, row.label) for row in last.repetitions] == plan.order
    prompt = plan.bundles["fp32"].prompt_ids
    for row in last.repetitions:
        assert row.tokens == recompute(bundles[row.label], prompt, 5)
        assert row.heap_bytes is not None and row.heap_bytes >= 1 << 24
    assert last.device.isolated and last.device.simd and last.device.threads == 1
    assert page["overflow"] <= 0 and page["small"] == [] and page["complaints"] == []


@needs_playwright
def test_plain_http_chats_with_one_thread_and_says_what_is_not_verified(chat: Chat, answer: Answer) -> None:
    address = local_address()
    if address.startswith("127."):
        pytest.skip("needs an address of this machine other than localhost")
    page = chat("plain", address)
    assert page["facts"] == [False, False, 1] and "an attacker in your network is not" in page["checked"]
    assert page["turn"]["tokens"] == answer[0]


@needs_playwright
def test_missing_simd_is_an_error_and_a_damaged_file_is_fetched_again(chat: Chat, answer: Answer) -> None:
    page = chat("unable")
    assert "no WebAssembly SIMD" in page["fault"] and not page["main"]
    page = chat("damaged")
    assert "tokenizer.json arrived damaged" in page["turn"]["trouble"]
    assert page["again"]["tokens"] == answer[0]


@needs_playwright
def test_a_template_that_does_not_end_is_an_error_of_the_page(bundles: Bundles, tmp_path: Path) -> None:
    bundle = copy_with(bundles["fp32"], tmp_path / "runaway")
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (bundle / "chat_template.jinja").write_text(loop)
    with served({"runaway": bundle}, prompt=4, generate=4) as (server, _):
        assert "template does not end" in drive(server, "plain")["turn"]["trouble"]


ENCODE = """
import { existsSync, readFileSync } from "node:fs";
import { Conversation } from "./conversation.js";
const { folder, conversations } = JSON.parse(process.argv[2]);
const text = (name) => existsSync(`${folder}/${name}`) && readFileSync(`${folder}/${name}`, "utf-8");
const json = (name) => JSON.parse(text(name));
const files = { tokenizer: json("tokenizer.json"), tokenizerConfig: json("tokenizer_config.json") };
Object.assign(files, { app: {}, genai: {}, generation: {}, model: {} });
Object.assign(files, { template: text("chat_template.jinja") || null });
const conversation = new Conversation({ empty: () => ({}) }, files, 256);
console.log(JSON.stringify(conversations.map((messages) => conversation.encode(messages))));
"""


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [LINES, WITH_BOS, CHAT_TEMPLATE, ""])
def test_the_page_sends_the_ids_of_chat(
    template: str, adds_bos: bool, bundles: Bundles, tmp_path: Path
) -> None:
    shutil.copytree(WEB, tmp_path / "web", ignore=shutil.ignore_patterns("onnxruntime-web"))
    (tmp_path / "web" / "package.json").write_text('{"type": "module"}')
    (tmp_path / "web" / "encode.mjs").write_text(ENCODE)
    bundle = with_template(bundles["fp32"], tmp_path / "bundle", template, adds_bos)
    tokenizer = load_tokenizer(bundle)
    given = json.dumps({"folder": str(bundle), "conversations": CONVERSATIONS})
    ids = json.loads(output(["node", "encode.mjs", given], tmp_path / "web"))
    assert ids == [prompt_ids(tokenizer, messages) for messages in CONVERSATIONS]


def in_browser(bundles: Bundles, **options: Any) -> DeviceResult:
    sizes = {"prompt": 6, "generate": 5, "repetitions": 2, **options}
    return BrowserPage(bundles, BenchOptions(**sizes)).measure(silent)


def test_the_browser_gives_the_rows_of_the_local_device(bundles: Bundles) -> None:
    pair = {"baseline/x": bundles["fp32"], "twin/x": bundles["twin"]}
    result = in_browser(pair, threads=1)
    local = Local(pair, BenchOptions(6, 5, 2, threads=1)).measure()
    assert order(result) == order(local)
    for row, local_row in zip(result.rows, local.rows):
        for name in ("label", "weights_bytes", "bytes_read_per_token", "repetitions"):
            assert getattr(row, name) == getattr(local_row, name), name
    tokens = [turn["tokens"] for turn in local.repetitions]
    assert [turn["tokens"] for turn in result.repetitions] == tokens
    assert result.pairs[0]["same_graph"] and result.machine["browser"]["isolated"]
    # bundles that do not fit together are loaded for each turn
    result = in_browser(pair, memory_bytes=1)
    assert result.options["groups"] == [[label] for label in pair] and order(result) == order(local)
    assert [turn["tokens"] for turn in result.repetitions] == tokens


def test_the_browser_bundle_of_an_export_is_timed_and_scores_as_this_machine(
    tiny_folder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEDISP_CACHE", str(tmp_path / "cache"))
    export_bundle(tiny_folder["llama"], "browser", tmp_path / "web", silent)
    assert not (tmp_path / "web" / "model.onnx").exists()
    text = write_documents(tmp_path / "text.jsonl", 40, seed=5)
    tasks = DeviceTasks(("heldout_cloze", "heldout_continuation"), items=20, text=text)
    options = BenchOptions(prompt=6, generate=5, repetitions=2, threads=2, tasks=tasks)
    (device,) = time_bundles([tmp_path / "web"], ["browser"], options, silent)["devices"]
    files = (tmp_path / "web" / "onnx").iterdir()
    assert device.rows[0].weights_bytes == sum(file.stat().st_size for file in files)
    assert device.rows[0].threads == 2
    assert device.repetitions[0]["tokens"] == device.repetitions[1]["tokens"]
    for record in device.scores:
        assert record["answered"] == 20 and record["agreement"]["share"] == 1
        assert record["logprob"]["max"] < 1e-3


def test_a_damaged_graph_is_an_error_of_the_page(bundles: Bundles, tmp_path: Path) -> None:
    weights = copy_with(bundles["fp32"], tmp_path / "broken") / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BuildFailed, match="the page could not go on"):
        in_browser({"broken": tmp_path / "broken"})


def test_the_browser_of_a_killed_program_ends(bundles: Bundles, tmp_path: Path) -> None:
    script = (
        "import tempfile; from pathlib import Path; from edgedisp.bench.browser import BrowserPage; "
        "from edgedisp.bench.devices import BenchOptions; "
        f"tempfile.tempdir = {str(tmp_path)!r}; bundles = {{'fp32': Path({str(bundles['fp32'])!r})}}; "
        "BrowserPage(bundles, BenchOptions(prompt=100, generate=100, repetitions=1000)).measure("
        "lambda *step: print(*step, flush=True))"
    )

    def browsers() -> list[int]:
        folder = f"--user-data-dir={tmp_path}"
        processes = psutil.process_iter(["cmdline"])
        return [p.pid for p in processes if any(folder in word for word in p.info["cmdline"] or ())]

    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("repetition 2" in line for line in process.stdout) and browsers()
        process.kill()
    deadline = time.monotonic() + 60
    while browsers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not browsers()
