"""A bundle works: it prefills, decodes with its cache, and onnxruntime-genai does the same.

The logits of every prompt are computed alone and in full; then all prompts go through one right-padded
batch, their last tokens one by one through the cache. The measure is rms(difference) / rms(logits), each row
less its mean, which a softmax does not see; the worst row counts. It is about 1e-6 in fp32 arithmetic and
0.02 to 0.04 with 8-bit activations (SmolLM2-135M), where kernels for one row and for many round differently;
a cache off by one gives 0.35 and more. Two decoders may differ in a token where both are as good as equal.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.files import APP, read_json, write_json
from edgedisp.graph.device_graph import has_packed_products
from edgedisp.graph.genai_config import GENAI_CONFIG, TOKENIZER_FILES
from edgedisp.graph.onnx_graph import GRAPH, read_graph
from edgedisp.graph.runtime_layouts import GGUF
from edgedisp.graph.session import Logits, OnnxModel, at_accuracy_level
from edgedisp.models import Message
from edgedisp.models.conversation import CALL, TOOL, USER

FORCED = 4  # tokens at the end of each prompt that go through the cache one by one
EXACT_LIMIT = 1e-3  # relative difference that is allowed in fp32 arithmetic
ROUNDED_LIMIT = 0.2  # and with 8-bit activations
NEW_TOKENS = 16  # decoded greedily after each prompt
CONVERSATION: list[Message] = [
    {"role": "user", "content": "Is 12 + 30 = 42?\n  Say why."},
    {"role": "assistant", "content": "Yes: naïve counting gives 42."},
    {"role": "user", "content": "And 12 - 30?"},
]
CALLING = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, USER]
GENAI = "onnxruntime-genai's tokenizer"
DATE = "strftime_now"  # in a template that writes the day into its prompts
REORDERED = 1e-5  # of the largest logit: another order of summation


def check_bundle(
    model: OnnxModel, prompts: Sequence[Sequence[int]], *, texts: Sequence[str] = ()
) -> dict[str, Any]:
    """Run every check on an opened bundle with prompts (token ids, each at least 2 long) and texts.

    Returns {padded_difference, cached_difference, difference_limit, genai: {opened, greedy_agrees: "n/n",
    tokenizer_agrees: "n/n", chat, chat_template}}. BuildFailed with the reason where a check fails.
    """
    bundle, rows = model.bundle, [list(prompt) for prompt in prompts]
    pad = read_json(bundle / GENAI_CONFIG)["model"]["pad_token_id"]
    for row in rows:  # genai takes a pad token at the end, such as <|im_end|>, for padding, and masks it
        while len(row) > 2 and row[-1] == pad:
            row.pop()
    graph = read_graph(bundle / GRAPH).graph
    rounds = any(node.attributes.get_int("accuracy_level", 0) == 4 for node in graph)
    limit = ROUNDED_LIMIT if rounds else EXACT_LIMIT
    differences = _batch_differences(model, rows)
    for what, difference in zip(("a right-padded batch and single", "cached and full"), differences):
        if not difference <= limit:  # NaN fails, too
            raise BuildFailed(
                f"{bundle}: logits of {what} rows disagree: "
                f"relative difference {difference:.3g}, limit {limit:g}"
            )
    greedy = [model.greedy(row, NEW_TOKENS, model.end_ids) for row in rows]
    _check_choices(model, rows, greedy, limit, "cached greedy decoding")
    genai = GenaiModel(bundle)
    genai_greedy = [genai.greedy(row, min(NEW_TOKENS, model.context - len(row))) for row in rows]
    differing = [index for index, ours in enumerate(greedy) if genai_greedy[index] != ours]
    others = [rows[index] for index in differing], [genai_greedy[index] for index in differing]
    _check_choices(model, *others, limit, "onnxruntime-genai")
    _check_tokenizer(bundle, genai, texts)
    chat = _check_conversation(bundle, genai)
    return {
        "padded_difference": differences[0],
        "cached_difference": differences[1],
        "difference_limit": limit,
        "genai": {
            "opened": True,
            "greedy_agrees": f"{len(rows) - len(differing)}/{len(rows)}",
            "tokenizer_agrees": f"{len(texts)}/{len(texts)}",
            **chat,
        },
    }


class GenaiModel:
    """A bundle opened by onnxruntime-genai. BuildFailed with the runtime's reason if it does not open."""

    def __init__(self, bundle: Path) -> None:
        import onnxruntime_genai

        self._runtime: Any = onnxruntime_genai
        getattr(onnxruntime_genai, "disable_telemetry_events", lambda: None)()
        try:
            self._model = onnxruntime_genai.Model(str(bundle))
            self._tokenizer = self._open_tokenizer(bundle)
        except Exception as error:  # genai raises bare RuntimeError and its own types
            raise BuildFailed(f"{bundle}: onnxruntime-genai cannot open it: {error}") from error

    def greedy(self, ids: list[int], max_new_tokens: int) -> list[int]:
        """The most likely next tokens; a stop token ends it and is the last of the result."""
        options = self._runtime.GeneratorParams(self._model)
        options.set_search_options(max_length=len(ids) + max_new_tokens, do_sample=False)
        generator = self._runtime.Generator(self._model, options)
        generator.append_tokens(ids)
        new: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            new.append(int(generator.get_next_tokens()[0]))
        return new

    def encode(self, text: str) -> list[int]:
        """The ids of a text by genai's own tokenizer, without special tokens around them."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def _open_tokenizer(self, bundle: Path) -> Any:
        """Of a copy without the chat template, which genai would parse here, without limits."""
        with tempfile.TemporaryDirectory() as folder:
            for name in (GENAI_CONFIG, *TOKENIZER_FILES):
                if (bundle / name).is_file():
                    shutil.copyfile(bundle / name, Path(folder, name))
            settings = read_json(bundle / "tokenizer_config.json")
            settings.pop("chat_template", None)
            write_json(Path(folder, "tokenizer_config.json"), settings)
            tokenizer = self._runtime.Tokenizer(folder)
        tokenizer.update_options(add_special_tokens="false")
        return tokenizer


def relative_difference(logits: Logits, reference: Logits) -> float:
    """Worst row of rms(logits - reference) / rms(reference), rows less their means. Both [..., vocab]."""
    left, right = (values - values.mean(axis=-1, keepdims=True) for values in (logits, reference))
    scale = np.sqrt(np.square(right).mean(axis=-1)) + np.finfo(np.float32).tiny
    return float((np.sqrt(np.square(left - right).mean(axis=-1)) / scale).max())


def _batch_differences(model: OnnxModel, rows: list[list[int]]) -> tuple[float, float]:
    """Worst relative difference to single rows: of a right-padded prefill, and of ragged decoding."""
    alone = [model(np.array([row], np.int64), np.ones((1, len(row)), np.int64))[0] for row in rows]
    forced = min(FORCED, min(map(len, rows)) - 1)
    lengths = np.array([len(row) - forced for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for index, (row, length) in enumerate(zip(rows, lengths)):
        ids[index, :length] = row[:length]
    logits, cache = model.decode(ids, _mask(lengths))
    padded = max(
        relative_difference(ours[:length], full[:length])
        for ours, full, length in zip(logits, alone, lengths)
    )
    cached = 0.0
    for _ in range(forced):
        tokens = np.array([[row[length]] for row, length in zip(rows, lengths)], np.int64)
        reference = np.stack([full[length] for full, length in zip(alone, lengths)])
        lengths = lengths + 1
        logits, cache = model.decode(tokens, _mask(lengths), cache)
        cached = max(cached, relative_difference(logits[:, 0], reference))
    return padded, cached


def _mask(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Right-padded mask [batch, longest]."""
    return (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int64)


