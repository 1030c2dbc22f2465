"""What writing and rewriting graphs share: file names, where weights lie in their file, new nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

GRAPH, DATA = "model.onnx", "model.onnx.data"
MICROSOFT = "com.microsoft"
PAGE = 4096  # weights start at multiples of it in their file, so that a runtime can map them

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits")
"""Operators that may multiply with a weight."""


class NewNodes:
    """New nodes and constants for an onnx-ir graph; names of nodes start with `prefix`."""

    def __init__(self, graph: ir.Graph, prefix: str = "") -> None:
        self.graph, self.prefix = graph, prefix
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """Add a node of a standard operator with one output, which it returns; both are called `name`."""
        output = ir.Value(name=f"{self.prefix}{name}")
        converted = ir.convenience.convert_attributes(attributes)
        self.nodes.append(ir.Node("", op_type, inputs, converted, outputs=[output], name=output.name))
        return output

    def constant(self, name: str, values: NDArray[Any] | int | Sequence[int]) -> ir.Value:
        """The initializer `name`, made where there is none; plain numbers become int64."""
        if name not in self.graph.initializers:
            tensor = ir.Tensor(
                values if isinstance(values, np.ndarray) else np.array(values, np.int64), name=name
            )
            value = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def replace(self, node: ir.Node) -> None:
        """Put the new nodes in the place of `node`; the last one's output takes over name and readers."""
        ir.convenience.replace_nodes_and_values(
            self.graph, node, [node], self.nodes, node.outputs, self.nodes[-1].outputs
        )


def remove_unused(model: ir.Model) -> None:
    """Drop nodes and weights that no output needs; shapes that were noted are forgotten."""
    RemoveUnusedNodesPass()(model)
    forget_shapes(model.graph)


def forget_shapes(graph: ir.Graph) -> None:
    """Take noted shapes off the values between the nodes: after a rewrite some are others."""
    outputs = set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = value.type = None


def to_bytes(model: ir.Model) -> bytes:
    """The graph as a file's content; weights stay in their file."""
    return ir.to_proto(model).SerializeToString()


def find_head(graph: ir.Graph) -> ir.Node | None:
    """The product nearest to `logits`: the output head. Between them may be a soft cap, a bias or a cast."""
    waiting = [value.producer() for value in graph.outputs if value.name == "logits"]
    seen: set[ir.Node] = set()
    while waiting:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        if node.op_type in PRODUCTS:
            return node
        seen.add(node)
        waiting += [value.producer() for value in node.inputs if value is not None]
    return None
