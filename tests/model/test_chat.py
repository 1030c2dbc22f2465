"""Chat: answers are the model's greedy tokens, the conversation stays in its context, errors are clear."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graph_twins import SPECIALS
from hypothesis import given
from hypothesis import strategies as st
from shared_store import SharedStore
from taught_model import ANSWER, CALL, REQUEST, SYSTEM, taught_bundle
from tiny_bundle import CONVERSATIONS, LINES, WITH_BOS, copy_with, recompute, with_template

from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.phone import PhoneOptions
from edgedisp.commands.chat import ChatOptions, Conversation, fit, tool_calls
from edgedisp.commands.devices import measure_on_phones, time_bundles
from edgedisp.commands.lm_eval import OnnxHarnessModel
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import silent
from edgedisp.models import chat_template, prompt_ids


class Talk:
    """A conversation with all that it wrote and noted."""

    def __init__(self, bundle: Path, *lines: str, prompt: str | None = None, **options: Any) -> None:
        self.pieces: list[str] = []
        self.notes: list[str] = []
        self.chat = Conversation(
            bundle, ChatOptions(threads=1, **options), self.pieces.append, self.notes.append
        )
        if prompt is not None:
            self.chat.answer(prompt)
        self.chat.converse(lines)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def tokenizer(bundle: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundle)


def turn(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def test_the_answer_is_the_models_greedy_continuation_of_the_template(bundles: dict[str, Path]) -> None:
    talk = Talk(bundles["fp32"], prompt="the cat", system="be a dog", max_new_tokens=12)
    tok = tokenizer(bundles["fp32"])
    messages = turn(("system", "be a dog"), ("user", "the cat"))
    ids = tok.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    expected = recompute(bundles["fp32"], ids, 12)
    assert len(set(expected)) > 3
    assert talk.text == tok.decode(expected) + "\n"
    assert len(talk.pieces) == 13  # streamed: a piece for each token, and the line end
    assert re.fullmatch(r"12 tokens, the first after \d+ ms, then [\d.]+ tokens/s", talk.notes[-1])


class Reads:
    """onnxruntime-genai's generator, and how many tokens it was given each time."""

    def __init__(self, generator: Any) -> None:
        self.generator, self.sizes = generator, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def append_tokens(self, ids: list[int]) -> None:
        self.sizes.append(len(ids))
        self.generator.append_tokens(ids)


def test_keeping_the_cache_between_turns_changes_no_token(bundles: dict[str, Path]) -> None:
    lines = ["the cat", "on the mat", "and the dog"]
    talk = Talk(bundles["fp32"], max_new_tokens=8)
    talk.chat.generator = reads = Reads(talk.chat.generator)
    talk.chat.converse(lines)
    sizes = iter(reads.sizes)
    tok = tokenizer(bundles["fp32"])
    history: list[dict[str, str]] = []
    for line, answer in zip(lines, "".join(talk.pieces).split("\n")[:-1], strict=True):
        history += turn(("user", line))
        ids = tok.apply_chat_template(history, add_generation_prompt=True)["input_ids"]
        assert answer == tok.decode(recompute(bundles["fp32"], ids, 8))
        assert (next(sizes) < len(ids)) == (len(history) > 1)
        history += turn(("assistant", answer))