def _check_choices(
    model: OnnxModel, rows: list[list[int]], decoded: list[list[int]], limit: float, runtime: str
) -> None:
    """Every decoded token must be the likeliest when all before it is computed in full, or nearly so."""
    for row, new in zip(rows, decoded):
        ids = np.array([row + new[:-1]], np.int64)
        logits = model(ids, np.ones_like(ids))[0, len(row) - 1 :]
        spread = logits.std(axis=-1) + np.finfo(np.float32).tiny
        behind = (logits.max(axis=-1) - logits[np.arange(len(new)), new]) / spread
        worst = int(behind.argmax())
        if not behind[worst] <= 2 * limit:  # both tokens may be off by the limit
            raise BuildFailed(
                f"{model.bundle}: {runtime} chose token {new[worst]} as number {worst + 1} after a prompt, "
                f"where {int(logits[worst].argmax())} is likelier by {behind[worst]:.3g} standard deviations"
            )


def _check_tokenizer(bundle: Path, genai: GenaiModel, texts: Sequence[str]) -> None:
    """genai reads tokenizer.json with code of its own; its ids must be those of the library that made it."""
    reference = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    for text in texts:
        expected = reference.encode(text, add_special_tokens=False).ids
        if (ids := genai.encode(text)) != expected:
            raise BuildFailed(
                f"{bundle}: onnxruntime-genai's tokenizer gives other ids than the tokenizers library for "
                f"the text that starts {text[:40]!r}: {ids[:20]} instead of {expected[:20]}"
            )


