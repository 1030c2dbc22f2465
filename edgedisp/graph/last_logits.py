"""The head for the last token alone: what a device needs, and a fifth of a prompt's work less.

To go on with a text, only the logits after its last token are used. The head is the widest product of a small
model (SmolLM2-135M: 28 of 135M weights), and with a prompt of 128 tokens it makes 25 MB of logits that nobody
reads. `keep_last` puts a gather before the head: it takes each row's last real token, so right-padded
batches work as they did, and so does decoding, where a row has one new token. The output is
[batch, 1, vocab], which onnxruntime-genai, transformers.js and optimum take for generation.

A bundle of the run keeps all its logits, as scoring needs them; the one that is packed for a device does not.
Whoever wrote the graph, the head is the last product on the way to the logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from edgedisp.core.errors import BadInput

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits")
PREFIX = "last_token"
LAST_HIDDEN = f"{PREFIX}.hidden"


def keep_last(model: ModelProto) -> None:
    """Change the graph in place: `logits` become [batch, 1, vocab], of each row's last real token.

    BadInput where no head is found, or where the graph does so already.
    """
    graph = model.graph
    logits = next((value for value in graph.output if value.name == "logits"), None)
    head = None if logits is None else head_of(graph)
    if logits is None or head is None:
        raise BadInput("the graph makes no logits out of a product with the head's weights")
    if any(node.name.startswith(f"{PREFIX}.") for node in graph.node):
        raise BadInput("the graph keeps the last token's logits alone already")
    at = list(graph.node).index(head)
    before = [*_last_position(graph), *_gathered(graph, head.input[0])]
    head.input[0] = LAST_HIDDEN
    nodes = [*list(graph.node)[:at], *before, *list(graph.node)[at:]]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    del graph.value_info[:]  # shapes behind the gather are others now
    logits.type.tensor_type.shape.dim[1].Clear()
    logits.type.tensor_type.shape.dim[1].dim_value = 1


def head_of(graph: GraphProto) -> NodeProto | None:
    """The product nearest to the logits; between them there may be a soft cap, a bias or a cast."""
    makers = {output: node for node in graph.node for output in node.output}
    seen, waiting = set(), ["logits"]
    while waiting:
        node = makers.get(waiting.pop(0))
        if node is None or id(node) in seen:
            continue
        if node.op_type in PRODUCTS:
            return node
        seen.add(id(node))
        waiting += node.input
    return None


def _last_position(graph: GraphProto) -> list[NodeProto]:
    """Nodes that find, among the new tokens of each row, the last real one: int64 [batch, 1].

    real tokens - 1 counts from the start of the row, cached tokens included; a padded row that decodes may
    have fewer than there are in the cache, and then its one new token is meant.
    """
    _constant(graph, "axis", [1])
    _constant(graph, "zero", 0)
    _constant(graph, "one", 1)
    return [
        _node("ReduceSum", ["attention_mask", f"{PREFIX}.axis"], "real", keepdims=1),
        _node("Shape", ["attention_mask"], "mask_shape"),
        _node("Gather", [f"{PREFIX}.mask_shape", f"{PREFIX}.one"], "total", axis=0),
        _node("Shape", ["input_ids"], "ids_shape"),
        _node("Gather", [f"{PREFIX}.ids_shape", f"{PREFIX}.one"], "new", axis=0),
        _node("Sub", [f"{PREFIX}.new", f"{PREFIX}.total"], "less_cached"),
        _node("Add", [f"{PREFIX}.real", f"{PREFIX}.less_cached"], "count"),
        _node("Sub", [f"{PREFIX}.count", f"{PREFIX}.one"], "index_or_negative"),
        _node("Max", [f"{PREFIX}.index_or_negative", f"{PREFIX}.zero"], "index"),
    ]


def _gathered(graph: GraphProto, hidden: str) -> list[NodeProto]:
    """hidden [batch, tokens, features] -> [batch, 1, features]."""
    _constant(graph, "last_axis", [-1])
    return [
        _node("Unsqueeze", [f"{PREFIX}.index", f"{PREFIX}.last_axis"], "indices"),
        _node("GatherND", [hidden, f"{PREFIX}.indices"], "hidden", batch_dims=1),
    ]


def _node(op: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    name = f"{PREFIX}.{output}"
    return helper.make_node(op, inputs, [name], name=name, **attributes)


def _constant(graph: GraphProto, name: str, value: int | list[int]) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), f"{PREFIX}.{name}"))