def test_generation_stops_at_the_end_token_and_does_not_show_it(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    tok = tokenizer(bundles["fp32"])
    ids = tok.apply_chat_template(turn(("user", "the cat")), add_generation_prompt=True)["input_ids"]
    expected = recompute(bundles["fp32"], ids, 12)
    stop = expected[5]
    first = expected.index(stop)
    bundle = copy_with(bundles["fp32"], tmp_path / "b", model__eos_token_id=stop)
    talk = Talk(bundle, prompt="the cat", max_new_tokens=12)
    assert talk.text == tok.decode(expected[:first]) + "\n"
    assert talk.notes[-1].startswith(f"{first + 1} token")


def test_a_tool_call_is_shown_as_one_and_stays_readable_for_programs(store: SharedStore) -> None:
    bundle = taught_bundle(store)
    talk = Talk(bundle, prompt=REQUEST, system=SYSTEM)
    assert talk.pieces == ['turn_on(device="desk lamp", brightness=70)', "\n"]
    assert talk.chat.messages[-1]["content"] == ANSWER
    printed = Talk(bundle, prompt=REQUEST, system=SYSTEM, as_json=True).text
    assert json.loads(printed) == {"text": ANSWER, "tool_calls": [CALL]}


OTHER = {"name": "get_weather", "arguments": {}}


@pytest.mark.parametrize(("text", "calls"), [
    (f"[{ANSWER}, {json.dumps(OTHER)}]", [CALL, OTHER]),
    (f"<think>\n\n</think>\n\n<tool_call>\n{ANSWER}\n</tool_call>", [CALL]),
    ('{"name": "get_weather", "parameters": {}}', [OTHER]),
    (f"Done: {ANSWER}", []),
    ('{"name": "turn_on", "arguments": {"device"', []),
    ("[" * 100_000, []),
])  # fmt: skip
def test_tool_calls_are_read_from_an_answer_of_nothing_else(text: str, calls: list[Any]) -> None:
    assert tool_calls(text) == calls


@pytest.mark.parametrize("index", [0, 4])
def test_ctrl_c_ends_an_answer_and_the_conversation_goes_on(bundles: dict[str, Path], index: int) -> None:
    pieces: list[str] = []
    notes: list[str] = []

    def write(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == index + 1:
            raise KeyboardInterrupt

    options = ChatOptions(threads=1, max_new_tokens=8, interruptible=True)
    chat = Conversation(bundles["fp32"], options, write, notes.append)
    chat.converse(["the cat", "the dog"])
    assert len(chat.messages) == 4
    assert notes[0].startswith(f"stopped: {index + 1} token")
    # The second answer is what the model says after the first as far as it came.
    first = "".join(pieces[: index + 1])
    history = turn(("user", "the cat"), ("assistant", first), ("user", "the dog"))
    tok = tokenizer(bundles["fp32"])
    ids = tok.apply_chat_template(history, add_generation_prompt=True)["input_ids"]
    assert "".join(pieces[index + 2 :]) == tok.decode(recompute(bundles["fp32"], ids, 8)) + "\n"
    pieces.clear()
    with pytest.raises(KeyboardInterrupt):
        Conversation(bundles["fp32"], ChatOptions(threads=1), write, notes.append).answer("the cat")


def test_a_message_too_long_for_the_context_is_refused_and_a_conversation_goes_on(
    bundles: dict[str, Path],
) -> None:
    long = "the mat and the log " * 100
    with pytest.raises(BadInput, match=r"needs \d+ tokens, 248 fit"):
        Talk(bundles["fp32"], prompt=long, max_new_tokens=8)
    talk = Talk(bundles["fp32"], "the cat", long, "", "the dog", max_new_tokens=8)
    assert len(talk.chat.messages) == 4
    assert sum("248 fit" in note for note in talk.notes) == 1
    talk = Talk(bundles["fp32"], *["the cat sat on the mat"] * 6, max_new_tokens=6, context=96, system="a")
    assert sum("the first after" in note for note in talk.notes) == 6
    assert any("outgrew 96 tokens" in note for note in talk.notes)


def test_bytes_that_are_no_text_are_refused_and_a_conversation_goes_on(  # type: ignore[no-untyped-def]
    edgedisp, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = io.BytesIO(b"the cat\n\xff\nthe dog\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, "utf-8", errors="strict"))
    ended = edgedisp("chat", bundles["fp32"], "--max-new-tokens", "4")
    assert ended.code == 0 and ended.err.count("the first after") == 2
    assert "\nthe message is not text in UTF-8\n" in ended.err


def test_sampling_repeats_with_its_seed(bundles: dict[str, Path]) -> None:
    def sampled(seed: int) -> str:
        return Talk(bundles["fp32"], prompt="the cat", max_new_tokens=16, temperature=1.5, seed=seed).text

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_a_conversation_is_sent_as_the_ids_of_apply_chat_template(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    def checked(name: str, template: str, adds_bos: bool) -> Conversation:
        bundle = with_template(bundles["fp32"], tmp_path / name, template, adds_bos)
        chat = Talk(bundle, max_new_tokens=5).chat
        for messages in CONVERSATIONS if template else ():
            plain = [{**m, "content": m["content"].replace("<|im_end|>", "< |im_end|>")} for m in messages]
            ids = tokenizer(bundle).apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
            assert chat.encode(messages) == ids
        return chat

    for adds_bos in (False, True):
        for index, template in enumerate((LINES, WITH_BOS)):
            checked(f"{index}{adds_bos}", template, adds_bos)
    # Without a template the text is continued, with BOS where training had it, and never two.
    plain = tokenizer(bundles["fp32"]).encode("the cat", add_special_tokens=False)
    assert checked("plain", "", False).encode(turn(("user", "the cat"))) == plain
    chat = checked("raw", "", True)
    for text in ("the cat", f"{SPECIALS[1]}the cat"):
        assert chat.encode(turn(("user", text))) == [1, *plain]


def test_without_a_template_the_text_is_continued_and_the_user_is_told(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    bundle = copy_with(bundles["fp32"], tmp_path / "plain")
    (bundle / "chat_template.jinja").unlink()
    talk = Talk(bundle, prompt="the cat", max_new_tokens=5)
    tok = tokenizer(bundles["fp32"])
    expected = recompute(bundle, tok.encode("the cat", add_special_tokens=False), 5)
    assert talk.text == tok.decode(expected) + "\n"
    assert any("no chat template" in note for note in talk.notes)


@pytest.mark.parametrize(("template", "reason"), [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end"),
    ("{% set n = namespace(x='a') %}{% for i in range(50) %}{% set n.x = n.x * 2 %}{% endfor %}", "not end"),
    ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recurses too deep"),
    ("{{ " + "(" * 99999 + "1" + ")" * 99999 + " }}", "recurses too deep"),
    ("{% for a in range(10000000000) %}{% endfor %}", "Range too big"),
    ("{{ messages.__class__.__mro__ }}", "unsafe"),
    ("{{ raise_exception('no system') }}", "no system"),
    ("{% for %}", "Expected an expression"),
])  # fmt: skip
def test_a_template_that_is_no_honest_program_is_one_line(
    template: str, reason: str, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    tok = tokenizer(bundles["fp32"])
    tok.chat_template = template
    with pytest.raises(BadInput, match=f"chat template cannot be used: .*{reason}") as raised:
        prompt_ids(tok, turn(("user", "the cat")))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    tok.chat_template = WITH_BOS  # the next template finds a process
    assert prompt_ids(tok, turn(("user", "the cat")))[0] == tok.bos_token_id


def test_bad_bundles_and_messages_are_bad_input(bundles: dict[str, Path], tmp_path: Path) -> None:
    def error(bundle: Path, **options: Any) -> str:
        with pytest.raises(BadInput) as raised:
            Talk(bundle, prompt="the cat", **options)
        return str(raised.value)

    assert "genai_config.json is missing" in error(tmp_path / "nowhere")
    assert "0 fit beside the answer" in error(bundles["fp32"], max_new_tokens=256)
    broken = copy_with(bundles["fp32"], tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"nothing")
    assert "onnxruntime-genai cannot open it" in error(broken)


LIBRARY = {"custom_ops_library": "/tmp/x.so"}


@pytest.mark.parametrize("changes", [
    {"model__decoder__session_options": LIBRARY},
    {"model__decoder__session_options": {"provider_options": [{"qnn": {"backend_path": "/tmp/x.so"}}]}},
    {"model__decoder__session_options": {"enable_profiling": "/tmp/x"}},
    {"model__decoder__pipeline": [{"first": {"session_options": LIBRARY}}]},
    {"model__encoder": {"session_options": LIBRARY}},
])  # fmt: skip
def test_options_that_could_load_native_code_are_refused_by_every_command(
    changes: dict[str, Any], bundles: dict[str, Path], tmp_path: Path
) -> None:
    hostile = copy_with(bundles["fp32"], tmp_path / "hostile", **changes)
    phone = PhoneOptions("127.0.0.1", 0, False, True, None, False, False)
    uses: list[Callable[[], Any]] = [
        lambda: Talk(hostile),
        lambda: OnnxHarnessModel(str(hostile)),  # as compare and condensation open it, too
        lambda: time_bundles([hostile], ["local"], BenchOptions(), silent),
        lambda: measure_on_phones([hostile], BenchOptions(), phone, 100, print),
    ]
    for use in uses:
        with pytest.raises(BadInput, match=r"genai_config.json: has the option .* may load native code"):
            use()


def test_a_key_that_is_there_twice_is_refused(bundles: dict[str, Path], tmp_path: Path) -> None:
    path = copy_with(bundles["fp32"], tmp_path / "twice") / "genai_config.json"
    options = json.dumps({"decoder": {"session_options": LIBRARY}})[1:-1]
    path.write_text(path.read_text().replace('{"model": {', '{"model": {' + options + ", "))
    with pytest.raises(BadInput, match="a key is there twice"):
        Talk(path.parent)


words = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(words, st.booleans(), st.integers(1, 60))
def test_the_remaining_turns_fit_end_with_the_newest_and_no_more_than_needed_go(
    lengths: list[int], system: bool, limit: int
) -> None:
    def encode(messages: Any) -> list[int]:
        return [0] * sum(int(m["content"]) for m in messages)

    messages = turn(("system", "5")) if system else []
    for number, length in enumerate(lengths):
        messages += turn(("user", str(length)))
        if number < len(lengths) - 1:
            messages += turn(("assistant", "3"))
    if lengths[-1] + 5 * system > limit:
        with pytest.raises(BadInput, match=f"{limit} fit"):
            fit(messages, encode, limit)
        return
    rest, ids, dropped = fit(messages, encode, limit)
    assert len(ids) == len(encode(rest)) <= limit
    assert rest[-1] == messages[-1]
    assert rest[:1] == messages[:1] or not system
    assert rest[system:] == messages[system + 2 * dropped :]
    if dropped:
        assert len(encode(messages[:system] + messages[system + 2 * (dropped - 1) :])) > limit
