"""The weights of a bundle: found in the graph, read from and written to `model.onnx.data` one at a time.

A weight can be quantized when it is a constant fp32 matrix that only matrix products and the embedding's
gather read; another reader would need it in fp32 as well. onnx-ir is not used here: it aligns only tensors
above 1 MB to pages, and phones map the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from edgedisp.graph.decoder_graph import INLINE_BYTES, external_tensor
from edgedisp.graph.onnx_graph import DATA, GRAPH, PAGE

# The first word found in a tensor's name tells its component; the genai builder uses the same words.
COMPONENTS = (
    ("norm", "norm"),
    ("lm_head", "head"),
    ("position", "positions"),
    ("_cache", "positions"),
    ("embed", "embedding"),
    ("attn", "attention"),
    ("mlp", "mlp"),
)


@dataclass(frozen=True)
class Use:
    """A node that reads a weight: it looks rows up (`gather`) or multiplies."""

    index: int  # of the node in the graph
    gather: bool
    rows_first: bool  # the weight is stored as [out, in], else as [in, out]


def read_graph(bundle: Path) -> ModelProto:
    """The graph of a bundle, without the weights of its data file."""
    return onnx.load(bundle / GRAPH, load_external_data=False)


def component(name: str) -> str:
    """The part of the model that a tensor belongs to; `other` where its name does not say."""
    return next((part for word, part in COMPONENTS if word in name), "other")


def find_uses(graph: GraphProto) -> dict[str, list[Use]]:
    """Weight name -> its readers. A constant `Transpose` in between is looked through (genai's builder)."""
    matrices = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    weights = {name: (name, True) for name in matrices}  # value -> its weight, and whether it is as stored
    uses: dict[str, list[Use]] = {}
    other: set[str] = set()
    for index, node in enumerate(graph.node):
        if node.op_type == "Transpose" and node.input[0] in matrices:
            weights[node.output[0]] = (node.input[0], False)
            continue
        for position, value in enumerate(node.input):
            if value not in weights:
                continue
            weight, as_stored = weights[value]
            rows_first = _rows_first(node, position)
            if rows_first is None:
                other.add(weight)
            else:
                use = Use(index, node.op_type == "Gather", rows_first == as_stored)
                uses.setdefault(weight, []).append(use)
    mixed = {name for name, users in uses.items() if len({use.rows_first for use in users}) > 1}
    return {name: users for name, users in uses.items() if name not in other | mixed}


def _rows_first(node: NodeProto, position: int) -> bool | None:
    """How the node reads input `position`: as [out, in] (True), [in, out] (False), not as a weight (None)."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Gather":
        embeds = position == 0 and attributes.get("axis", 0) == 0 and node.input[1] == "input_ids"
        return True if embeds else None
    if position != 1:
        return None
    if node.op_type == "MatMul":
        return False
    scaled = attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0
    turned = any(attributes.get(name, 0) for name in ("transA", "transBatchA", "transBatchB"))
    if node.op_type in ("FusedMatMul", "Gemm") and not scaled and not turned:
        return bool(attributes.get("transB", 0))
    return None


def outer_weights(uses: dict[str, list[Use]]) -> set[str]:
    """The embedding and the head (the weight of the last product); one name when they are tied."""
    outer = {name for name, users in uses.items() if any(use.gather for use in users)}
    products = [(use.index, name) for name, users in uses.items() for use in users if not use.gather]
    return outer | {max(products)[1]} if products else outer


def read_tensor(bundle: Path, tensor: TensorProto) -> NDArray[Any]:
    """The tensor's values, in memory of their own: the pages of a mapped file would count as resident."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor).copy()  # its own array is read-only
    entries = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count, offset = int(np.prod(tensor.dims)), int(entries.get("offset", 0))
    return np.fromfile(bundle / entries["location"], dtype, count, offset=offset).reshape(tuple(tensor.dims))


class TensorStore:
    """Lays tensors out for the bundle `output_dir`, large ones at page starts of its data file.

    `output_dir` None: nothing is written, for the size alone. `tensors`: the initializers so far;
    `size_bytes`: the length of the data file.
    """

    def __init__(self, source: Path, output_dir: Path | None) -> None:
        self.source = source
        self.tensors: list[TensorProto] = []
        self.size_bytes = 0
        self._data = None if output_dir is None else output_dir / DATA
        if self._data is not None:
            self._data.write_bytes(b"")  # also where every tensor is small

    def add(self, name: str, values: NDArray[Any]) -> str:
        """Store `values` under `name`; returns the name."""
        if values.nbytes <= INLINE_BYTES:
            self.tensors.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
            return name
        offset = self.size_bytes + -self.size_bytes % PAGE
        if self._data is not None:
            with self._data.open("ab") as file:
                file.write(bytes(offset - file.tell()))
                np.ascontiguousarray(values).tofile(file)
        self.size_bytes = offset + values.nbytes
        self.tensors.append(external_tensor(name, values, offset))
        return name

    def copy(self, tensor: TensorProto) -> None:
        """Take a tensor of the source over unchanged."""
        self.add(tensor.name, read_tensor(self.source, tensor))