def _check_conversation(bundle: Path, genai: GenaiModel) -> dict[str, str]:
    """Prompts have the same ids everywhere: of a conversation, and one with a tool call where the template
    has a place for it, those of transformers and genai's tokenizer; of the example in app.json, training's.

    Returns {chat: "n/n" tokens that agree, or why there is none; example: the same of app.json's, where it
    has one; chat_template: whether genai's own engine for templates, which an app may use, gives the texts of
    transformers}. BadInput for a template that does not end.
    """
    tokenizer = models.load_tokenizer(bundle)
    if not tokenizer.chat_template:
        return {"chat": "no chat template: a text is continued"}
    messages = CONVERSATION
    if "ï" not in tokenizer.decode(models.encode(tokenizer, "ï")):  # no bytes of it: the two leave out others
        messages = [{**message, "content": message["content"].replace("ï", "i")} for message in messages]
    prompts: list[dict[str, Any]] = [{"messages": messages, "tools": None}]
    if models.chat_format(tokenizer).tool_calls == "template":
        prompts.append({"messages": CALLING, "tools": [TOOL]})

    def check(runtime: str, what: str, ids: Sequence[int], expected: Sequence[int]) -> int:
        if words := first_difference(tokenizer, ids, expected):
            raise BuildFailed(f"{bundle}: {runtime} gives other ids than {what}: {words}")
        return len(expected)

    tokens = 0
    for prompt in prompts:
        try:
            text = prompt["prompt"] = models.render_conversation(tokenizer, **prompt)
        except models.TemplateError as error:
            return {"chat": str(error)}
        expected = models.encode(tokenizer, text)
        tokens += check(GENAI, "transformers for a conversation", genai.encode(text), expected)
    agrees = {"chat": f"{tokens}/{tokens}"}
    if example := read_json(bundle / APP).get("example"):
        what, text, expected = (
            "training for the example in app.json",
            example["prompt"],
            example["prompt_ids"],
        )
        if DATE not in tokenizer.chat_template:
            text = models.render_conversation(tokenizer, example["messages"], example["tools"])
        check("transformers", what, models.encode(tokenizer, text), expected)
        tokens = check(GENAI, what, genai.encode(example["prompt"]), expected)
        agrees["example"] = f"{tokens}/{tokens}"
        prompts.append(example)
    engine = "other text than transformers, or none: render with transformers or jinja2"
    with suppress(ValueError, TimeoutError):
        texts = models.RENDERER.render_all(
            [{"messages": prompt["messages"], "tools": prompt["tools"]} for prompt in prompts],
            folder=str(bundle),
        )
        if texts == [prompt["prompt"] for prompt in prompts]:
            engine = "as transformers"
    return {**agrees, "chat_template": engine}


def first_difference(tokenizer: Any, ids: Sequence[int], expected: Sequence[int]) -> str:
    """Where ids are not the expected ones, with the tokens' text; empty where all are equal."""
    for position, pair in enumerate(zip_longest(ids, expected), start=1):
        if pair[0] != pair[1]:
            words = ["none" if token is None else f"{token} {tokenizer.decode([token])!r}" for token in pair]
            return f"token {position} of {len(expected)} is {words[0]}, not {words[1]}"
    return ""


def check_layouts(
    arranged: Path, layouts: Mapping[str, Mapping[str, Any]], bundle: Path, ids: Sequence[int], threads: int
) -> None:
    """BuildFailed unless every graph of an arranged bundle gives the logits of `bundle`, bit for bit.

    Of a graph that gives the last position's alone that one is compared, and a graph with unfolded products,
    which multiplies in fp32, is compared with the bundle at accuracy level 0; both to within the rounding of
    another order of summation.
    """
    row, is_packed = np.array([ids], np.int64), has_packed_products(read_graph(bundle / GRAPH).graph)
    measured = OnnxModel(bundle, threads)(row, np.ones_like(row))[0]
    for name in sorted({entry["graph"] for layout, entry in layouts.items() if layout != GGUF}):
        values, reference = OnnxModel(arranged, threads, name)(row, np.ones_like(row))[0], measured
        if is_packed and not has_packed_products(read_graph(arranged / name).graph):
            exact = OnnxModel(bundle, threads, at_accuracy_level(bundle, 0))
            reference = exact(row, np.ones_like(row))[0]
        is_same_work = len(values) == len(measured) and reference is measured
        worst = float(np.abs(values - reference[-len(values) :]).max())
        allowed = 0.0 if is_same_work else REORDERED * float(np.abs(reference).max())
        if not worst <= allowed:  # NaN fails, too
            raise BuildFailed(f"{arranged}: {name} differs from the bundle that was checked, by {worst:.3g}")
