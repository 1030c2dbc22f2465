"""`edgedisp chat`: talk to a finished bundle through onnxruntime-genai, as an app on the device would.

The bundle's chat template turns the conversation into text, its tokenizer turns that into ids, and the answer
is streamed. The key-value cache stays between turns: the common prefix is not computed again. When the
conversation outgrows the context, its oldest turns are dropped; the system prompt stays.

onnxruntime-genai 0.18 starts one thread per second hardware thread unless it is given a number. The token it
generated last is not in its cache yet, and tokens appended then are computed without it, so the generator is
first rewound over that token, and the token is appended with the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput, BuildFailed

DEFAULT_ANSWER = 256
CONTEXT_CAP = 4096  # the cache is allocated in full at once: 190 MB for SmolLM2-135M

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


@dataclass(frozen=True)
class ChatOptions:
    """prompt: one message to answer; None: a conversation.

    max_new_tokens None: 256, or half of a small context. threads None: what the bundle says, else all CPUs,
    at most `cores`. context: caps the model's own; None: 4096. temperature 0 takes the likeliest token.
    interruptible: Ctrl-C ends an answer, and the conversation goes on.
    """

    prompt: str | None = None
    system: str | None = None
    max_new_tokens: int | None = None
    threads: int | None = None
    cores: int | None = None
    context: int | None = None
    temperature: float = 0.0
    seed: int = 0
    interruptible: bool = False


@dataclass
class ChatStats:
    """Counts and times of a conversation; times are of the model alone, without reading and writing.

    prompt_tokens: of all prompts as sent; reused_tokens: those of them that were still in the cache. ttft_ms:
    time to first token of the last turn. decode_*: after the first token of each turn.
    """

    turns: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    dropped_turns: int = 0
    ttft_ms: float | None = None
    decode_tokens: int = 0
    decode_s: float = 0.0

    def line(self) -> str:
        """The figures in one line."""
        parts = [f"{self.turns} turn{'s' if self.turns != 1 else ''}", f"{self.new_tokens} tokens"]
        if self.ttft_ms is not None:
            parts.append(f"the first after {self.ttft_ms:.0f} ms")
        if self.decode_s:
            parts.append(f"then {self.decode_tokens / self.decode_s:.1f} tokens/s")
        return ", ".join(parts)


def chat(
    bundle: Path,
    options: ChatOptions,
    *,
    write: Callable[[str], None],
    read: Callable[[], str | None],
    note: Callable[[str], None] = lambda text: None,
) -> ChatStats:
    """Answer `options.prompt`, or hold a conversation.

    `read` gives the user's next line, None at the end; `write` takes the answer in pieces, and a line end
    after it; `note` takes remarks for the user (dropped turns, no template, speed of each turn).

    Raises BadInput where onnxruntime-genai is missing or cannot open the bundle, for an empty prompt, or if
    one message alone does not fit; BuildFailed where the runtime fails while it answers.
    """
    if options.prompt is not None and not options.prompt.strip():
        raise BadInput("prompt: is empty; give a message, or leave it out for a conversation")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise BadInput(f"max_new_tokens: is {options.max_new_tokens}, at least 1 is needed")
    if options.temperature < 0:
        raise BadInput(f"temperature: is {options.temperature}, at least 0 is needed (0 takes the likeliest)")
    talk = Conversation(bundle, options, write, note)
    if options.prompt is not None:
        talk.answer(options.prompt)
        return talk.stats
    while (line := read()) is not None:
        if not line.strip():
            continue
        try:
            note(talk.answer(line.strip()))
        except BadInput as error:  # a message too long for the context: the conversation goes on without it
            note(str(error))
    return talk.stats


class Conversation:
    """An open bundle and the messages so far. `answer` adds a turn."""

    def __init__(
        self, bundle: Path, options: ChatOptions, write: Callable[[str], None], note: Callable[[str], None]
    ) -> None:
        from edgedisp.graph.genai_config import chat_template

        config = read_config(bundle)
        model_context = int(config["model"].get("context_length", CONTEXT_CAP))
        self.context = min(model_context, options.context or CONTEXT_CAP)
        default = max(1, min(DEFAULT_ANSWER, self.context // 2))
        self.max_new_tokens = default if options.max_new_tokens is None else options.max_new_tokens
        if self.max_new_tokens >= self.context:
            raise BadInput(
                f"max_new_tokens: {self.max_new_tokens} leaves no room for a prompt: context {self.context}"
            )
        self.bundle, self.write, self.note = bundle, write, note
        self.interruptible = options.interruptible
        self.has_template = bool(chat_template(bundle))
        if not self.has_template:
            note(f"{bundle} has no chat template: the text is continued as it stands")
        self.messages: list[Message] = (
            [{"role": "system", "content": options.system}] if options.system else []
        )
        threads = threads_for(config, options.cores) if options.threads is None else options.threads
        self._open(threads, options.temperature, options.seed)
        self.stats = ChatStats()

    def _open(self, threads: int, temperature: float, seed: int) -> None:
        """Model, tokenizer and generator of the runtime. `threads` 0: all CPUs."""
        try:
            import onnxruntime_genai as runtime
        except ModuleNotFoundError as error:
            raise BadInput("chat needs onnxruntime-genai: pip install onnxruntime-genai") from error
        getattr(runtime, "disable_telemetry_events", lambda: None)()
        session = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        search: dict[str, Any] = {"max_length": self.context, "do_sample": temperature > 0}
        if temperature > 0:
            search.update(temperature=temperature, random_seed=seed)
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

    def answer(self, text: str) -> str:
        """Stream the answer of one turn into `write`; returns a line about its length and speed."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # bytes of a terminal or a pipe that are no UTF-8
            raise BadInput("the message is not text in UTF-8") from error
        messages = [*self.messages, {"role": "user", "content": text}]
        messages, ids, dropped = fit(messages, self.encode, self.context - self.max_new_tokens)
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            self.note(f"the conversation outgrew {self.context} tokens: the oldest {turns} forgotten")
        try:
            reply, seconds, stopped = self._generate(ids)
        except RuntimeError as error:
            raise BuildFailed(
                f"{self.bundle}: onnxruntime-genai failed while it answered: {error}"
            ) from error
        self.stats.dropped_turns += dropped
        if not seconds:
            self.messages = messages[:-1]
            return "stopped before the first token"
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        self.stats.turns += 1
        count, decode_s = len(seconds), sum(seconds[1:])
        speed = f", {(count - 1) / decode_s:.1f} tokens/s" if decode_s else ""
        tokens = f"{count} token{'s' if count != 1 else ''}"
        return f"{'stopped: ' * stopped}{tokens}, the first after {1000 * seconds[0]:.0f} ms{speed}"

    def _generate(self, ids: list[int]) -> tuple[str, list[float], bool]:
        """Prefill what is new in `ids`, then stream up to `max_new_tokens` tokens.

        Returns the text, the model's seconds for each token (the prompt's in the first), and whether Ctrl-C
        stopped it.
        """
        generator, stats, stopped = self.generator, self.stats, False
        cached = [int(token) for token in generator.get_sequence(0)] if generator.token_count() else []
        prefix = common_prefix(cached, ids)
        stream = self.tokenizer.create_stream()
        pieces: list[str] = []
        seconds: list[float] = []
        try:
            started = time.perf_counter()
            if cached:
                generator.rewind_to(prefix)
            generator.append_tokens(ids[prefix:])
            while len(seconds) < self.max_new_tokens and not (seconds and generator.is_done()):
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                seconds.append(time.perf_counter() - started)
                if token not in self.eos_ids:
                    pieces.append(stream.decode(token))
                    self.write(pieces[-1])
                started = time.perf_counter()
        except KeyboardInterrupt:  # it comes between calls of the runtime, whose state stays whole
            if not self.interruptible:
                raise
            stopped = True
        self.write("\n")
        if seconds:
            stats.prompt_tokens += len(ids)
            stats.reused_tokens += prefix
            stats.new_tokens += len(seconds)
            stats.ttft_ms = 1000.0 * seconds[0]
            stats.decode_tokens += len(seconds) - 1
            stats.decode_s += sum(seconds[1:])
        return "".join(pieces), seconds, stopped

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


def read_config(bundle: Path) -> dict[str, Any]:
    """genai_config.json. Raises BadInput where the bundle has none: this runtime cannot open it then."""
    path = bundle / "genai_config.json"
    if not bundle.is_dir():
        raise BadInput(f"{bundle}: no such folder; give a bundle such as RUN/ARM/int4")
    if not path.is_file():
        hint = "give a bundle such as RUN/ARM/int4, of a family that this runtime knows"
        if (bundle / "onnx").is_dir():
            hint = "it is laid out for transformers.js; export it with `--layouts onnxruntime-genai` as well"
        elif list(bundle.glob("*.safetensors")):
            hint = "it is a model folder; `edgedisp export` makes a bundle of it"
        raise BadInput(f"{bundle}: holds no genai_config.json, so onnxruntime-genai cannot open it; {hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return {**config, "model": dict(config["model"])}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a runtime configuration ({error!r}); export the bundle again") from error


def threads_for(config: dict[str, Any], cores: int | None) -> int:
    """The thread count of a bundle's configuration, at most `cores`; 0 is all CPUs."""
    bundle_threads = config["model"].get("decoder", {}).get("session_options", {}).get("intra_op_num_threads")
    return min(bundle_threads or cores or 0, cores or bundle_threads or 0)
