"""What is recorded of a rewritten bundle: bytes, error and choice of each weight, and bytes by component."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from onnx import GraphProto, TensorProto

from edgedisp.quantize.assignment import Choice
from edgedisp.quantize.grid import Packed

# The first word found in a tensor's name tells its component; the genai builder uses the same words.
COMPONENTS = (
    ("norm", "norm"),
    ("lm_head", "head"),
    ("position", "positions"),
    ("_cache", "positions"),
    ("embed", "embedding"),
    ("attn", "attention"),
    ("mlp", "mlp"),
)


def component(name: str) -> str:
    """The part of the model that a tensor belongs to; `other` where its name does not say."""
    return next((part for word, part in COMPONENTS if word in name), "other")


def tensor_row(
    name: str,
    packed: Packed,
    choice: Choice,
    calibrated: bool,
    squared_error: float,
    squared_norm: float,
) -> dict[str, Any]:
    """One weight. `calibrated`: its blocks came from outside; relative_error is |w' - w| / |w|."""
    parameters = packed.rows * packed.columns
    return {
        "name": name,
        "component": component(name),
        "shape": [packed.rows, packed.columns],
        "bits": choice.grid.bits,
        "group": choice.grid.group,
        "symmetric": choice.grid.symmetric,
        "method": choice.method,
        "calibrated": calibrated,
        "accuracy_level": choice.accuracy_level,
        "size_bytes": packed.size_bytes,
        "mean_squared_error": squared_error / parameters,
        "relative_error": (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0,
    }


def by_component(rows: Iterable[dict[str, Any]], graph: GraphProto) -> dict[str, dict[str, int]]:
    """Bytes stored and values they stand for. Quantized weights count with their scales and zero points."""
    sizes: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for row in rows:
        sizes[row["component"]] += row["size_bytes"]
        parameters[row["component"]] += row["shape"][0] * row["shape"][1]
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and not tensor.name.endswith(".scales"):
            values = int(np.prod(tensor.dims))
            sizes[component(tensor.name)] += 4 * values
            parameters[component(tensor.name)] += values
    return {name: {"size_bytes": sizes[name], "parameters": parameters[name]} for name in sorted(sizes)}
