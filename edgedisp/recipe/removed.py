"""Keys that recipes and device profiles of earlier versions had, and what replaced each."""

from __future__ import annotations

_QUANTIZE = {
    "rescale": "removed; method gptq loses less in less time",
    "max_flips": "removed with accuracy_level auto; accuracy_level 0 computes in fp32, 4 in int8",
    "damping": "removed; method gptq always uses 0.01",
    "act_order": "removed; method gptq always takes the most important columns first",
    "correction": "removed; method gptq always uses 0.5",
    "head_group": "removed; the head has the groups of `group`",
}

REMOVED = {
    **{f"quantize.{name}.{key}": words for name in ("int8", "int4") for key, words in _QUANTIZE.items()},
    "quantize.head_group": _QUANTIZE["head_group"],  # of a device profile
    "train.quantization_aware.learn_scales": "removed; method gptq finds the scales when rounding begins",
    "train.quantization_aware.ramp": "removed; rounding begins at once, at `start`",
    "evaluate.batch_tokens": "removed; every sequence is scored alone, so that batches change no score",
}
"""Dotted key -> what replaced it."""
