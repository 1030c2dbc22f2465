"""Products over few-bit weights, for a runtime that has no good kernel for them: WebAssembly.

There onnxruntime unpacks the whole weight of a `MatMulNBits` at every token, which takes ten times as long as
the product itself. `unfold` writes standard operators instead, between the stored integers and a plain
`MatMul`:

    integers [out, in] -> fp32 [out, groups, group] -> (q - zero point) * scale -> [in, out] -> MatMul

All of it but the product is constant, so onnxruntime computes it once, when it opens the graph: the download
stays small, decoding is as fast as in fp32, and memory is that of fp32. No session option is needed. The
integers are read where they lie: a tensor of type UINT4 names the same bytes of the file as the packed one.
What level 4 rounds to int8 (`accuracy_level`) is multiplied in fp32 here.

Folding keeps every step's result of every weight until all are folded: five times the fp32 weights. So the
weights are folded in `STAGES`, each after the last one's leftovers are gone. What makes a stage wait is a
number that its shapes depend on: `Dropout` in a branch of an `If`. onnxruntime takes the branch when the
condition is known and drops the Dropout one round later, which is when the next condition becomes known. A
runtime that does not is slow and right: all the numbers are 0.

Left out: 2 bits, which no recipe asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedisp import BadInput

STAGES = 4  # onnxruntime goes over a graph at most 10 times; more stages save little
PACKED = ("MatMulNBits", "MatMulBnb4")
GATE = "unfold.gate"
INTEGERS = {4: TensorProto.UINT4, 8: TensorProto.UINT8}


def holds_packed_products(graph: GraphProto) -> bool:
    """Whether a product of the graph reads its weight packed."""
    return any(node.op_type in PACKED for node in graph.node)


def expected_bytes(graph: GraphProto, stored_bytes: int) -> int:
    """About the most memory that a page needs to open the graph unfolded: the file twice (as it came, and in
    the runtime), the fp32 weights, and what one stage leaves behind, four times its weights."""
    sizes = [_size(node) for node in graph.node if node.op_type in PACKED]
    stage = max([sum(sizes) / STAGES, *sizes], default=0)
    return int(2 * stored_bytes + 4 * sum(sizes) + 16 * stage)


def unfold(model: ModelProto) -> None:
    """Change the graph in place: every `MatMulNBits` becomes a `MatMul` over constants.

    BadInput for a product that cannot be written so: NF4, or other bits than 4 and 8.
    """
    graph = model.graph
    products = [node for node in graph.node if node.op_type in PACKED]
    for node in products:
        _refuse(node)
    sizes = [_size(node) for node in products]
    before = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
    stages = {node.output[0]: int(start) * STAGES // sum(sizes) for node, start in zip(products, before)}
    weights = _Weights(graph)
    nodes = weights.gates(max(stages.values(), default=0))
    for node in graph.node:
        nodes += weights.product(node, stages[node.output[0]]) if node.op_type in PACKED else [node]
    _put(graph, nodes, list(weights.made.values()))


def _refuse(node: NodeProto) -> None:
    if node.op_type != "MatMulNBits":
        raise BadInput(
            f"{node.name}: NF4 weights ({node.op_type}) have no form that a browser computes at useful "
            "speed; export with another method than nf4"
        )
    bits = _attributes(node).get("bits", 4)
    if bits not in INTEGERS or any(node.input[4:]):
        raise BadInput(
            f"{node.name}: MatMulNBits of {bits} bits, or with more inputs than weight, scales and zero "
            "points, cannot be written for a browser; 4 and 8 bits can"
        )


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _size(node: NodeProto) -> int:
    """Weight values of a product."""
    given = _attributes(node)
    return int(given["K"]) * int(given["N"])


class _Weights:
    """Writes the nodes that make fp32 weights; `made` are initializers that they need besides the graph's."""

    def __init__(self, graph: GraphProto) -> None:
        self.made: dict[str, TensorProto] = {}
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {output: node for node in graph.node for output in node.output}
        self._nodes: list[NodeProto] = []

    def gates(self, last: int) -> list[NodeProto]:
        """Nodes that make a 0 for each stage up to `last`, each known one round after the one before."""
        self._nodes = []
        gate = self._constant(f"{GATE}_0", np.array(0, np.float32))
        for stage in range(1, last + 1):
            name = f"{GATE}_{stage}"
            branches = {
                branch: helper.make_graph(
                    [helper.make_node("Dropout", [gate], [f"{name}.{branch}"])],
                    f"{name}.{branch}",
                    [],
                    [helper.make_tensor_value_info(f"{name}.{branch}", TensorProto.FLOAT, [])],
                )
                for branch in ("then_branch", "else_branch")
            }
            known = self._add("Cast", [gate], f"{name}.known", to=TensorProto.BOOL)
            gate = self._add("If", [known], name, **branches)
            self._add("Cast", [gate], f"{name}.integer", to=TensorProto.INT64)
        return self._nodes

    def product(self, node: NodeProto, stage: int) -> list[NodeProto]:
        """`MatMulNBits` -> the nodes of the same product with a weight unfolded in `stage`."""
        self._nodes = []
        given = _attributes(node)
        columns, rows, bits = int(given["K"]), int(given["N"]), int(given.get("bits", 4))
        group = int(given["block_size"])
        groups = -(-columns // group)
        data, scales, *zero_points = (name for name in node.input[1:] if name)
        own = f"{node.output[0]}.unfolded"
        wide = self._integers(data, own, bits, [rows, groups * group])
        shape = self._shape([rows, groups, group])
        if stage > 0:
            shape = self._add("Add", [shape, f"{GATE}_{stage}.integer"], f"{own}.shape")
        if bits < 8:  # no kernel reshapes UINT4
            wide = self._add("Cast", [wide], f"{own}.bytes", to=TensorProto.UINT8)
        values = self._add("Reshape", [wide, shape], f"{own}.grouped")
        values = self._add("Cast", [values], f"{own}.float", to=TensorProto.FLOAT)
        zeros = self._zero_points(zero_points, f"{own}.zeros", bits, rows, groups)
        each = self._shape([rows, groups, 1])
        scale = self._add("Reshape", [scales, each], f"{own}.scales")
        values = self._add("Sub", [values, zeros], f"{own}.centered")
        values = self._add("Mul", [values, scale], f"{own}.scaled")
        values = self._add("Reshape", [values, self._shape([rows, groups * group])], f"{own}.rows")
        values = self._cut(values, f"{own}.cut", columns, groups * group)
        values = self._add("Transpose", [values], own, perm=[1, 0])
        self._nodes.append(
            helper.make_node("MatMul", [node.input[0], values], list(node.output), name=node.name)
        )
        return self._nodes

    def _zero_points(self, stored: Sequence[str], own: str, bits: int, rows: int, groups: int) -> str:
        """fp32 [rows, groups, 1], or the middle of the range where none are stored."""
        if not stored:
            return self._constant(f"unfold.middle_{bits}", np.array(2.0 ** (bits - 1), np.float32))
        held = groups + groups % (8 // bits)  # a row fills whole bytes
        values = self._integers(stored[0], own, bits, [rows, held])
        values = self._add("Cast", [values], f"{own}.float", to=TensorProto.FLOAT)
        values = self._cut(values, f"{own}.cut", groups, held)
        return self._add("Reshape", [values, self._shape([rows, groups, 1])], f"{own}.grouped")

    def _integers(self, packed: str, own: str, bits: int, shape: list[int]) -> str:
        """The stored tensor behind `packed`, as integers of `bits` bits: the same bytes."""
        while packed not in self._stored:
            packed = self._makers[packed].input[0]  # an Identity, or the Reshape of a tied embedding
        tensor = TensorProto()
        tensor.CopyFrom(self._stored[packed])
        tensor.name, tensor.data_type = f"{own}.integers", INTEGERS[bits]
        tensor.dims[:] = shape
        self.made[tensor.name] = tensor
        return tensor.name

    def _shape(self, shape: list[int]) -> str:
        return self._constant(f"unfold.shape_{'_'.join(map(str, shape))}", np.array(shape, np.int64))

    def _cut(self, values: str, own: str, count: int, held: int) -> str:
        """The first `count` of the last axis."""
        if count == held:
            return values
        limits = [self._constant(f"unfold.integer_{value}", np.array([value])) for value in (0, count, -1)]
        return self._add("Slice", [values, *limits], own)

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        self.made[name] = numpy_helper.from_array(values, name)
        return name

    def _add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output


def _put(graph: GraphProto, nodes: Sequence[NodeProto], made: Sequence[TensorProto]) -> None:
    """The graph's new nodes, and of all initializers those that are read."""
    needed, kept = {output.name for output in graph.output}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(NodeProto.FromString(node.SerializeToString()))
    tensors = [tensor for tensor in [*graph.initializer, *made] if tensor.name in needed]
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors]
    for field in ("node", "initializer", "value_info"):
        graph.ClearField(field)
    graph.node.extend(reversed(kept))
    graph.initializer.extend(copies)
