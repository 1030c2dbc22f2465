"""A bundle works: it prefills, decodes with its cache, stops, and onnxruntime-genai does the same.

The logits of every prompt are computed alone and in full; then all prompts go through one right-padded
batch, their last tokens one by one through the cache. The measure is rms(difference) / rms(logits), each row
less its mean, which a softmax does not see; the worst row counts. It is about 1e-6 in fp32 arithmetic and
0.02 to 0.04 with 8-bit activations (SmolLM2-135M), where kernels for one row and for many round differently;
a cache off by one gives 0.35 and more. Two decoders may differ in a token where both are as good as equal.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.graph.onnx_graph import ATTENTION, GRAPH, PACKED, PRODUCTS
from edgedisp.graph.session import Logits, OnnxModel

FORCED = 4  # tokens at the end of each prompt that go through the cache one by one
EXACT_LIMIT = 1e-3  # relative difference that is allowed in fp32 arithmetic
ROUNDED_LIMIT = 0.2  # and with 8-bit activations
NEW_TOKENS = 16  # decoded greedily after each prompt


def check_bundle(
    model: OnnxModel,
    prompts: Sequence[Sequence[int]],
    *,
    texts: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run every check on an opened bundle with prompts (token ids, each at least 2 long) and texts.

    Returns {opened, nodes: {op: n}, layers, attention_fused, products_unfused, prompts, padded_difference,
    cached_difference, difference_limit, decoded_tokens, stops, genai: {opened, greedy_agrees: "n/n", stops,
    tokenizer_agrees: "n/n", round_trips: "n/n"}}. BuildFailed with the reason where a check fails.
    """
    if not prompts or min(map(len, prompts)) < 2:
        raise ValueError("check_bundle needs prompts of at least 2 tokens each")
    if max(map(len, prompts)) + NEW_TOKENS > model.context:
        raise ValueError(f"prompts must leave room for {NEW_TOKENS} tokens in the context of {model.context}")
    bundle, rows = model.bundle, [list(prompt) for prompt in prompts]
    graph = ir.load(bundle / GRAPH).graph
    facts = _graph_facts(bundle, graph)
    rounds = any(node.attributes.get_int("accuracy_level", 0) == 4 for node in graph)
    limit = ROUNDED_LIMIT if rounds else EXACT_LIMIT
    progress(0, 3, "prefill and cache")
    alone = [model(np.array([row], np.int64), np.ones((1, len(row)), np.int64))[0] for row in rows]
    padded, cached = _batch_differences(model, rows, alone)
    _check_limit(bundle, "a right-padded batch and single rows", padded, limit)
    _check_limit(bundle, "decoding with the cache and computing in full", cached, limit)
    progress(1, 3, "greedy decoding")
    greedy = [model.greedy(row, NEW_TOKENS, model.end_ids) for row in rows]
    _check_choices(model, rows, greedy, limit, "cached greedy decoding")
    _check_stop(bundle, model.greedy(rows[0], NEW_TOKENS, frozenset(greedy[0][-1:])), greedy[0])
    progress(2, 3, "onnxruntime-genai")
    genai = GenaiModel(bundle)
    genai_greedy = [genai.greedy(row, NEW_TOKENS) for row in rows]
    _check_choices(model, rows, genai_greedy, limit, "onnxruntime-genai")
    stopped = GenaiModel(bundle, stop_id=genai_greedy[0][-1]).greedy(rows[0], NEW_TOKENS)
    _check_stop(bundle, stopped, genai_greedy[0])
    equal = sum(ours == theirs for ours, theirs in zip(greedy, genai_greedy))
    tokenizer_facts = _check_tokenizer(bundle, genai.tokenizer(), texts)
    progress(3, 3, "checked")
    genai_facts = {"opened": True, "greedy_agrees": f"{equal}/{len(rows)}", "stops": True, **tokenizer_facts}
    return {
        "opened": True,
        **facts,
        "prompts": len(rows),
        "padded_difference": padded,
        "cached_difference": cached,
        "difference_limit": limit,
        "decoded_tokens": sum(map(len, greedy)),
        "stops": True,
        "genai": genai_facts,
    }


