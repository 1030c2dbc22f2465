"""Talk to a finished bundle through onnxruntime-genai, as an app on the device would.

The bundle's chat template turns the conversation into text, the bundle's tokenizer turns that into ids, and
the answer is streamed piece by piece. Between turns the key-value cache is kept: what the new conversation
shares with the old one is not computed again. When the conversation outgrows the context, its oldest turns
are dropped (the system prompt stays) and the user is told.

Two habits of onnxruntime-genai 0.18 shape this file. Unless a number is given, it starts a thread for every
second hardware thread of the machine (one, on two), so a number is always given. And the last token that it
generated is not in its cache yet: tokens appended at that point are computed as if it were not there (logits
off by more than 1 in fp32), so the generator is first wound back over that token, and the token is appended
with the rest.

Left out: beams, tools, images.
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
class ChatStats:
    """What a conversation cost. Speeds are of the model alone: no reading, no writing."""

    turns: int
    prompt_tokens: int
    """Tokens of all prompts as sent, those kept in the cache included."""
    reused_tokens: int
    """Those of them that were still in the cache."""
    new_tokens: int
    ttft_ms: float | None
    """Time to first token of the last turn; None without an answer."""
    decode_tokens_per_s: float | None
    """After the first token of each turn, over all turns; None where no turn had a second token."""
    dropped_turns: int
    """Oldest turns left out of the prompt because they no longer fitted."""
    chat_template: bool
    """False: the bundle has none, and text was continued as it stood."""
    context: int
    """Most tokens of prompt and answer together."""

    def line(self) -> str:
        """The conversation's figures in one line, for people."""
        parts = [f"{self.turns} turn{'s' if self.turns != 1 else ''}", f"{self.new_tokens} tokens"]
        if self.ttft_ms is not None:
            parts.append(f"the first after {self.ttft_ms:.0f} ms")
        if self.decode_tokens_per_s is not None:
            parts.append(f"then {self.decode_tokens_per_s:.1f} tokens/s")
        return ", ".join(parts)


def chat(
    bundle: Path,
    *,
    prompt: str | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    threads: int | None = None,
    cores: int | None = None,
    context: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    interruptible: bool = False,
    write: Callable[[str], None],
    read: Callable[[], str | None],
    note: Callable[[str], None] = lambda text: None,
) -> ChatStats:
    """Answer `prompt`, or hold a conversation: `read` gives the user's next line, None at the end.

    `write` takes the answer in pieces, and a line end after it; `note` takes remarks for the user (turns
    dropped, no template, speed of each turn in a conversation). `max_new_tokens` None: 256, or half of a
    small context. Temperature 0 takes the likeliest token.
    `threads` None: the number written into the bundle, else all CPUs; at most `cores`, as the bundle may be
    for another device. `context` caps the model's own (default 4096). `interruptible`: Ctrl-C ends an answer,
    and the conversation goes on.

    Raises BadInput where onnxruntime-genai is missing or cannot open the bundle, for an empty prompt, or if
    one message alone does not fit; BuildFailed where the runtime fails while it answers.
    """
    if prompt is not None and not prompt.strip():
        raise BadInput("prompt: is empty; give a message, or leave it out for a conversation")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise BadInput(f"max_new_tokens: is {max_new_tokens}, at least 1 is needed")
    if temperature < 0:
        raise BadInput(f"temperature: is {temperature}, at least 0 is needed (0 takes the likeliest token)")
    config = read_config(bundle)
    threads = threads if threads is not None else threads_for(config, cores)
    talk = Conversation(
        bundle, config, system, max_new_tokens, threads, context, temperature, seed, interruptible, note
    )
    if prompt is not None:
        talk.answer(prompt, write)
        return talk.stats()
    while (line := read()) is not None:
        if not line.strip():
            continue
        try:
            note(talk.answer(line.strip(), write))
        except BadInput as error:  # a message too long for the context: the conversation goes on without it
            note(str(error))
    return talk.stats()


