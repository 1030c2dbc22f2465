"""`edgedisp chat`: talk to a finished bundle through onnxruntime-genai, as an app on the device would.

The conversation becomes the ids of transformers' `apply_chat_template`, as in training, and the answer is
streamed; a tool call is shown whole. The key-value cache stays between turns: a common prefix is not computed
again. When the conversation outgrows the context, its oldest turns are dropped; the system prompt stays.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime_genai as runtime
from tokenizers.decoders import DecodeStream

from edgedisp import models
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput
from edgedisp.core.files import APP, check_files, read_json
from edgedisp.evaluate import answers
from edgedisp.graph.app_contract import max_new_tokens
from edgedisp.graph.genai_config import chat_template, read_config
from edgedisp.models import Message
from edgedisp.report.formatting import plural

MAY_BE_CALL = re.compile(r"\s*[\[{<]")  # the start of an answer
TAGS = re.compile(r"\s*<think>.*?</think>|</?tool_call>", re.DOTALL)  # Qwen's, around calls
CONTEXT_CAP = 4096  # the cache is allocated in full at once: 190 MB for SmolLM2-135M


@dataclass(frozen=True)
class ChatOptions:
    """max_new_tokens None: 256, or half of a small context. threads None: the bundle's, at most the cores.

    system None: that of app.json. context: caps the model's own; None: 4096. temperature 0 takes the
    likeliest token. interruptible: Ctrl-C ends an answer, and the conversation goes on. as_json: each answer
    is a line {"text", "tool_calls"}.
    """

    system: str | None = None
    max_new_tokens: int | None = None
    threads: int | None = None
    context: int | None = None
    temperature: float = 0.0
    seed: int = 0
    interruptible: bool = False
    as_json: bool = False


class Conversation:
    """An open bundle and the messages so far.

    `write` gets the answers in pieces, each answer ending with a line end, and an answer that may be a tool
    call at its end, as `turn_on(device="desk lamp")`; `note` gets remarks for the user
    (dropped turns, no template, speed of each turn). Raises BadInput where the bundle is damaged or
    onnxruntime-genai cannot open it.
    """

    def __init__(
        self, bundle: Path, options: ChatOptions, write: Callable[[str], None], note: Callable[[str], None]
    ) -> None:
        check_files(bundle)
        config = read_config(bundle)
        self.bundle, self.options, self.write, self.note = bundle, options, write, note
        if chat_template(bundle):
            models.RENDERER.start()  # it imports its libraries while the tokenizer is opened
        self.tokenizer = models.load_tokenizer(bundle)
        ids = config["eos_token_id"]
        self.eos_ids = frozenset(ids if isinstance(ids, list) else [ids])
        self.context = min(config["context_length"], options.context or CONTEXT_CAP)
        self.max_new_tokens = options.max_new_tokens or max_new_tokens(self.context)
        if not self.tokenizer.chat_template:
            note(f"{bundle} has no chat template: the text is continued as it stands")
        self.messages: list[Message] = []
        app = read_json(bundle / APP)
        self.tools = app.get("tools")
        if system := app.get("system") if options.system is None else options.system:
            self.messages.append({"role": "system", "content": system})
        self._open(config["decoder"].get("session_options") or {})

    def _open(self, session: dict[str, Any]) -> None:
        """The runtime's generator. Its tokenizer would parse and render the template with code of its own."""
        getattr(runtime, "disable_telemetry_events", lambda: None)()  # since 0.18
        options, cores = self.options, physical_cores()
        # Without a number onnxruntime-genai 0.18 starts one thread per second hardware thread.
        threads = options.threads or min(session.get("intra_op_num_threads") or cores, cores)
        search: dict[str, Any] = {"max_length": self.context, "do_sample": options.temperature > 0}
        if options.temperature > 0:
            search |= {"temperature": options.temperature, "random_seed": options.seed}
        overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        try:
            config = runtime.Config(str(self.bundle))
            config.overlay(json.dumps(overlay))
            model = runtime.Model(config)
            parameters = runtime.GeneratorParams(model)
            parameters.set_search_options(**search)
            self.generator = runtime.Generator(model, parameters)
        except RuntimeError as error:
            raise BadInput(f"{self.bundle}: onnxruntime-genai cannot open it: {error}") from error

    def converse(self, lines: Iterable[str]) -> None:
        """Answer line after line. A message that does not fit is noted, and the conversation goes on."""
        for line in filter(None, map(str.strip, lines)):
            try:
                self.answer(line)
            except BadInput as error:
                self.note(str(error))

    def answer(self, text: str) -> None:
        """Stream the answer of one turn into `write`. BadInput for a message too long for the context."""
        messages = [*self.messages, {"role": "user", "content": text}]
        messages, ids, dropped = fit(messages, self.encode, self.context - self.max_new_tokens)
        if dropped:
            self.note(f"the conversation outgrew {self.context} tokens: forgot {plural(dropped, 'old turn')}")
        answer, seconds, is_stopped = self._generate(ids)
        if seconds:
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            self.note("stopped: " * is_stopped + speed(seconds))
        else:
            self.note("stopped before the first token")

    def _generate(self, ids: list[int]) -> tuple[str, list[float], bool]:
        """Prefill what is new in `ids`, then stream up to `max_new_tokens` tokens. Returns the text, the
        seconds of each token (of the first with the prompt), and whether Ctrl-C ended it."""
        generator, is_stopped = self.generator, False
        cached = [int(token) for token in generator.get_sequence(0)] if generator.token_count() else []
        prefix = common_prefix(cached, ids)
        stream, text, end, seconds = DecodeStream(skip_special_tokens=True), "", 0, list[float]()
        try:
            start = time.perf_counter()
            if cached:
                generator.rewind_to(prefix)
            generator.append_tokens(ids[prefix:])
            while len(seconds) < self.max_new_tokens and not (seconds and generator.is_done()):
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                seconds.append(time.perf_counter() - start)
                if token not in self.eos_ids:
                    try:
                        piece = stream.step(self.tokenizer.backend_tokenizer, token)
                    except Exception:  # a stray byte after a character of bytes; it has no type of its own
                        stream = DecodeStream(skip_special_tokens=True)
                        piece = stream.step(self.tokenizer.backend_tokenizer, token)
                    text += piece or ""
                    if not (self.options.as_json or MAY_BE_CALL.match(text)):
                        self.write(text[end:])
                        end = len(text)
                start = time.perf_counter()
        except KeyboardInterrupt:  # it comes between calls of the runtime, whose state stays whole
            if not self.options.interruptible:
                raise
            is_stopped = True
        calls = tool_calls(text)
        if self.options.as_json:
            self.write(json.dumps({"text": text, "tool_calls": calls}, ensure_ascii=False))
        elif MAY_BE_CALL.match(text):
            self.write("\n".join(map(call_text, calls)) or text[end:])
        self.write("\n")
        return text, seconds, is_stopped

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation. BadInput for a template that cannot be rendered, and for bytes that
        are no UTF-8, which Python's streams and arguments carry as surrogates."""
        try:
            "".join(message["content"] for message in messages).encode()
        except UnicodeEncodeError:
            raise BadInput("the message is not text in UTF-8") from None
        return models.prompt_ids(self.tokenizer, messages, self.tools)


