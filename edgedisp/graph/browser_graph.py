"""A graph for WebAssembly: products over few-bit weights unfolded, embeddings read with standard operators.

onnxruntime-web unpacks the whole weight of a `MatMulNBits` at every token, ten times the product's time, and
has no kernel for `GatherBlockQuantized`. `unfold` writes constant nodes that onnxruntime folds once when it
opens the graph: bytes -> integers -> fp32 (q - zero point) * scale -> MatMul. The download stays small.

Folding keeps every step's result until all weights are folded, five times the fp32 weights. So weights are
folded in `STAGES`. A stage waits for a shape that depends on a `Dropout` in a branch of an `If`: onnxruntime
takes the branch when the condition is known, and drops the Dropout one round later. A runtime that does not
is slow and right: the number that passes through is always 0. Type UINT4 has no cast in WebAssembly (1.31).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgedisp.core.errors import BadInput
from edgedisp.graph.onnx_graph import PACKED, NewNodes, remove_unused

STAGES = 8  # onnxruntime goes over a graph at most 10 times
GATE = "unfold.gate"
PAGE_BYTES = 200_000_000


def has_packed_products(graph: ir.Graph) -> bool:
    """Whether a product of the graph reads its weight packed."""
    return any(node.op_type == PACKED for node in graph)


def expected_bytes(graph: ir.Graph, stored_bytes: int) -> int:
    """About the most memory that a page needs to open the graph unfolded.

    The file twice (download and runtime), the fp32 weights, and what one stage leaves behind, four times its
    weights; a fifth more for gaps, and the page itself. SmolLM2-135M: 1.6 GB; measured 1.6 to 1.7.
    """
    sizes = [_size(node) for node in graph if node.op_type == PACKED]
    stage = max([sum(sizes) / STAGES, *sizes], default=0)
    return int(1.2 * (2 * stored_bytes + 4 * sum(sizes) + 16 * stage)) + PAGE_BYTES


def unfold(model: ir.Model) -> None:
    """Change the graph in place: every `MatMulNBits` becomes a `MatMul` over constants.

    BadInput for a product with inputs besides weight, scales and zero points.
    """
    graph = model.graph
    products = [node for node in graph if node.op_type == PACKED]
    stages = _stages(products)
    gates = _gates(graph, max(stages.values(), default=0))
    for node in products:
        if any(value is not None for value in node.inputs[4:]):
            raise BadInput(
                f"{node.name}: a MatMulNBits with more inputs than weight, scales and zero points cannot be "
                "written for a browser"
            )
        new = _Unpacked(graph, node, ".unfolded")
        new.product(node, gates[stages[node]])
        new.replace(node)
    remove_unused(model)


def _size(node: ir.Node) -> int:
    """Weight values of a product."""
    return node.attributes["K"].as_int() * node.attributes["N"].as_int()


def _stages(products: Sequence[ir.Node]) -> dict[ir.Node, int]:
    """Stage of each product; about as many weight values in each, the largest weights first."""
    total, before, stages = sum(map(_size, products)), 0, {}
    for node in sorted(products, key=_size, reverse=True):
        stages[node] = before * STAGES // total
        before += _size(node)
    return stages


def _gates(graph: ir.Graph, last: int) -> list[ir.Value | None]:
    """int64 0 for each stage up to `last`, each known one round after the one before; None for stage 0."""
    new = NewNodes(graph)
    gates: list[ir.Value | None] = [None]
    gate = new.constant(f"{GATE}_0.float", np.array(0, np.float32))
    for stage in range(1, last + 1):
        name = f"{GATE}_{stage}"
        branches = {}
        for branch in ("then_branch", "else_branch"):
            kind = ir.TensorType(ir.DataType.FLOAT)
            output = ir.Value(name=f"{name}.{branch}", shape=ir.Shape([]), type=kind)
            dropout = ir.Node("", "Dropout", [gate], outputs=[output])
            branches[branch] = ir.Graph([], [output], nodes=[dropout], name=output.name)
        is_known = new.op("Cast", [gate], f"{name}.known", to=ir.DataType.BOOL)
        gate = new.op("If", [is_known], f"{name}.float", **branches)
        gates.append(new.op("Cast", [gate], name, to=ir.DataType.INT64))
    graph.insert_before(graph[0], new.nodes)
    return gates


def replace_quantized_gathers(model: ir.Model) -> None:
    """Change every `GatherBlockQuantized` in place into standard operators: rows, unpack, (q - z) * scale.

    The numbers are the same bit for bit, and weights, scales and zero points are read where they are.
    """
    for node in [node for node in model.graph if node.op_type == "GatherBlockQuantized"]:
        new = _Unpacked(model.graph, node, ".plain")
        new.lookup(node)
        new.replace(node)


class _Unpacked(NewNodes):
    """New nodes in the place of `node`, which reads values packed in groups along the last axis."""

    def __init__(self, graph: ir.Graph, node: ir.Node, suffix: str) -> None:
        super().__init__(graph, f"{node.outputs[0].name}{suffix}")
        self.bits, self.group = node.attributes.get_int("bits", 4), node.attributes["block_size"].as_int()

    def product(self, node: ir.Node, gate: ir.Value | None) -> None:
        """`MatMul` over the unfolded weight of a `MatMulNBits`; `gate`: what its stage waits for."""
        columns, rows = node.attributes["K"].as_int(), node.attributes["N"].as_int()
        groups = -(-columns // self.group)
        packed, scales, *zero_points = node.inputs[1:4]
        each = self.constant(f"unfold.each_{groups}_{rows}", [groups, 1, 1, rows])
        values = self._integers(packed, [1, rows, groups, self.group * self.bits // 8], "", gate)
        zero = self._middle()
        if zero_points and zero_points[0] is not None:
            width = -(-groups * self.bits // 8)
            zeros = self._integers(zero_points[0], [1, rows, width, 1], ".zeros", gate)
            zeros = self._matrix(zeros, groups, rows, width * 8 // self.bits, ".zeros.all")
            zero = self.op("Reshape", [zeros, each], ".zeros.each")
        scale = self.op("Transpose", [scales], ".scales_turned", perm=[1, 0])
        scale = self.op("Reshape", [scale, each], ".scales")
        scaled = self._scaled(values, zero, scale)
        weight = self._matrix(scaled, columns, rows, groups * self.group, ".weight")
        self.op("MatMul", [node.inputs[0], weight], ".product")

    def lookup(self, node: ir.Node) -> None:
        """Rows of a `GatherBlockQuantized`: packed bytes [vocab, bytes] -> fp32 [batch, tokens, values]."""
        packed, ids, scales, *zero_points = node.inputs
        groups = int(_stored(scales).shape[1])  # type: ignore[union-attr, index, arg-type]
        blocks, each, flat = (
            self.constant(f"{self.prefix}.{name}", [0, 0, *shape])
            for name, shape in (
                ("blocks", (groups, self.group)),
                ("each", (groups, 1)),
                ("flat", (groups * self.group,)),
            )
        )
        values = self._looked_up(packed, ids, groups * self.group, ".values")
        scale = self.op("Reshape", [self.op("Gather", [scales, ids], ".scale", axis=0), each], ".scales")
        zero = self._middle()
        if zero_points and zero_points[0] is not None:
            zeros = self._looked_up(zero_points[0], ids, groups, ".zeros")
            zero = self.op("Reshape", [zeros, each], ".zero_points")
        grouped = self.op("Reshape", [values, blocks], ".grouped")
        self.op("Reshape", [self._scaled(grouped, zero, scale), flat], ".all")

    def _planes(self, packed: ir.Value, part: str, axis: int) -> ir.Value:
        """Along an axis of length 1 the 8 / bits values of each byte, uint8, the low bits first."""
        if self.bits == 8:
            return packed
        mask = self.constant(f"unpack.mask_{self.bits}", np.array(2**self.bits - 1, np.uint8))
        planes = []
        for shift in range(0, 8, self.bits):
            plane = packed
            if shift > 0:
                count = self.constant(f"unpack.shift_{shift}", np.array(shift, np.uint8))
                plane = self.op("BitShift", [plane, count], f"{part}.shifted_{shift}", direction="RIGHT")
            if shift < 8 - self.bits:
                plane = self.op("BitwiseAnd", [plane, mask], f"{part}.low_{shift}")
            planes.append(plane)
        return self.op("Concat", planes, f"{part}.joined", axis=axis)

    def _middle(self) -> ir.Value:
        """The zero point of symmetric grids."""
        return self.constant(f"unpack.middle_{self.bits}", np.array(2.0 ** (self.bits - 1), np.float32))

    def _scaled(self, values: ir.Value, zero: ir.Value, scale: ir.Value) -> ir.Value:
        return self.op("Mul", [self.op("Sub", [values, zero], ".centered"), scale], ".scaled")

    def _integers(
        self, packed: ir.Value | None, shape: list[int], part: str, gate: ir.Value | None
    ) -> ir.Value:
        """Stored bytes [1, rows, a, b] -> fp32 [a, b, values in a byte, rows], constant from the stage on."""
        target = self.constant(f"unfold.shape_{'_'.join(map(str, shape))}", shape)
        if gate is not None:
            target = self.op("Add", [target, gate], f"{part}.shape")
        stored = self.op("Reshape", [_stored(packed), target], f"{part}.bytes")
        turned = self.op(
            "Transpose", [self._planes(stored, part, axis=0)], f"{part}.turned", perm=[2, 3, 0, 1]
        )
        return self.op("Cast", [turned], f"{part}.float", to=ir.DataType.FLOAT)

    def _matrix(self, values: ir.Value, count: int, rows: int, stored: int, part: str) -> ir.Value:
        """fp32 [count, rows] of `stored` * rows values; what fills the last group or byte is cut off."""
        shape = self.constant(f"unfold.shape_{stored}_{rows}", [stored, rows])
        values = self.op("Reshape", [values, shape], f"{part}.stored")
        if count == stored:
            return values
        limits = [self.constant(f"unfold.integer_{value}", [value]) for value in (0, count)]
        return self.op("Slice", [values, *limits], part)

    def _looked_up(self, packed: ir.Value | None, ids: ir.Value | None, count: int, part: str) -> ir.Value:
        """fp32 [batch, tokens, count] of packed rows; what fills the last byte is cut off."""
        axis, flat = self.constant("unpack.axis", [-1]), self.constant("unpack.flat", [0, 0, -1])
        limits = [self.constant(f"unpack.integer_{value}", [value]) for value in (0, count, -1)]
        rows = self.op("Gather", [packed, ids], f"{part}.bytes", axis=0)
        planes = self._planes(self.op("Unsqueeze", [rows, axis], f"{part}.plane"), part, axis=-1)
        values = self.op("Reshape", [planes, flat], f"{part}.flat")
        values = self.op("Slice", [values, *limits], f"{part}.cut")
        return self.op("Cast", [values], f"{part}.float", to=ir.DataType.FLOAT)


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer behind a `Cast`, an `Identity` or a `Reshape`."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        value = node.inputs[0] if node else None
    return value
