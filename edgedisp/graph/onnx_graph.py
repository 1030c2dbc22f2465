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
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgedisp.core.errors import BadInput

GRAPH, DATA = "model.onnx", "model.onnx.data"
WEIGHT_MAP = "weight_map.json"
MICROSOFT = "com.microsoft"
PAGE = 4096  # weights start at multiples of it in their file, so that a runtime can map them
INLINE_BYTES = 1024  # smaller tensors stay inside the graph file

EMBEDDING = "model.embed_tokens.weight"
ATTENTION = "GroupQueryAttention"
PACKED, PACKED_GATHER = "MatMulNBits", "GatherBlockQuantized"
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", PACKED)  # operators that may multiply with a weight
ADDING_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
NORMS = (*ADDING_NORMS, "SimplifiedLayerNormalization", "LayerNormalization", "RMSNormalization")
SUM = 3  # which output of an adding norm is the sum
# Operators that onnxruntime has besides the standard's; Gelu is in both.
FUSED = {ATTENTION, PACKED, PACKED_GATHER, "FusedMatMul", "FastGelu", "Gelu", "QuickGelu", *ADDING_NORMS}


class TensorStore:
    """The weights of a graph that is being written; large ones go to page starts of the data file.

    onnx-ir is not used for this: it aligns only tensors above 1 MB, and phones map the file.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        (output_dir / DATA).touch()

    def add(self, name: str, values: NDArray[Any]) -> ir.TensorProtocol:
        """The tensor for the initializer `name`."""
        tensor = ir.Tensor(np.ascontiguousarray(values), name=name)
        if tensor.nbytes <= INLINE_BYTES:
            return tensor
        with (self.output_dir / DATA).open("ab") as file:
            file.write(bytes(-file.tell() % PAGE))
            offset = file.tell()
            tensor.numpy().tofile(file)
        return ir.ExternalTensor(
            DATA, offset, tensor.nbytes, tensor.dtype,
            shape=ir.Shape(values.shape), name=name, base_dir=self.output_dir,
        )  # fmt: skip


class NewNodes:
    """New nodes and constants for a graph; names of nodes start with `prefix`.

    store: where constants go; None: into the graph file.
    """

    def __init__(self, graph: ir.Graph, prefix: str = "", store: TensorStore | None = None) -> None:
        self.graph, self.prefix, self.store = graph, prefix, store
        self.nodes: list[ir.Node] = []

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, *others: str, **attributes: Any
    ) -> ir.Value:
        """Add a node with outputs `name` and `others` ("": none); it is called like the first, which is
        returned."""
        outputs = [ir.Value(name=f"{self.prefix}{output}" if output else "") for output in (name, *others)]
        domain = MICROSOFT if op_type in FUSED else ""
        self.graph.opset_imports.setdefault(domain, 1)
        node = ir.node(op_type, inputs, attributes, domain=domain, outputs=outputs, name=outputs[0].name)
        self.nodes.append(node)
        return outputs[0]

    def constant(self, name: str, values: NDArray[Any] | int | Sequence[int]) -> ir.Value:
        """The initializer `name`, made where there is none; plain numbers become int64."""
        if name not in self.graph.initializers:
            array = values if isinstance(values, np.ndarray) else np.array(values, np.int64)
            tensor = self.store.add(name, array) if self.store else ir.Tensor(array, name=name)
            self.graph.register_initializer(ir.val(name, const_value=tensor))
        return self.graph.initializers[name]

    def replace(self, node: ir.Node) -> None:
        """Put the new nodes in the place of `node`; the last one's output takes over name and readers."""
        ir.convenience.replace_nodes_and_values(
            self.graph, node, [node], self.nodes, node.outputs, self.nodes[-1].outputs
        )


def read_graph(path: Path) -> ir.Model:
    """The graph of a file; weights stay in theirs. BadInput where there is none."""
    if not path.is_file():
        raise BadInput(f"{path.parent}: no bundle ({path.name} is missing); `edgedisp export` makes one")
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's errors have no base class that it promises
        raise BadInput(f"{path}: is no ONNX graph, or a damaged one; export it again ({error})") from error


def to_bytes(model: ir.Model) -> bytes:
    """The graph as a file's content, without nodes and weights that no output needs, and without the shapes
    of inner values, as rewriting changes some. Weights stay in their file."""
    RemoveUnusedNodesPass()(model)
    outputs = set(model.graph.outputs)
    for value in [*model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]:
        if value not in outputs:
            value.shape = value.type = None
    return ir.to_proto(model).SerializeToString()


def move_weights(model: ir.Model, location: str) -> None:
    """Name another file as that of the weights; it must have the same content."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                location, tensor.offset, tensor.length, tensor.dtype, shape=ir.Shape(tensor.shape), name=name
            )


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
    """The embedding's output and each layer's, the last one's after the final norm; fewer where a norm is not
    found. An adding norm that does not write its sum is changed to write it.

    Values are found by what they do, not by names: the input of attention, or `logits`, comes from a product,
    which comes from a norm. What that norm reads, or the sum it writes beside the normed state, is the
    residual stream. Norms of queries and keys come after that product.
    """
    logits = [value for value in graph.outputs if value.name == "logits"]
    states: list[Any] = []
    for value in [*(node.inputs[0] for node in graph if node.op_type == ATTENTION), *logits]:
        nodes = dropwhile(lambda node: node.op_type not in PRODUCTS, _producers(value))
        norm = next((node for node in nodes if node.op_type in NORMS), None)
        if norm is None:
            return states
        states.append(norm.outputs[0] if value in logits else _residual(norm))
    return states


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