class GenaiModel:
    """A bundle opened by onnxruntime-genai. BuildFailed with the runtime's reason if it does not open."""

    def __init__(self, bundle: Path, stop_id: int | None = None) -> None:
        """`stop_id` ends a text as well; the bundle's own end-of-text ids stay (overlays add to a list)."""
        import onnxruntime_genai

        self._runtime: Any = onnxruntime_genai
        getattr(onnxruntime_genai, "disable_telemetry_events", lambda: None)()
        try:
            config = onnxruntime_genai.Config(str(bundle))
            if stop_id is not None:
                config.overlay(json.dumps({"model": {"eos_token_id": [stop_id]}}))
            self._model = onnxruntime_genai.Model(config)
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

    def tokenizer(self) -> Any:
        """The bundle's tokenizer as genai reads it: `encode(text)`, `decode(ids)`."""
        return self._runtime.Tokenizer(self._model)


def relative_difference(logits: Logits, reference: Logits) -> float:
    """Worst row of rms(logits - reference) / rms(reference), rows less their means. Both [..., vocab]."""
    left, right = (values - values.mean(axis=-1, keepdims=True) for values in (logits, reference))
    scale = np.sqrt(np.square(right).mean(axis=-1)) + np.finfo(np.float32).tiny
    return float((np.sqrt(np.square(left - right).mean(axis=-1)) / scale).max())


def _batch_differences(model: OnnxModel, rows: list[list[int]], alone: list[Logits]) -> tuple[float, float]:
    """Worst relative difference to `alone` of a right-padded prefill, and of ragged decoding with cache."""
    forced = min(FORCED, min(map(len, rows)) - 1)
    lengths = np.array([len(row) - forced for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for index, (row, length) in enumerate(zip(rows, lengths)):
        ids[index, :length] = row[:length]
    logits, cache = model.prefill(ids, _mask(lengths))
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


def _check_limit(bundle: Path, what: str, difference: float, limit: float) -> None:
    if not difference <= limit:  # NaN fails, too
        raise BuildFailed(f"{bundle}: {what} disagree: relative difference {difference:.3g}, limit {limit:g}")


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


def _check_stop(bundle: Path, stopped: list[int], free: list[int]) -> None:
    """With its last token as the end of text, the same decoding must end where that token first appears."""
    expected = free[: free.index(free[-1]) + 1]
    if stopped != expected:
        raise BuildFailed(
            f"{bundle}: decoding did not stop at its end of text: {stopped} instead of {expected}"
        )


def _check_tokenizer(bundle: Path, genai: Any, texts: Sequence[str]) -> dict[str, Any]:
    """genai reads tokenizer.json with code of its own; its ids must be those of the library that made it."""
    reference = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    round_trips = 0
    for text in texts:
        # Which of the two genai does, with special tokens or without, is set in the tokenizer's files.
        expected = [reference.encode(text, add_special_tokens=added).ids for added in (False, True)]
        ids = [int(token) for token in genai.encode(text)]
        if ids not in expected:
            first = next((i for i, (a, b) in enumerate(zip(ids, expected[0])) if a != b), len(ids))
            raise BuildFailed(
                f"{bundle}: onnxruntime-genai's tokenizer gives other ids than the tokenizers library, "
                f"from token {first} of the text that starts {text[:40]!r}: {ids[first : first + 5]} instead "
                f"of {expected[0][first : first + 5]}"
            )
        round_trips += genai.decode(ids) == text
    return {"tokenizer_agrees": f"{len(texts)}/{len(texts)}", "round_trips": f"{round_trips}/{len(texts)}"}


def _graph_facts(bundle: Path, graph: ir.Graph) -> dict[str, Any]:
    """Operator counts, and what is not in its fused form: attention, and products among quantized ones."""
    nodes = Counter(node.op_type for node in graph)
    layers = sum(str(value.name).startswith("past_key_values.") for value in graph.inputs) // 2
    products = [node for node in graph if node.op_type in PRODUCTS and node.op_type != PACKED]
    weights = [node.inputs[1] for node in products if node.inputs[1] in set(graph.initializers.values())]
    if nodes[ATTENTION] != layers:
        raise BuildFailed(
            f"{bundle}: {layers} layers have a cache, but the graph has {nodes[ATTENTION]} {ATTENTION} "
            "nodes: attention was not fused"
        )
    return {
        "nodes": dict(sorted(nodes.items())),
        "layers": layers,
        "attention_fused": nodes[ATTENTION],
        "products_unfused": len(weights) if nodes[PACKED] else 0,
    }