def speed(seconds: Sequence[float]) -> str:
    """`24 tokens, the first after 34 ms, then 41.2 tokens/s`."""
    count, decode_s = len(seconds), sum(seconds[1:])
    parts = [plural(count, "token"), f"the first after {1000 * seconds[0]:.0f} ms"]
    return ", ".join(parts + ([f"then {(count - 1) / decode_s:.1f} tokens/s"] if decode_s else []))


def tool_calls(text: str) -> list[dict[str, Any]]:
    """The calls {name, arguments} of an answer that consists of them; none where it holds anything else."""
    pieces = answers.parse(TAGS.sub("", text))
    names, arguments = answers.calls(pieces)
    values = sum(len(piece) if isinstance(piece, list) else 1 for piece in pieces)
    if len(names) < values or not all(names):
        return []
    return [{"name": name, "arguments": named} for name, named in zip(names, arguments)]


def call_text(call: dict[str, Any]) -> str:
    """A call for people: `turn_on(device="desk lamp")`."""
    arguments = (
        f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in call["arguments"].items()
    )
    return f"{call['name']}({', '.join(arguments)})"


def fit(
    messages: Sequence[Message], encode: Callable[[Sequence[Message]], list[int]], limit: int
) -> tuple[list[Message], list[int], int]:
    """Drop the oldest turns until the encoded conversation has at most `limit` tokens.

    Returns (remaining messages, their ids, turns dropped). A turn is a user's message with what follows it;
    the system prompt and the newest turn stay. Raises BadInput where these alone are too long.
    """
    remaining, dropped = list(messages), 0
    while len(ids := encode(remaining)) > limit:
        turns = [index for index, message in enumerate(remaining) if message["role"] == "user"]
        if len(turns) < 2:
            raise BadInput(
                f"the message needs {len(ids)} tokens, {max(0, limit)} fit beside the answer; shorten it or "
                "allow a larger context"
            )
        del remaining[turns[0] : turns[1]]
        dropped += 1
    return remaining, ids, dropped


def common_prefix(cached: Sequence[int], ids: Sequence[int]) -> int:
    """Tokens of `ids` that are in the cache of a generator whose sequence is `cached`.

    The token that onnxruntime-genai generated last is not in its cache yet, and tokens appended to it are
    computed without it; so it is appended again. At least one token of `ids` must be computed.
    """
    most = max(0, min(len(cached), len(ids)) - 1)
    return next((index for index in range(most) if cached[index] != ids[index]), most)