class Conversation:
    """One open model with what was said so far. `answer` adds a turn."""

    def __init__(
        self,
        bundle: Path,
        config: dict[str, Any],
        system: str | None,
        max_new_tokens: int | None,
        threads: int,
        context: int | None,
        temperature: float,
        seed: int,
        interruptible: bool,
        note: Callable[[str], None],
    ) -> None:
        own = int(config["model"].get("context_length", CONTEXT_CAP))
        self.context = min(own, context or CONTEXT_CAP)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(DEFAULT_ANSWER, self.context // 2))
        if max_new_tokens >= self.context:
            raise BadInput(
                f"max_new_tokens: {max_new_tokens} leaves no room for a prompt: context {self.context}"
            )
        self.bundle, self.max_new_tokens, self.note = bundle, max_new_tokens, note
        self.interruptible = interruptible
        self.templated = has_template(bundle)
        if not self.templated:
            note(f"{bundle} has no chat template: the text is continued as it stands")
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._open(threads, temperature, seed)
        self.turns = self.prompt_tokens = self.reused_tokens = self.new_tokens = self.dropped_turns = 0
        self.ttft_ms: float | None = None
        self.later_tokens, self.later_s = 0, 0.0

    def _open(self, threads: int, temperature: float, seed: int) -> None:
        """Model, tokenizer and generator of the runtime. `threads` 0: all CPUs."""
        try:
            import onnxruntime_genai as runtime
        except ModuleNotFoundError as error:
            raise BadInput("chat needs onnxruntime-genai: pip install onnxruntime-genai") from error
        getattr(runtime, "disable_telemetry_events", lambda: None)()
        options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        search: dict[str, Any] = {"max_length": self.context, "do_sample": temperature > 0}
        if temperature > 0:
            search.update(temperature=temperature, random_seed=seed)
        try:
            opened = runtime.Config(str(self.bundle))
            opened.overlay(json.dumps(options))
            self.model = runtime.Model(opened)
            self.tokenizer = runtime.Tokenizer(self.model)
            parameters = runtime.GeneratorParams(self.model)
            parameters.set_search_options(**search)
            self.generator = runtime.Generator(self.model, parameters)
        except RuntimeError as error:
            raise BadInput(f"{self.bundle}: onnxruntime-genai cannot open it: {error}") from error
        self.ends = {int(token) for token in self.tokenizer.eos_token_ids}

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """One turn: streams the answer into `write`; returns a line about its length and speed."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # bytes that the terminal or a pipe gave and that are no UTF-8
            raise BadInput("the message is not text in UTF-8") from error
        messages = [*self.messages, {"role": "user", "content": text}]
        messages, ids, dropped = fit(messages, self.encode, self.context - self.max_new_tokens)
        if dropped:
            oldest = "oldest turn is" if dropped == 1 else f"oldest {dropped} turns are"
            self.note(f"the conversation outgrew {self.context} tokens: the {oldest} forgotten")
        try:
            reply = self._generate(ids, write)
        except RuntimeError as error:
            raise BuildFailed(
                f"{self.bundle}: onnxruntime-genai failed while it answered: {error}"
            ) from error
        self.dropped_turns += dropped
        if reply is None:
            self.messages = messages[:-1]
            return "stopped before the first token"
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        self.turns += 1
        return self.last

    def _generate(self, ids: list[int], write: Callable[[str], None]) -> str | None:
        """Compute what is new in `ids`, then stream up to `max_new_tokens` tokens.

        Returns their text, None where it was stopped before the first of them.
        """
        have = (
            [int(token) for token in self.generator.get_sequence(0)] if self.generator.token_count() else []
        )
        kept = reusable(have, ids)
        stream = self.tokenizer.create_stream()
        pieces: list[str] = []
        model_s: list[float] = []  # time in the model for each token, the prompt's in the first
        stopped = False
        try:
            started = time.perf_counter()
            if have:
                self.generator.rewind_to(kept)
            self.generator.append_tokens(ids[kept:])
            while len(model_s) < self.max_new_tokens and not (model_s and self.generator.is_done()):
                self.generator.generate_next_token()
                token = int(self.generator.get_next_tokens()[0])
                model_s.append(time.perf_counter() - started)
                if token not in self.ends:
                    pieces.append(stream.decode(token))
                    write(pieces[-1])
                started = time.perf_counter()
        except KeyboardInterrupt:  # it comes between calls of the runtime, whose state stays whole
            if not self.interruptible:
                raise
            stopped = True
        write("\n")
        if not model_s:
            return None
        self._count(len(ids), kept, model_s, stopped)
        return "".join(pieces)

    def _count(self, prompt_tokens: int, kept: int, model_s: list[float], stopped: bool) -> None:
        self.prompt_tokens += prompt_tokens
        self.reused_tokens += kept
        self.new_tokens += len(model_s)
        self.ttft_ms = 1000.0 * model_s[0]
        later = sum(model_s[1:])
        self.later_tokens += len(model_s) - 1
        self.later_s += later
        speed = f", {(len(model_s) - 1) / later:.1f} tokens/s" if later else ""
        said = f"{len(model_s)} token{'s' if len(model_s) != 1 else ''}"
        self.last = f"{'stopped: ' * stopped}{said}, the first after {self.ttft_ms:.0f} ms{speed}"

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, ready for the model's next words."""
        if self.templated:
            try:
                text = self.tokenizer.apply_chat_template(
                    json.dumps(list(messages)), add_generation_prompt=True
                )
            except RuntimeError as error:
                raise BuildFailed(f"{self.bundle}: its chat template does not work: {error}") from error
        else:
            text = "\n".join(message["content"] for message in messages)
        return [int(token) for token in self.tokenizer.encode(text)]

    def stats(self) -> ChatStats:
        """What the conversation cost so far."""
        return ChatStats(
            turns=self.turns,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            new_tokens=self.new_tokens,
            ttft_ms=self.ttft_ms,
            decode_tokens_per_s=self.later_tokens / self.later_s if self.later_s else None,
            dropped_turns=self.dropped_turns,
            chat_template=self.templated,
            context=self.context,
        )


def fit(
    messages: Sequence[Message], encode: Callable[[Sequence[Message]], list[int]], limit: int
) -> tuple[list[Message], list[int], int]:
    """Drop the oldest turns until the encoded conversation has at most `limit` tokens.

    Returns (messages kept, their ids, turns dropped). A turn is a user's message with what follows it; the
    system prompt and the newest turn stay. Raises BadInput where these alone are too long.
    """
    kept, dropped = list(messages), 0
    while len(ids := encode(kept)) > limit:
        starts = [i for i, message in enumerate(kept) if message["role"] == "user"]
        if len(starts) < 2:
            raise BadInput(
                f"the message needs {len(ids)} tokens, {limit} fit; shorten it or allow a larger context"
            )
        del kept[starts[0] : starts[1]]
        dropped += 1
    return kept, ids, dropped


def reusable(have: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens of `ids` are in the cache of a generator whose sequence is `have`.

    The last token of `have` is not in the cache yet, and at least one token of `ids` must be computed.
    """
    most = max(0, min(len(have), len(ids)) - 1)
    for place in range(most):
        if have[place] != ids[place]:
            return place
    return most


def read_config(bundle: Path) -> dict[str, Any]:
    """genai_config.json. Raises BadInput where the bundle has none: this runtime cannot open it then."""
    path = bundle / "genai_config.json"
    if not bundle.is_dir():
        raise BadInput(f"{bundle}: no such folder; give a bundle such as RUN/ARM/int4")
    if not path.is_file():
        if (bundle / "onnx").is_dir():
            other = "it is laid out for transformers.js; export it with `--layouts onnxruntime-genai` as well"
        elif list(bundle.glob("*.safetensors")):
            other = "it is a model folder; `edgedisp export` makes a bundle of it"
        else:
            other = "give a bundle such as RUN/ARM/int4, of a family that this runtime knows"
        raise BadInput(f"{bundle}: holds no genai_config.json, so onnxruntime-genai cannot open it; {other}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["model"], dict):
            raise TypeError("model is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a runtime configuration ({error!r}); export the bundle again") from error
    return dict(config)


def threads_for(config: dict[str, Any], cores: int | None) -> int:
    """The number of threads that a bundle's configuration asks for, at most `cores`; 0 is all CPUs."""
    written = config["model"].get("decoder", {}).get("session_options", {}).get("intra_op_num_threads")
    return min(written or cores or 0, cores or written or 0)


def has_template(bundle: Path) -> bool:
    """Does the bundle's tokenizer carry a chat template, in either of the two places where it may stand?"""
    if (bundle / "chat_template.jinja").is_file():
        return True
    path = bundle / "tokenizer_config.json"
    try:
        return (
            bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))
            if path.is_file()
            else False
        )
    except ValueError as error:
        raise BadInput(f"{path}: not readable as JSON ({error}); export the bundle again") from error
