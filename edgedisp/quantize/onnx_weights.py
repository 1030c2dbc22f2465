"""The weights of an fp32 bundle: who reads them in the graph, their values, and their torch parameters.

A weight can be quantized when it is a constant fp32 matrix that only matrix products and the embedding's
gather read; another reader would need it in fp32 as well. `weight_map.json` (written by graph/export.py) says
which torch parameters a weight is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgedisp.core.errors import BadInput
from edgedisp.core.files import read_json
from edgedisp.graph.onnx_graph import GRAPH, PACKED, PACKED_GATHER, WEIGHT_MAP, find_head, read_graph
from edgedisp.quantize.grid import Blocks, Grid, Packed, concatenate, unpack


def read_fp32_graph(bundle: Path) -> ir.Model:
    """The graph of a fresh fp32 export. BadInput for anything else."""
    model = read_graph(bundle / GRAPH)
    is_packed = any(node.op_type in (PACKED, PACKED_GATHER) for node in model.graph)
    if is_packed or not (bundle / WEIGHT_MAP).is_file():
        raise BadInput(
            f"{bundle}: is already quantized, or no fp32 bundle as edgedisp exports it; "
            "export the model folder again and quantize that"
        )
    return model


def read_tensor(tensor: Any) -> NDArray[Any]:
    """The tensor's values, in memory of their own: the pages of a mapped file would count as resident."""
    if not isinstance(tensor, ir.ExternalTensor):
        return np.array(tensor.numpy())
    values = np.fromfile(tensor.path, tensor.dtype.numpy(), tensor.size, offset=tensor.offset or 0)
    return values.reshape(tensor.shape.numpy())


def read_blocks(stored: Mapping[str, ir.Value], name: str, grid: Grid, columns: int) -> Blocks:
    """The weight `name` [out, columns] of a quantized graph with the initializers `stored`, unpacked."""
    parts = [f"{name}.q{grid.bits}", f"{name}.scales.fp16", f"{name}.zero_points"]
    data, scales, *points = (read_tensor(stored[part].const_value) for part in parts if part in stored)
    data = data.reshape(*scales.shape, -1)
    return unpack(Packed(data, scales, points[0] if points else None, columns), grid)


# ---------------------------------------------------------------- readers in the graph


@dataclass(frozen=True)
class Use:
    """A node that reads a weight: it looks rows up (`gather`) or multiplies."""

    node: ir.Node
    gather: bool
    rows_first: bool  # the weight is stored as [out, in], else as [in, out]
    outer: bool  # the embedding's gather, or the head


def find_uses(graph: ir.Graph) -> dict[str, list[Use]]:
    """Weight name -> its readers. A constant `Transpose` in between is looked through (genai's builder)."""
    head, uses = find_head(graph), {}
    for name, value in graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT and value.shape is not None and len(value.shape) == 2:
            users = list(_uses(value, True, head))
            if users and None not in users and len({use.rows_first for use in users if use}) == 1:
                uses[name] = [use for use in users if use]
    return uses


def _uses(value: ir.Value, as_stored: bool, head: ir.Node | None) -> Iterator[Use | None]:
    """The readers of a weight; None for one that does not read it as a weight. as_stored: not transposed."""
    for node, position in value.uses():
        if node.op_type == "Transpose":
            yield from _uses(node.outputs[0], not as_stored, head)
        elif node.op_type == "Gather" and position == 0 and node.inputs[1] in node.graph.inputs:  # type: ignore[union-attr]
            yield Use(node, True, as_stored, True)
        elif node.op_type in ("MatMul", "FusedMatMul") and position == 1:
            is_transposed = bool(node.attributes.get_int("transB", 0))
            yield Use(node, False, is_transposed == as_stored, node is head)
        else:
            yield None


def embedding_and_head(uses: dict[str, list[Use]]) -> set[str]:
    """The embedding and the head (the weight of the last product); one name when they are tied."""
    return {name for name, users in uses.items() if any(use.outer for use in users)}


# ---------------------------------------------------------------- torch parameters


@dataclass(frozen=True, eq=False)
class Origin:
    """The torch parameters of a graph weight, concatenated along dimension 0; `row_order` int64 [out] where
    the graph orders rows otherwise. `transposed`: the initializer is the transpose of that."""

    parameters: tuple[str, ...]
    transposed: bool
    row_order: Tensor | None

    def weight(self, tensors: Mapping[str, Tensor], rows_first: bool) -> Tensor:
        """The graph weight fp32 [out, in]; `rows_first`: the initializer is stored so."""
        parts = [tensors[name].detach().float() for name in self.parameters]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        if rows_first == self.transposed:  # Conv1D holds [in, out]
            weight = weight.T
        return weight if self.row_order is None else weight[self.row_order]

    def blocks(self, by_parameter: Mapping[str, Blocks]) -> Blocks | None:
        """The blocks of the graph weight from those of its parameters; None if a parameter has none."""
        if not all(name in by_parameter for name in self.parameters):
            return None
        blocks = concatenate([by_parameter[name] for name in self.parameters])
        return blocks if self.row_order is None else blocks.rows(self.row_order)

    def split(self, blocks: Blocks, rows: Sequence[int]) -> dict[str, Blocks]:
        """The reverse: parameter -> its blocks, of so many rows each."""
        if self.row_order is not None:
            blocks = blocks.rows(torch.argsort(self.row_order))
        parts, first = dict[str, Blocks](), 0
        for name, count in zip(self.parameters, rows):
            parts[name], first = blocks.rows(slice(first, first + count)), first + count
        return parts


def read_weight_map(bundle: Path) -> dict[str, Origin]:
    """Initializer -> its origin."""
    origins = {}
    for name, entry in read_json(bundle / WEIGHT_MAP).items():
        rows = torch.tensor(entry["rows"]) if "rows" in entry else None
        origins[name] = Origin(tuple(entry["torch"]), entry["transposed"], rows)
    return origins
