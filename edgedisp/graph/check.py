"""Proves that a bundle works before anyone ships it: it opens, prefills, decodes with its cache, and stops.

Two roads must give one answer. The logits of every prompt are computed once alone and in full; then all prompts
go through one right-padded batch, their last tokens one by one through the cache, and both must agree. The
measure is the root mean square of the difference over that of the logits (each row less its mean, which a softmax
does not see), the worst row counting. In fp32 arithmetic it is about 1e-6. With 8-bit activations
(`accuracy_level` 4) the kernels for one row and for many round differently, and SmolLM2-135M shows 0.02 to 0.04;
logits of a neighbouring token, which a cache off by one would give, differ by 0.35 and more.

Then onnxruntime-genai opens the bundle, decodes the same prompts and encodes the given texts. A disagreement in
a token fails the check only if our logits did not see the two tokens as good as equal.

Left out: the comparison with the torch model, which the caller makes on text of its choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from edgedisp import BuildFailed, Progress, silent
from edgedisp.graph.genai import GenaiModel
from edgedisp.graph.session import Logits, OnnxModel

FORCED = 4  # tokens at the end of each prompt that go through the cache one by one
EXACT_LIMIT = 1e-3  # relative difference allowed between the two roads in fp32 arithmetic
ROUNDED_LIMIT = 0.2  # and with 8-bit activations
NEW_TOKENS = 16


def check(
    bundle: Path,
    prompts: Sequence[Sequence[int]],
    *,
    texts: Sequence[str] = (),
    threads: int,
    new_tokens: int = NEW_TOKENS,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run every check on `bundle` with real prompts (token ids, each at least 2 long) and texts.

    Returns {opened, nodes: {op: n}, layers, attention_fused, products_unfused, prompts, padded_difference,
    cached_difference, difference_limit, decoded_tokens, greedy_agrees: "n/n", stops, genai: {opened, greedy_agrees,
    stops, tokenizer_agrees, round_trips}}. BuildFailed with the reason where a check fails.
    """
    if not prompts or min(map(len, prompts)) < 2:
        raise ValueError("check needs prompts of at least 2 tokens each")
    model = OnnxModel(bundle, threads)
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    rows = [list(prompt) for prompt in prompts]
    facts = _graph_facts(bundle, graph)
    limit = ROUNDED_LIMIT if _rounds_activations(graph) else EXACT_LIMIT
    progress(0, 3, "prefill and cache")
    alone = [model(np.array([row], np.int64), np.ones((1, len(row)), np.int64))[0] for row in rows]
    padded, cached = _two_roads(model, rows, alone)
    _hold(bundle, "a right-padded batch and single rows", padded, limit)
    _hold(bundle, "decoding with the cache and computing in full", cached, limit)
    progress(1, 3, "greedy decoding")
    greedy = [model.greedy(row, new_tokens, frozenset()) for row in rows]
    _check_choices(bundle, model, rows, greedy, limit, "cached greedy decoding")
    _check_stop(bundle, model.greedy(rows[0], new_tokens, frozenset(greedy[0][-1:])), greedy[0])
    progress(2, 3, "onnxruntime-genai")
    genai = _check_genai(bundle, model, rows, greedy, limit, texts)
    progress(3, 3, "checked")
    return {
        "opened": True,
        **facts,
        "prompts": len(rows),
        "padded_difference": padded,
        "cached_difference": cached,
        "difference_limit": limit,
        "decoded_tokens": sum(map(len, greedy)),
        "stops": True,
        "genai": genai,
    }


def relative_difference(logits: Logits, reference: Logits) -> float:
    """Worst row of rms(logits - reference) / rms(reference), rows less their means. Both [..., vocab]."""
    left, right = (values - values.mean(axis=-1, keepdims=True) for values in (logits, reference))
    scale = np.sqrt(np.square(right).mean(axis=-1)) + np.finfo(np.float32).tiny
    return float((np.sqrt(np.square(left - right).mean(axis=-1)) / scale).max())
