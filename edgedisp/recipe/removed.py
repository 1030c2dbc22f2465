"""Keys of earlier versions: what a recipe that still names one is told."""

_QUANTIZE = {
    "rescale": "removed; method gptq loses less in less time",
    "max_flips": "removed with accuracy_level auto; accuracy_level 0 computes in fp32, 4 in int8",
    "damping": "removed; gptq always uses 0.01, the former default",
    "act_order": "removed; gptq always takes the most important columns first",
    "correction": "removed; gptq always uses 0.5, the former default",
    "head_group": "removed; the head has the groups of `group`",
}

REMOVED = {
    **{f"quantize.{name}.{key}": words for name in ("int8", "int4") for key, words in _QUANTIZE.items()},
    "quantize.head_group": _QUANTIZE["head_group"],  # of a device profile
    "train.quantization_aware.learn_scales": "removed; method gptq finds the scales when rounding begins",
}
"""Dotted key -> what replaced it."""
