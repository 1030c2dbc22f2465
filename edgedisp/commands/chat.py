"""`edgedisp chat`: talk to a finished bundle through onnxruntime-genai, as an app on the device would.

The bundle's chat template and tokenizer turn the conversation into ids, and the answer is streamed. The
key-value cache stays between turns: a common prefix is not computed again. When the conversation outgrows
the context, its oldest turns are dropped; the system prompt stays.

onnxruntime-genai 0.18 starts one thread per second hardware thread unless it is given a number. The token it
generated last is not in its cache yet, and tokens appended then are computed without it, so the generator is
first rewound over that token, and the token is appended with the rest.
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
from edgedisp.core.errors import BadInput, BuildFailed
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
    """One answer. seconds: the model's for each token, in the first the prompt's too.

    reused_tokens: tokens of the prompt that were still in the cache. stopped: by Ctrl-C.
    """

    text: str
    prompt_tokens: int
    reused_tokens: int
    seconds: tuple[float, ...]
    stopped: bool

    def speed(self) -> str:
        """`24 tokens, the first after 34 ms, then 41.2 tokens/s`."""
        count, decode_s = len(self.seconds), sum(self.seconds[1:])
        parts = [plural(count, "token"), f"the first after {1000 * self.seconds[0]:.0f} ms"]
        if decode_s:
            parts.append(f"then {(count - 1) / decode_s:.1f} tokens/s")
        return "stopped: " * self.stopped + ", ".join(parts)


class Conversation:
    """An open bundle and the messages so far.

    `write` gets the answers in pieces, each answer ending with a line end; `note` gets remarks for the user
    (dropped turns, no template, speed of each turn).

    Raises BadInput where the bundle is damaged or onnxruntime-genai cannot open it.
    """

    def __init__(
        self, bundle: Path, options: ChatOptions, write: Callable[[str], None], note: Callable[[str], None]
    ) -> None:
        check_files(bundle)
        config = read_config(bundle)
        _check_session(bundle, config)
        self.context = min(config["context_length"], options.context or CONTEXT_CAP)
        self.max_new_tokens = options.max_new_tokens or max(1, min(DEFAULT_ANSWER, self.context // 2))
        if self.max_new_tokens >= self.context:
            raise BadInput(
                f"max_new_tokens: {self.max_new_tokens} leaves no room for a prompt: context {self.context}"
            )
        self.bundle, self.write, self.note = bundle, write, note
        self.interruptible = options.interruptible
        self.has_template = bool(chat_template(bundle))
        if not self.has_template:
            note(f"{bundle} has no chat template: the text is continued as it stands")
        system = {"role": "system", "content": options.system or ""}
        self.messages: list[Message] = [system] if options.system else []
        self.turns: list[Turn] = []
        self._open(options.threads or threads_for(config, physical_cores()), options)

    def _open(self, threads: int, options: ChatOptions) -> None:
        """Model, tokenizer and generator of the runtime."""
        getattr(runtime, "disable_telemetry_events", lambda: None)()  # since 0.18
        search: dict[str, Any] = {"max_length": self.context, "do_sample": options.temperature > 0}
        if options.temperature > 0:
            search.update(temperature=options.temperature, random_seed=options.seed)
        session = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        try:
            config = runtime.Config(str(self.bundle))
            config.overlay(json.dumps(session))
            self.model = runtime.Model(config)
            self.tokenizer = runtime.Tokenizer(self.model)
            parameters = runtime.GeneratorParams(self.model)
            parameters.set_search_options(**search)
            self.generator = runtime.Generator(self.model, parameters)
        except RuntimeError as error:
            raise BadInput(f"{self.bundle}: onnxruntime-genai cannot open it: {error}") from error
        self.eos_ids = {int(token) for token in self.tokenizer.eos_token_ids}

    def converse(self, lines: Iterable[str]) -> None:
        """Answer line after line. A message that does not fit is noted, and the conversation goes on."""
        for line in lines:
            if line.strip():
                try:
                    self.answer(line.strip())
                except BadInput as error:
                    self.note(str(error))

    def answer(self, text: str) -> None:
        """Stream the answer of one turn into `write`.

        Raises BadInput for a message that is empty, not UTF-8 or too long for the context, BuildFailed where
        the runtime fails.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # bytes of a terminal or a pipe that are no UTF-8
            raise BadInput("the message is not text in UTF-8") from error
        if not text.strip():
            raise BadInput("the message is empty")
        messages = [*self.messages, {"role": "user", "content": text}]
        messages, ids, dropped = fit(messages, self.encode, self.context - self.max_new_tokens)
        if dropped:
            self.note(f"the conversation outgrew {self.context} tokens: forgot {plural(dropped, 'old turn')}")
        try:
            turn = self._generate(ids)
        except RuntimeError as error:
            raise BuildFailed(
                f"{self.bundle}: onnxruntime-genai failed while it answered: {error}"
            ) from error
        if not turn.seconds:
            self.messages = messages[:-1]
            self.note("stopped before the first token")
            return
        self.messages = [*messages, {"role": "assistant", "content": turn.text}]
        self.turns.append(turn)
        self.note(turn.speed())

    def _generate(self, ids: list[int]) -> Turn:
        """Prefill what is new in `ids`, then stream up to `max_new_tokens` tokens."""
        generator, stopped = self.generator, False
        cached = [int(token) for token in generator.get_sequence(0)] if generator.token_count() else []
        prefix = common_prefix(cached, ids)
        stream = self.tokenizer.create_stream()
        pieces: list[str] = []
        seconds: list[float] = []
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
            if not self.interruptible:
                raise
            stopped = True
        self.write("\n")
        return Turn("".join(pieces), len(ids), prefix, tuple(seconds), stopped)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, with the generation prompt of the template."""
        if not self.has_template:
            text = "\n".join(message["content"] for message in messages)
        else:
            words = json.dumps(list(messages))
            try:
                text = self.tokenizer.apply_chat_template(words, add_generation_prompt=True)
            except RuntimeError as error:
                raise BuildFailed(f"{self.bundle}: its chat template does not work: {error}") from error
        return [int(token) for token in self.tokenizer.encode(text)]


def _check_session(bundle: Path, config: dict[str, Any]) -> None:
    """Refuse options of a stranger's bundle that could load native code, such as custom_ops_library."""
    options = dict(config.get("decoder", {}).get("session_options", {}))
    unsafe = sorted(options.keys() - SESSION_OPTIONS) or options.get("provider_options")
    if unsafe:
        raise BadInput(
            f"{bundle / GENAI_CONFIG}: session_options has {unsafe}, which may load native code; remove it"
        )


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
                f"the message needs {len(ids)} tokens, {limit} fit; shorten it or allow a larger context"
            )
        del remaining[turns[0] : turns[1]]
        dropped += 1
    return remaining, ids, dropped


def common_prefix(cached: Sequence[int], ids: Sequence[int]) -> int:
    """Tokens of `ids` that are in the cache of a generator whose sequence is `cached`.

    The last token of `cached` is not in the cache yet, and at least one token of `ids` must be computed.
    """
    most = max(0, min(len(cached), len(ids)) - 1)
    return next((index for index in range(most) if cached[index] != ids[index]), most)


def threads_for(config: dict[str, Any], cores: int) -> int:
    """The thread count written in a bundle's configuration, else `cores`; at most `cores`."""
    threads = config.get("decoder", {}).get("session_options", {}).get("intra_op_num_threads")
    return min(threads or cores, cores)
