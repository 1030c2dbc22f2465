"""The weights of an fp32 bundle: who reads them in the graph, their values, and their torch parameters.

A weight can be quantized when it is a constant fp32 matrix that only matrix products and the embedding's
gather read; another reader would need it in fp32 as well. `weight_map.json` (written by graph/export.py) says
which torch parameters a weight is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from edgedisp.core.errors import BadInput
from edgedisp.core.files import WRONG_SHAPE, file_size, read_json
from edgedisp.graph.export import WEIGHT_MAP
from edgedisp.graph.onnx_graph import GRAPH
from edgedisp.quantize.grid import Blocks, concatenate

QUANTIZED = ("MatMulNBits", "GatherBlockQuantized")

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


def component(name: str) -> str:
    """The part of the model that a tensor belongs to; `other` where its name does not say."""
    return next((part for word, part in COMPONENTS if word in name), "other")


# ---------------------------------------------------------------- files


def read_graph(bundle: Path) -> ModelProto:
    """The graph of a bundle, without the weights of its data file. BadInput if there is none."""
    try:
        return onnx.load(bundle / GRAPH, load_external_data=False)
    except FileNotFoundError:
        raise BadInput(f"{bundle}: no bundle ({GRAPH} is missing); `edgedisp export` makes one") from None
    except DecodeError as error:
        raise BadInput(f"{bundle / GRAPH}: is no ONNX graph, or a damaged one; export it again") from error


def read_fp32_graph(bundle: Path) -> ModelProto:
    """The graph of a fresh fp32 export. BadInput for what is already quantized, lacks weight_map.json, or
    whose weights lie outside the folder or are cut off."""
    model = read_graph(bundle)
    if any(node.op_type in QUANTIZED for node in model.graph.node):
        raise BadInput(f"{bundle}: is already quantized; quantize the fp32 bundle that it was made from")
    if not (bundle / WEIGHT_MAP).is_file():
        raise BadInput(
            f"{bundle}: {WEIGHT_MAP} is missing; only an fp32 bundle as edgedisp exports it can be "
            "quantized: export the model folder again"
        )
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        path, dtype, offset = _location(bundle, tensor)
        if path.resolve().parent != bundle.resolve():
            raise BadInput(f"{bundle}: weight {tensor.name} lies outside the bundle, in {path}")
        size, end = file_size(path), offset + int(np.prod(tensor.dims)) * dtype.itemsize
        if size is None or size < end:
            state = "is missing" if size is None else f"ends after {size:,} of at least {end:,} bytes"
            raise BadInput(f"{path}: {state} (weight {tensor.name}); export the model folder again")
    return model


def _location(bundle: Path, tensor: TensorProto) -> tuple[Path, np.dtype[Any], int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return bundle / entries["location"], dtype, int(entries.get("offset", 0))


def read_tensor(bundle: Path, tensor: TensorProto) -> NDArray[Any]:
    """The tensor's values, in memory of their own: the pages of a mapped file would count as resident."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor).copy()  # its own array is read-only
    path, dtype, offset = _location(bundle, tensor)
    return np.fromfile(path, dtype, int(np.prod(tensor.dims)), offset=offset).reshape(tuple(tensor.dims))


# ---------------------------------------------------------------- readers in the graph


@dataclass(frozen=True)
class Use:
    """A node that reads a weight: it looks rows up (`gather`) or multiplies."""

    index: int  # of the node in the graph
    gather: bool
    rows_first: bool  # the weight is stored as [out, in], else as [in, out]


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


def embedding_and_head(uses: dict[str, list[Use]]) -> set[str]:
    """The embedding and the head (the weight of the last product); one name when they are tied."""
    embeddings = {name for name, users in uses.items() if any(use.gather for use in users)}
    products = [(use.index, name) for name, users in uses.items() for use in users if not use.gather]
    return embeddings | {max(products)[1]} if products else embeddings


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
        return self.in_graph_order(concatenate([by_parameter[name] for name in self.parameters]))

    def in_graph_order(self, blocks: Blocks) -> Blocks:
        """Blocks of the concatenated parameters, with the graph's order of rows."""
        return blocks if self.row_order is None else blocks.rows(self.row_order)


def read_weight_map(bundle: Path) -> dict[str, Origin]:
    """Initializer -> its origin. BadInput for a damaged weight_map.json."""
    try:
        return {
            name: Origin(
                tuple(entry["torch"]),
                bool(entry["transposed"]),
                torch.tensor(entry["rows"]) if "rows" in entry else None,
            )
            for name, entry in read_json(bundle / WEIGHT_MAP).items()
        }
    except WRONG_SHAPE as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{bundle / WEIGHT_MAP}: is damaged; export the model folder again") from error
