"""`edgedisp chat`: talk to a finished bundle through onnxruntime-genai, as an app on the device would.

The bundle's chat template and tokenizer turn the conversation into ids, and the answer is streamed. The
key-value cache stays between turns: a common prefix is not computed again. When the conversation outgrows
the context, its oldest turns are dropped; the system prompt stays.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime_genai as runtime

from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput
from edgedisp.core.files import check_files
from edgedisp.graph.genai_config import GENAI_CONFIG, chat_template, read_config
from edgedisp.report.formatting import plural

DEFAULT_ANSWER = 256
CONTEXT_CAP = 4096  # the cache is allocated in full at once: 190 MB for SmolLM2-135M

SESSION_OPTIONS = {"log_id", "provider_options", "intra_op_num_threads", "inter_op_num_threads"}

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


@dataclass(frozen=True)
class ChatOptions:
    """max_new_tokens None: 256, or half of a small context. threads None: the bundle's, at most the cores.

    context: caps the model's own; None: 4096. temperature 0 takes the likeliest token. interruptible: Ctrl-C
    ends an answer, and the conversation goes on.
    """

    system: str | None = None
    max_new_tokens: int | None = None
    threads: int | None = None
    context: int | None = None
    temperature: float = 0.0
    seed: int = 0
    interruptible: bool = False


@dataclass(frozen=True)
class Turn:
    """One answer. reused_tokens: of the prompt, those still in the cache. seconds: of each token, the first
    with the prompt."""

    text: str
    prompt_tokens: int
    reused_tokens: int
    seconds: tuple[float, ...]

    def speed(self) -> str:
        """`24 tokens, the first after 34 ms, then 41.2 tokens/s`."""
        count, decode_s = len(self.seconds), sum(self.seconds[1:])
        parts = [plural(count, "token"), f"the first after {1000 * self.seconds[0]:.0f} ms"]
        return ", ".join(parts + ([f"then {(count - 1) / decode_s:.1f} tokens/s"] if decode_s else []))


class Conversation:
    """An open bundle and the messages so far.

    `write` gets the answers in pieces, each answer ending with a line end; `note` gets remarks for the user
    (dropped turns, no template, speed of each turn). Raises BadInput where the bundle is damaged or
    onnxruntime-genai cannot open it.
    """

    def __init__(
        self, bundle: Path, options: ChatOptions, write: Callable[[str], None], note: Callable[[str], None]
    ) -> None:
        check_files(bundle)
        config = read_config(bundle)
        self.options, self.write, self.note = options, write, note
        self.context = min(config["context_length"], options.context or CONTEXT_CAP)
        self.max_new_tokens = options.max_new_tokens or max(1, min(DEFAULT_ANSWER, self.context // 2))
        self.has_template = bool(chat_template(bundle))
        if not self.has_template:
            note(f"{bundle} has no chat template: the text is continued as it stands")
        self.messages: list[Message] = []
        if options.system:
            self.messages.append({"role": "system", "content": options.system})
        self.turns: list[Turn] = []
        self._open(bundle, checked_session(bundle, config))

    def _open(self, bundle: Path, session: dict[str, Any]) -> None:
        """Model, tokenizer and generator of the runtime."""
        getattr(runtime, "disable_telemetry_events", lambda: None)()  # since 0.18
        options, cores = self.options, physical_cores()
        # Without a number onnxruntime-genai 0.18 starts one thread per second hardware thread.
        threads = options.threads or min(session.get("intra_op_num_threads") or cores, cores)
        search: dict[str, Any] = {"max_length": self.context, "do_sample": options.temperature > 0}
        if options.temperature > 0:
            search |= {"temperature": options.temperature, "random_seed": options.seed}
        overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        try:
            config = runtime.Config(str(bundle))
            config.overlay(json.dumps(overlay))
            model = runtime.Model(config)
            self.tokenizer = runtime.Tokenizer(model)
            parameters = runtime.GeneratorParams(model)
            parameters.set_search_options(**search)
            self.generator = runtime.Generator(model, parameters)
        except RuntimeError as error:
            raise BadInput(f"{bundle}: onnxruntime-genai cannot open it: {error}") from error
        self.eos_ids = {int(token) for token in self.tokenizer.eos_token_ids}

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
        turn, is_stopped = self._generate(ids)
        if turn.seconds:
            self.messages = [*messages, {"role": "assistant", "content": turn.text}]
            self.turns.append(turn)
            self.note("stopped: " * is_stopped + turn.speed())
        else:
            self.note("stopped before the first token")

    def _generate(self, ids: list[int]) -> tuple[Turn, bool]:
        """Prefill what is new in `ids`, then stream up to `max_new_tokens` tokens. True: Ctrl-C ended it."""
        generator, is_stopped = self.generator, False
        cached = [int(token) for token in generator.get_sequence(0)] if generator.token_count() else []
        prefix = common_prefix(cached, ids)
        stream, pieces, seconds = self.tokenizer.create_stream(), list[str](), list[float]()
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
                    pieces.append(stream.decode(token))
                    self.write(pieces[-1])
                start = time.perf_counter()
        except KeyboardInterrupt:  # it comes between calls of the runtime, whose state stays whole
            if not self.options.interruptible:
                raise
            is_stopped = True
        self.write("\n")
        return Turn("".join(pieces), len(ids), prefix, tuple(seconds)), is_stopped

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, with the generation prompt of the template. BadInput for bytes that
        are no UTF-8, which Python's streams and arguments carry as surrogates."""
        text = "\n".join(message["content"] for message in messages)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadInput("the message is not text in UTF-8") from None
        if self.has_template:
            text = self.tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)
        return [int(token) for token in self.tokenizer.encode(text)]


def checked_session(bundle: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A bundle's session options. BadInput for those that could load native code, as custom_ops_library."""
    options = dict(config.get("decoder", {}).get("session_options", {}))
    unsafe = sorted(options.keys() - SESSION_OPTIONS) or options.get("provider_options")
    if unsafe:
        raise BadInput(
            f"{bundle / GENAI_CONFIG}: session_options has {unsafe}, which may load native code; remove it"
        )
    return options


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
