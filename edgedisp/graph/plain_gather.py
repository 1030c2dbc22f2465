"""`GatherBlockQuantized` in standard operators: for runtimes that have no kernel for it.

The embedding's rows are taken packed, unpacked, and scaled: (q - zero point) * scale, the same numbers bit
for bit. Nothing becomes larger in the file: weights, scales and zero points are read where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper


def plain_gathers(graph: GraphProto) -> None:
    """Replace every `GatherBlockQuantized` by standard operators, in place: rows, unpack, (q - z) * scale."""
    nodes: list[NodeProto] = []
    made: dict[str, TensorProto] = {}
    for node in graph.node:
        nodes += _plain_gather(graph, node, made) if node.op_type == "GatherBlockQuantized" else [node]
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(made.values())


def _plain_gather(graph: GraphProto, node: NodeProto, made: dict[str, TensorProto]) -> list[NodeProto]:
    """Rows of packed bytes [..., groups * group * bits / 8] -> fp32 [..., groups * group]."""
    options = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    bits, group = int(options.get("bits", 4)), int(options["block_size"])
    data, ids, scales, *zero_points = [name for name in node.input if name]
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    stored = {cast.output[0]: cast.input[0] for cast in graph.node if cast.op_type == "Cast"}
    groups = shapes[stored.get(scales, scales)][1]
    name, steps = node.output[0], []

    def add(op: str, inputs: Sequence[str], part: str, **attributes: Any) -> str:
        output = name if part == "" else f"{name}.plain.{part}"
        steps.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def constant(part: str, values: NDArray[Any]) -> str:
        own = f"{name}.plain.{part}"
        made[own] = numpy_helper.from_array(values, own)
        return own

    def unpacked(packed: str, part: str, count: int) -> str:
        """Bytes -> fp32 values, the low bits first; `count` a row, what fills the last byte cut off."""
        values = packed
        if bits < 8:
            mask = constant("mask", np.array(2**bits - 1, np.uint8))
            axis = constant("last_axis", np.array([-1], np.int64))
            pieces = []
            for place in range(8 // bits):
                shift = constant(f"shift_{place}", np.array(place * bits, np.uint8))
                moved = add("BitShift", [packed, shift], f"{part}.moved_{place}", direction="RIGHT")
                low = add("BitwiseAnd", [moved, mask], f"{part}.low_{place}")
                pieces.append(add("Unsqueeze", [low, axis], f"{part}.piece_{place}"))
            joined = add("Concat", pieces, f"{part}.joined", axis=-1)
            flat = constant("flat", np.array([0, 0, -1], np.int64))
            values = add("Reshape", [joined, flat], f"{part}.values")
            limits = [("start", 0), ("end", count), ("axis", -1)]
            cut = [constant(f"{part}.{word}", np.array([value], np.int64)) for word, value in limits]
            values = add("Slice", [values, *cut], f"{part}.counted")
        return add("Cast", [values], f"{part}.float", to=TensorProto.FLOAT)

    rows = unpacked(add("Gather", [data, ids], "rows", axis=0), "rows", groups * group)
    blocks = constant("blocks", np.array([0, 0, groups, group], np.int64))
    each = constant("each", np.array([0, 0, groups, 1], np.int64))
    grouped = add("Reshape", [rows, blocks], "grouped")
    scale = add("Reshape", [add("Gather", [scales, ids], "scale", axis=0), each], "scales")
    if zero_points:
        taken = add("Gather", [zero_points[0], ids], "zeros", axis=0)
        zero = add("Reshape", [unpacked(taken, "zeros", groups), each], "zero_points")
    else:
        zero = constant("middle", np.array(2.0 ** (bits - 1), np.float32))
    scaled = add("Mul", [add("Sub", [grouped, zero], "centered"), scale], "scaled")
    add("Reshape", [scaled, constant("whole", np.array([0, 0, groups * group], np.int64))], "")
    return steps
