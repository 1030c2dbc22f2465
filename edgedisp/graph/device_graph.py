"""Graphs rewritten for devices: last-token logits, fewer positions, standard operators for browsers.

onnxruntime-web unpacks the whole weight of a `MatMulNBits` at every token, ten times the product's time, and
has no kernel for `GatherBlockQuantized`. `unfold` writes constant nodes that onnxruntime folds once when it
opens the graph: bytes -> integers -> fp32 (q - zero point) * scale -> MatMul. The download stays small.

Folding keeps every step's result until all weights are folded, five times the fp32 weights. So weights are
folded in `STAGES`. A stage waits for a shape that depends on a `Dropout` in a branch of an `If`: onnxruntime
takes the branch when the condition is known, and drops the Dropout one round later. A runtime that does not
is slow and right: the number that passes through is always 0. Type UINT4 has no cast in WebAssembly (1.31).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgedisp.core.errors import BadInput
from edgedisp.graph.onnx_graph import PACKED, PACKED_GATHER, NewNodes, TensorStore, find_head

# Inputs of an operator that are tables of positions, one row each.
TABLES = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}
PREFIX = "last_token."
STAGES = 8  # onnxruntime goes over a graph at most 10 times
PAGE_BYTES = 200_000_000


# ---------------------------------------------------------------- positions and logits


def position_tables(graph: ir.Graph) -> set[str]:
    """Names of the initializers that have one row for each position."""
    tables: set[ir.Value | None] = set()
    for node in graph:
        if node.op_type in TABLES:
            tables |= {node.inputs[index] for index in TABLES[node.op_type] if index < len(node.inputs)}
        elif node.op_type == "Gather" and "position" in str(node.inputs[0] and node.inputs[0].name):
            tables.add(node.inputs[0])  # learned positions
    return {name for name, value in graph.initializers.items() if value in tables}


def cut_positions(graph: ir.Graph, output_dir: Path, dropped_rows: int) -> None:
    """Copy the weights tensor by tensor into `output_dir`, the tables of positions without their last rows.

    Rows are dropped at the end, so that an architecture whose first position has another row than 0 keeps it.
    """
    tables, store = position_tables(graph), TensorStore(output_dir)
    for name, value in graph.initializers.items():
        if (tensor := value.const_value) is not None:
            values = tensor.numpy()
            value.const_value = store.add(name, values[:-dropped_rows] if name in tables else values)


def keep_last(graph: ir.Graph) -> None:
    """`logits` become [batch, 1, vocab], of each row's last real token: a fifth less work for a prompt.

    The head is found as the last product before the logits, whoever wrote the graph. BadInput where there is
    none, or where the graph does so already.
    """
    head, inputs = find_head(graph), {value.name: value for value in graph.inputs}
    if head is None or any(str(node.name).startswith(PREFIX) for node in graph):
        raise BadInput("the graph has no head, or keeps the last token's logits alone already")
    new = NewNodes(graph, PREFIX)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    index_1, last_axis = new.constant(f"{PREFIX}one", 1), new.constant(f"{PREFIX}last_axis", [-1])
    # real tokens - 1 counts from the start of the row, cached tokens included; a padded row that decodes may
    # have fewer than there are in the cache, and then its one new token is meant.
    real = new.op("ReduceSum", [mask, new.constant(f"{PREFIX}axis", [1])], "real", keepdims=1)
    total = new.op("Gather", [new.op("Shape", [mask], "mask_shape"), index_1], "total", axis=0)
    count = new.op("Gather", [new.op("Shape", [ids], "ids_shape"), index_1], "new", axis=0)
    less_cached = new.op("Sub", [count, total], "less_cached")
    index = new.op("Sub", [new.op("Add", [real, less_cached], "count"), index_1], "index_or_negative")
    index = new.op("Max", [index, new.constant(f"{PREFIX}zero", 0)], "index")  # int64 [batch, 1]
    index = new.op("Unsqueeze", [index, last_axis], "indices")
    hidden = new.op("GatherND", [head.inputs[0], index], "hidden", batch_dims=1)
    head.replace_input_with(0, hidden)
    graph.insert_before(head, new.nodes)
    logits = next(value for value in graph.outputs if value.name == "logits")
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]]) if logits.shape else None


# ---------------------------------------------------------------- browsers


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


def _size(node: ir.Node) -> int:
    """Weight values of a product."""
    return node.attributes["K"].as_int() * node.attributes["N"].as_int()


def unfold(graph: ir.Graph) -> None:
    """Every `MatMulNBits` becomes a `MatMul` over constants. The stages have about as many weight values
    each, the largest weights first."""
    products = sorted((node for node in graph if node.op_type == PACKED), key=_size, reverse=True)
    gates, before, total = _gates(graph), 0, sum(map(_size, products))
    for node in products:
        new = _Unpacked(graph, node, ".unfolded")
        new.product(node, gates[before * STAGES // total])
        new.replace(node)
        before += _size(node)


def _gates(graph: ir.Graph) -> list[ir.Value | None]:
    """int64 0 for each stage, each known one round after the one before; None for stage 0."""
    new = NewNodes(graph)
    gates: list[ir.Value | None] = [None]
    gate = new.constant("unfold.gate_0.float", np.array(0, np.float32))
    for stage in range(1, STAGES):
        name, branches = f"unfold.gate_{stage}", {}
        for branch in ("then_branch", "else_branch"):
            output = ir.val(f"{name}.{branch}", ir.DataType.FLOAT, [])
            dropout = ir.node("Dropout", [gate], outputs=[output])
            branches[branch] = ir.Graph([], [output], nodes=[dropout], name=output.name)
        is_known = new.op("Cast", [gate], f"{name}.known", to=ir.DataType.BOOL)
        gate = new.op("If", [is_known], f"{name}.float", **branches)
        gates.append(new.op("Cast", [gate], name, to=ir.DataType.INT64))
    graph.insert_before(graph[0], new.nodes)
    return gates


def replace_quantized_gathers(graph: ir.Graph) -> None:
    """Every `GatherBlockQuantized` becomes standard operators: rows, unpack, (q - z) * scale.

    The numbers are the same bit for bit, and weights, scales and zero points are read where they are.
    """
    for node in [node for node in graph if node.op_type == PACKED_GATHER]:
        new = _Unpacked(graph, node, ".plain")
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
        each, matrix = self._shape(groups, 1, 1, rows), self._shape(-1, rows)
        values, zero = self._turned(packed, (rows, groups, -1), "", gate), self._middle()
        if zero_points and zero_points[0] is not None:
            zeros = self._turned(zero_points[0], (rows, -1, 1), ".zeros", gate)
            zeros = self._cut(self.op("Reshape", [zeros, matrix], ".zeros.all"), groups, 0, ".zeros.cut")
            zero = self.op("Reshape", [zeros, each], ".zeros.each")
        scale = self.op("Transpose", [scales], ".scales_turned", perm=[1, 0])
        scaled = self._scaled(values, zero, self.op("Reshape", [scale, each], ".scales"))
        weight = self.op("Reshape", [scaled, matrix], ".weight")
        if columns % self.group:
            weight = self._cut(weight, columns, 0, ".weight.cut")
        self.op("MatMul", [node.inputs[0], weight], ".product")

    def lookup(self, node: ir.Node) -> None:
        """Rows of a `GatherBlockQuantized`: packed bytes [vocab, bytes] -> fp32 [batch, tokens, values]."""
        packed, ids, scales, *zero_points = node.inputs
        groups = int(_stored(scales).const_value.shape[1])  # type: ignore[union-attr, arg-type]
        each, flat = self._shape(0, 0, groups, 1), self._shape(0, 0, -1)
        values, zero = self._gathered(packed, ids, self._shape(0, 0, groups, self.group), ""), self._middle()
        if zero_points and zero_points[0] is not None:
            zeros = self._cut(self._gathered(zero_points[0], ids, flat, ".zeros"), groups, 2, ".zeros.cut")
            zero = self.op("Reshape", [zeros, each], ".zeros.each")
        scale = self.op("Reshape", [self.op("Gather", [scales, ids], ".scale", axis=0), each], ".scales")
        self.op("Reshape", [self._scaled(values, zero, scale), flat], ".all")

    def _turned(
        self, packed: ir.Value | None, shape: tuple[int, ...], part: str, gate: ir.Value | None
    ) -> ir.Value:
        """Stored bytes as [rows, a, b] -> fp32 [a, b, values in a byte, rows], constant from the stage on."""
        target = self._shape(1, *shape)
        if gate is not None:
            target = self.op("Add", [target, gate], f"{part}.shape")
        stored = self.op("Reshape", [_stored(packed), target], f"{part}.bytes")
        planes = self._planes(stored, part, axis=0)
        turned = self.op("Transpose", [planes], f"{part}.turned", perm=[2, 3, 0, 1])
        return self.op("Cast", [turned], f"{part}.float", to=ir.DataType.FLOAT)

    def _gathered(
        self, packed: ir.Value | None, ids: ir.Value | None, shape: ir.Value, part: str
    ) -> ir.Value:
        """fp32 values of the packed rows `ids`."""
        rows = self.op("Gather", [packed, ids], f"{part}.bytes", axis=0)
        rows = self.op("Unsqueeze", [rows, self.constant("unpack.last_axis", [-1])], f"{part}.plane")
        values = self.op("Reshape", [self._planes(rows, part, axis=-1), shape], f"{part}.values")
        return self.op("Cast", [values], f"{part}.float", to=ir.DataType.FLOAT)

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

    def _scaled(self, values: ir.Value, zero: ir.Value, scale: ir.Value) -> ir.Value:
        return self.op("Mul", [self.op("Sub", [values, zero], ".centered"), scale], ".scaled")

    def _middle(self) -> ir.Value:
        """The zero point of symmetric grids."""
        return self.constant(f"unpack.middle_{self.bits}", np.array(2.0 ** (self.bits - 1), np.float32))

    def _cut(self, values: ir.Value, count: int, axis: int, name: str) -> ir.Value:
        """Without what fills the last group or byte."""
        limits = [self.constant(f"unpack.integer_{value}", [value]) for value in (0, count, axis)]
        return self.op("Slice", [values, *limits], name)

    def _shape(self, *sizes: int) -> ir.Value:
        return self.constant(f"unpack.shape_{'_'.join(map(str, sizes))}", sizes)


def _stored(value: Any) -> ir.Value:
    """The initializer behind a `Cast`, an `Identity` or a `Reshape`."""
    while not value.is_initializer():
        value = value.producer().inputs[0]
    return value
