"""Products over few-bit weights, for a runtime that has no good kernel for them: WebAssembly.

There onnxruntime unpacks the whole weight of a `MatMulNBits` at every token, which takes ten times as long as
the product itself. `unfold` writes standard operators instead, between the stored integers and a plain
`MatMul`:

    bytes -> integers -> turned to [groups, group, out] -> fp32 (q - zero point) * scale -> [in, out]

All of it but the product is constant, so onnxruntime computes it once, when it opens the graph: the download
stays small, decoding is as fast as in fp32, and memory is that of fp32. No session option is needed. The
stored bytes are those that the packed product reads. What level 4 (`accuracy_level`) rounds to int8 is
multiplied in fp32 here.

Folding keeps every step's result of every weight until all are folded: five times the fp32 weights. So the
weights are folded in `STAGES`, each after the last one's leftovers are gone. What makes a stage wait is a
shape that it needs, and that depends on a `Dropout` in a branch of an `If`: onnxruntime takes the branch when
the condition is known, and drops the Dropout one round later, when the next condition becomes known. A
runtime that does not is slow and right: the number that passes through is always 0.

Left out: the type UINT4, which would unpack itself, as WebAssembly has no kernel that casts it
(onnxruntime-web 1.31).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedisp.core.errors import BadInput

STAGES = 8  # onnxruntime goes over a graph at most 10 times
PACKED = ("MatMulNBits",)
GATE = "unfold.gate"
PAGE_BYTES = 200_000_000


def holds_packed_products(graph: GraphProto) -> bool:
    """Whether a product of the graph reads its weight packed."""
    return any(node.op_type in PACKED for node in graph.node)


def expected_bytes(graph: GraphProto, stored_bytes: int) -> int:
    """About the most memory that a page needs to open the graph unfolded.

    The file twice (as it came, and in the runtime), the fp32 weights, and what one stage leaves behind, four
    times its weights; a fifth more for gaps, and the page itself. SmolLM2-135M: 1.6 GB; measured were
    1.7 in 6 stages and 1.6 in 9.
    """
    sizes = [_size(node) for node in graph.node if node.op_type in PACKED]
    stage = max([sum(sizes) / STAGES, *sizes], default=0)
    return int(1.2 * (2 * stored_bytes + 4 * sum(sizes) + 16 * stage)) + PAGE_BYTES


def unfold(model: ModelProto) -> None:
    """Change the graph in place: every `MatMulNBits` becomes a `MatMul` over constants.

    BadInput for a product that cannot be written so: inputs besides weight, scales and zero points.
    """
    graph = model.graph
    products = [node for node in graph.node if node.op_type in PACKED]
    for node in products:
        _refuse(node)
    stages = _stages(products)
    weights = _Weights(graph)
    nodes = weights.gates(max(stages.values(), default=0))
    for node in graph.node:
        nodes += weights.product(node, stages[node.output[0]]) if node.op_type in PACKED else [node]
    _put(graph, nodes, list(weights.made.values()))


def _stages(products: Sequence[NodeProto]) -> dict[str, int]:
    """Output of a product -> its stage; about as many weight values in each, the largest weights first: what
    those leave behind has room for the others."""
    total, before, stages = sum(map(_size, products)), 0, {}
    for node in sorted(products, key=_size, reverse=True):
        stages[node.output[0]] = before * STAGES // total
        before += _size(node)
    return stages


def _refuse(node: NodeProto) -> None:
    if any(node.input[4:]):
        raise BadInput(
            f"{node.name}: a MatMulNBits with more inputs than weight, scales and zero points cannot be "
            "written for a browser"
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
        gate = self._constant(f"{GATE}_0.float", np.array(0, np.float32))
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
            gate = self._add("If", [known], f"{name}.float", **branches)
            self._add("Cast", [gate], name, to=TensorProto.INT64)
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
        each = self._constant(f"unfold.each_{groups}_{rows}", np.array([groups, 1, 1, rows], np.int64))
        values = self._unpacked(data, own, bits, stage, [1, rows, groups, group * bits // 8])
        zeros = self._zero_points(zero_points, f"{own}.zeros", bits, stage, rows, each)
        turned = self._add("Transpose", [scales], f"{own}.scales_turned", perm=[1, 0])
        scale = self._add("Reshape", [turned, each], f"{own}.scales")
        values = self._add("Sub", [values, zeros], f"{own}.centered")
        values = self._add("Mul", [values, scale], f"{own}.scaled")
        weight = self._matrix(values, own, columns, rows, groups * group)
        self._nodes.append(
            helper.make_node("MatMul", [node.input[0], weight], list(node.output), name=node.name)
        )
        return self._nodes

    def _zero_points(
        self, stored: Sequence[str], own: str, bits: int, stage: int, rows: int, each: str
    ) -> str:
        """fp32 of shape `each`, or the middle of the range where none are stored."""
        if not stored:
            return self._constant(f"unfold.middle_{bits}", np.array(2.0 ** (bits - 1), np.float32))
        groups = int(numpy_helper.to_array(self.made[each])[0])
        width = -(-groups * bits // 8)
        values = self._unpacked(stored[0], own, bits, stage, [1, rows, width, 1])
        values = self._matrix(values, f"{own}.all", groups, rows, width * 8 // bits)
        return self._add("Reshape", [values, each], f"{own}.each")

    def _unpacked(self, packed: str, own: str, bits: int, stage: int, shape: list[int]) -> str:
        """Stored bytes [1, rows, a, b] -> fp32 [a, b, values in a byte, rows], constant from `stage` on."""
        while packed not in self._stored:
            packed = self._makers[packed].input[0]  # an Identity, or the Reshape of a tied embedding
        known = self._constant(f"unfold.shape_{'_'.join(map(str, shape))}", np.array(shape, np.int64))
        if stage > 0:
            known = self._add("Add", [known, f"{GATE}_{stage}"], f"{own}.shape")
        planes = [self._add("Reshape", [packed, known], f"{own}.bytes")]
        if bits < 8:  # the low bits come first
            mask = self._constant(f"unfold.mask_{bits}", np.array(2**bits - 1, np.uint8))
            places = [self._constant(f"unfold.place_{k}", np.array(k, np.uint8)) for k in range(0, 8, bits)]
            moved = [self._add("BitShift", [*planes, k], f"{own}.{k}", direction="RIGHT") for k in places[1:]]
            pieces = [*planes, *moved]
            planes = [self._add("BitwiseAnd", [piece, mask], f"{piece}.low") for piece in pieces[:-1]]
            planes.append(pieces[-1])
        joined = self._add("Concat", planes, f"{own}.joined", axis=0)
        turned = self._add("Transpose", [joined], f"{own}.turned", perm=[2, 3, 0, 1])
        return self._add("Cast", [turned], f"{own}.float", to=TensorProto.FLOAT)

    def _matrix(self, values: str, own: str, count: int, rows: int, held: int) -> str:
        """fp32 [count, rows] of `held` * rows values; what fills the last group or byte is cut off."""
        shape = self._constant(f"unfold.shape_{held}_{rows}", np.array([held, rows], np.int64))
        if count == held:
            return self._add("Reshape", [values, shape], own)
        values = self._add("Reshape", [values, shape], f"{own}.held")
        limits = [self._constant(f"unfold.integer_{value}", np.array([value])) for value in (0, count)]
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
