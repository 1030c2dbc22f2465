"""What a bundle will weigh, byte by byte, before there is one.

The same nodes, the same places in the data file and the same `Grid.size_bytes` as in a real rewrite, over a
graph whose tensors have shapes alone. Of a weight that would be packed, one zero repeated stands for the
packed arrays. What is told by component is stored values with their scales and zero points; the rest of the
two files is the graph itself and the padding to pages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedisp.quantize import operators
from edgedisp.quantize.candidates import FOUR_BITS, stored_bytes
from edgedisp.quantize.components import component
from edgedisp.quantize.grid import Grid
from edgedisp.quantize.rewrite import assemble
from edgedisp.quantize.store import INLINE_BYTES, PAGE, TensorStore, placed
from edgedisp.quantize.uses import find_uses, head_name


def account(
    model: ModelProto,
    body: Grid | None = None,
    ends: Grid | None = None,
    grids: Mapping[str, Grid] | None = None,
) -> dict[str, Any]:
    """Sizes of the bundle that the fp32 graph `model` becomes; its tensors need no values.

    body: the grid of the layers' weights, None to leave all in fp32. ends: of the embedding and the head
    (None: as the body). grids: tensor name -> the grid of its own, before both.

    Returns {components {name: bytes}, tied, data_bytes, graph_bytes, size_bytes (of both files)}.
    """
    uses = find_uses(model.graph)
    head = head_name(uses)
    store, components = _Places(), Counter[str]()
    replaced: dict[int, list[NodeProto]] = {}
    for tensor in model.graph.initializer:
        users = uses.get(tensor.name, [])
        is_end = tensor.name == head or any(use.gather for use in users)
        grid = (grids or {}).get(tensor.name) or (ends or body if is_end else body)
        if not users or grid is None:
            store.copy(tensor)
            components[component(tensor.name)] += _array(tensor).nbytes
            continue
        rows, columns = tensor.dims if users[0].rows_first else reversed(tensor.dims)
        packed = grid.empty(rows, columns)
        components[component(tensor.name)] += packed.size_bytes
        replaced |= operators.replace(model.graph, tensor.name, users, packed, grid, 4, store)
    written = ModelProto()
    written.CopyFrom(model)
    if replaced:
        assemble(written, replaced, store.tensors)
    graph_bytes = written.ByteSize()
    return {
        "components": dict(sorted(components.items())),
        "tied": head is not None and any(use.gather for use in uses[head]),
        "data_bytes": store.end,
        "graph_bytes": graph_bytes,
        "size_bytes": store.end + graph_bytes,
    }


def smallest_bytes(model: ModelProto) -> int:
    """`size_bytes` where each weight has the form of fewest bytes that a search may choose."""
    uses = find_uses(model.graph)
    grids = {}
    for tensor in model.graph.initializer:
        if users := uses.get(tensor.name):
            rows, columns = tensor.dims if users[0].rows_first else reversed(tensor.dims)
            sizes = {grid: stored_bytes(rows, columns, grid) for grid in FOUR_BITS}
            grids[tensor.name] = min(sizes, key=sizes.__getitem__)
    size: int = account(model, grids=grids)["size_bytes"]
    return size


class _Places(TensorStore):
    """Notes where each tensor would lie, and writes nothing."""

    def __init__(self) -> None:
        self.source = self.out = Path()
        self.tensors: list[TensorProto] = []
        self.end = 0

    def add(self, name: str, values: NDArray[Any]) -> str:
        if values.nbytes <= INLINE_BYTES:
            self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
            return name
        start = self.end + -self.end % PAGE
        self.end = start + values.nbytes
        self.tensors.append(placed(name, values, start))
        return name

    def copy(self, tensor: TensorProto) -> None:
        self.add(tensor.name, _array(tensor))


def _array(tensor: TensorProto) -> NDArray[Any]:
    """An array of the tensor's shape and type."""
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.broadcast_to(np.zeros((), dtype), tuple(tensor.dims))
