"""Finds the weights of a graph that can be quantized, and the nodes that read them.

A weight qualifies when it is a constant fp32 matrix that is read by matrix products and by the embedding's
gather alone. Whatever else reads it would need it in fp32 beside the packed form, so it then stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import GraphProto, NodeProto, TensorProto, helper


@dataclass(frozen=True)
class Use:
    """A node that reads a weight: it looks rows up (`gather`) or multiplies."""

    index: int  # of the node in the graph
    gather: bool
    rows_first: bool  # the weight is stored as [out, in], else as [in, out]


def find_uses(graph: GraphProto) -> dict[str, list[Use]]:
    """Weight name -> its readers. A constant `Transpose` in between is looked through (genai's builder)."""
    matrices = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    known_as = {name: (name, True) for name in matrices}  # value -> its weight, and whether it is as stored
    uses: dict[str, list[Use]] = {}
    other: set[str] = set()
    for index, node in enumerate(graph.node):
        if node.op_type == "Transpose" and node.input[0] in matrices:
            known_as[node.output[0]] = (node.input[0], False)
            continue
        for position, value in enumerate(node.input):
            if value not in known_as:
                continue
            weight, as_stored = known_as[value]
            rows_first = _rows_first(node, position)
            if rows_first is None:
                other.add(weight)
            else:
                use = Use(index, node.op_type == "Gather", rows_first == as_stored)
                uses.setdefault(weight, []).append(use)
    return {
        name: users
        for name, users in uses.items()
        if name not in other and len({use.rows_first for use in users}) == 1
    }


def head_name(uses: dict[str, list[Use]]) -> str | None:
    """The weight of the last product, which makes a decoder's logits; None without any product."""
    products = [(use.index, name) for name, users in uses.items() for use in users if not use.gather]
    return max(products)[1] if products else None


def _rows_first(node: NodeProto, position: int) -> bool | None:
    """How the node reads input `position`: as [out, in] (True), [in, out] (False), not as a weight (None)."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Gather":
        embeds = position == 0 and attributes.get("axis", 0) == 0 and node.input[1] == "input_ids"
        return True if embeds else None
    if position != 1:
        return None
    if node.op_type == "MatMul":
        return False
    scaled = attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0
    turned = any(attributes.get(name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    if node.op_type in ("FusedMatMul", "Gemm") and not scaled and not turned:
        return bool(attributes.get("transB", 0))
    return None
