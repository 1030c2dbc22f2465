"""Which torch parameters each matrix of an fp32 bundle is made of: `weight_map.json` beside the graph.

    {initializer: {"torch": [parameter, ...], "transposed": bool, "rows": [int, ...], "tied_head": true}}

The parameters are concatenated along dimension 0, then `rows` (only where the order differs) picks rows, then
`transposed` says that the initializer is the transpose. `tied_head` marks the one matrix that is both
embedding and output head. Linear maps, embedding and head are listed: what a quantizer may pack.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnx import GraphProto

from edgedisp.graph.description import Decoder, Linear

WEIGHT_MAP = "weight_map.json"
WeightMap = dict[str, dict[str, Any]]

# What onnxruntime-genai's builder calls a linear map -> the torch modules that it may stand for.
BUILDER_NAMES = {
    "attn.qkv_proj": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.qkv_proj",),
    ),
    "attn.o_proj": (("self_attn.o_proj",), ("self_attn.dense",)),
}


def decoder_weights(decoder: Decoder, model: Any) -> WeightMap:
    """The map of the graph that decoder.py writes for `model`."""
    parameters = {parameter.data_ptr(): (name, parameter) for name, parameter in model.named_parameters()}

    def entry(linear: Linear) -> dict[str, Any]:
        found = [parameters[weight.data_ptr()] for weight in linear.weights]
        # Conv1D keeps [in, out], as the graph does; the description holds a transposed view of it.
        is_view = any(w.stride() != parameter.stride() for w, (_, parameter) in zip(linear.weights, found))
        rows = {} if linear.rows is None else {"rows": linear.rows.tolist()}
        return {"torch": [name for name, _ in found], "transposed": not is_view, **rows}

    embedding: dict[str, Any] = {"torch": [parameters[decoder.embedding.data_ptr()][0]], "transposed": False}
    if decoder.head is None:
        embedding["tied_head"] = True
    found = {"model.embed_tokens.weight": embedding}
    for layer in decoder.layers:
        found |= {f"{linear.name}.weight": entry(linear) for linear in layer.linears()}
    if decoder.head is not None:
        found["lm_head.weight"] = entry(Linear("lm_head", (decoder.head,)))
    return found


def builder_weights(graph: GraphProto, shapes: dict[str, tuple[int, ...]]) -> WeightMap:
    """The map of a graph that onnxruntime-genai's builder wrote for a model with parameters of `shapes`."""
    found: WeightMap = {}
    stored = {tensor.name for tensor in graph.initializer}
    embedding = "model.embed_tokens.weight"
    for name in stored & {embedding}:
        found[name] = {"torch": [embedding], "transposed": False}
    for name in stored & {"lm_head.MatMul.weight"}:
        is_tied = "lm_head.weight" not in shapes
        found[name] = {"torch": [embedding if is_tied else "lm_head.weight"], "transposed": True}
        if is_tied:
            found[name]["tied_head"] = True
    for name in sorted(stored):
        words = name.removesuffix(".MatMul.weight").split(".")
        if words[:2] == ["model", "layers"] and name.endswith(".MatMul.weight"):
            found[name] = _builder_linear(".".join(words[:3]), ".".join(words[3:]), shapes)
    return found


def _builder_linear(layer: str, linear: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """One linear map of one layer. Phi-3's gate and up are one torch parameter, which the builder cuts."""
    joined = f"{layer}.mlp.gate_up_proj.weight"
    if linear in ("mlp.gate_proj", "mlp.up_proj") and joined in shapes:
        half = shapes[joined][0] // 2
        first = 0 if linear == "mlp.gate_proj" else half
        return {"torch": [joined], "transposed": True, "rows": list(range(first, first + half))}
    for modules in BUILDER_NAMES.get(linear, ((linear.replace("attn.", "self_attn."),),)):
        names = [f"{layer}.{module}.weight" for module in modules]
        if all(name in shapes for name in names):
            return {"torch": names, "transposed": True}
    raise KeyError(f"{layer}.{linear}: no torch parameter is known for it")


def write(folder: Path, weights: WeightMap) -> None:
    """One line for each matrix."""
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in weights.items()]
    (folder / WEIGHT_MAP).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
