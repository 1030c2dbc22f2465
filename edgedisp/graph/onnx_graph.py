"""What writing and rewriting graphs share: names of files and operators, stored weights, new nodes, finding
the head and the hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

GRAPH, DATA = "model.onnx", "model.onnx.data"
MICROSOFT = "com.microsoft"
PAGE = 4096  # weights start at multiples of it in their file, so that a runtime can map them
INLINE_BYTES = 1024  # smaller tensors stay inside the graph file

ATTENTION = "GroupQueryAttention"
PACKED = "MatMulNBits"
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", PACKED)  # operators that may multiply with a weight
ADDING_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
NORMS = (*ADDING_NORMS, "SimplifiedLayerNormalization", "LayerNormalization", "RMSNormalization")
SUM = 3  # which output of an adding norm is the sum


class TensorStore:
    """The initializers of a graph that is being written; large ones go to page starts of the data file.

    onnx-ir is not used for this: it aligns only tensors above 1 MB, and phones map the file.
    """

    def __init__(self, output_dir: Path) -> None:
        self.tensors: dict[str, TensorProto] = {}
        self._path = output_dir / DATA
        self._path.touch()

    def add(self, name: str, values: NDArray[Any]) -> str:
        """Store `values` under `name`; returns the name."""
        array = np.ascontiguousarray(values)
        if array.nbytes <= INLINE_BYTES:
            self.tensors[name] = numpy_helper.from_array(array, name)
            return name
        with self._path.open("ab") as file:
            file.write(bytes(-file.tell() % PAGE))
            offset = file.tell()
            array.tofile(file)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", DATA), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.tensors[name] = tensor
        return name


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
            array = values if isinstance(values, np.ndarray) else np.array(values, np.int64)
            tensor = ir.Tensor(array, name=name)
            kind = ir.TensorType(tensor.dtype)
            value = ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def replace(self, node: ir.Node) -> None:
        """Put the new nodes in the place of `node`; the last one's output takes over name and readers."""
        ir.convenience.replace_nodes_and_values(
            self.graph, node, [node], self.nodes, node.outputs, self.nodes[-1].outputs
        )


def remove_unused(model: ir.Model) -> None:
    """Drop nodes and weights that no output needs, and noted shapes."""
    RemoveUnusedNodesPass()(model)
    forget_shapes(model.graph)


def forget_shapes(graph: ir.Graph) -> None:
    """Drop the noted shapes of values between the nodes: a rewrite changes some of them."""
    outputs = set(graph.outputs)
    for node in graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = value.type = None


def to_bytes(model: ir.Model) -> bytes:
    """The graph as a file's content; weights stay in their file."""
    return ir.to_proto(model).SerializeToString()


def move_weights(model: ir.Model, location: str, base_dir: Path) -> None:
    """Name another file, relative to `base_dir`, as that of the weights; it must have the same content."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                location, tensor.offset, tensor.length, tensor.dtype,
                shape=ir.Shape(tensor.shape), name=name, base_dir=base_dir,
            )  # fmt: skip


def find_head(graph: ir.Graph) -> ir.Node | None:
    """The product nearest to `logits`: the output head. Between them may be a soft cap, a bias or a cast."""
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    return next((node for node in _producers(logits) if node.op_type in PRODUCTS), None)


def _producers(value: ir.Value | None) -> Iterator[ir.Node]:
    """The nodes that `value` is computed by, the nearest first."""
    waiting, seen = [value], set[ir.Node]()
    while waiting:
        value = waiting.pop(0)
        node = value.producer() if value is not None else None
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += node.inputs


def hidden_states(graph: ir.Graph) -> list[ir.Value]:
    """The embedding's output, each layer's output, and the final normed state, in order; fewer where a norm
    cannot be found. An adding norm that does not write its sum is changed to write it.

    Values are found by what they do, not by names: the input of attention, or `logits`, comes from a product,
    which comes from a norm. What that norm reads, or the sum it writes beside the normed state, is the
    residual stream. Norms of queries and keys come after that product.
    """
    starts = [node.inputs[0] for node in graph if node.op_type == ATTENTION]
    starts += [value for value in graph.outputs if value.name == "logits"]
    states: list[ir.Value] = []
    norm = None
    for value in starts:
        nodes = dropwhile(lambda node: node.op_type not in PRODUCTS, _producers(value))
        norm = next((node for node in nodes if node.op_type in NORMS), None)
        if norm is None:
            return states
        states.append(_residual(norm))
    return states if norm is None else [*states, norm.outputs[0]]


def _residual(norm: ir.Node) -> Any:
    """The stream that a norm reads, summed."""
    if norm.op_type not in ADDING_NORMS:
        return norm.inputs[0]
    if len(norm.outputs) <= SUM:
        norm.resize_outputs(SUM + 1)
        for value in norm.outputs[1:]:
            value.name = value.name or ""
    total = norm.outputs[SUM]
    total.name = total.name or f"{norm.outputs[0].name}.stream"
    return total
