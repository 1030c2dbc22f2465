"""Collects the nodes of a graph and streams its weights to disk, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

GRAPH, DATA = "model.onnx", "model.onnx.data"
MICROSOFT = "com.microsoft"
OPSET, IR_VERSION = 21, 10
INLINE_BYTES = 1024  # smaller tensors stay inside the graph file
PAGE = 4096  # offsets of the others are multiples of it, so that a runtime can map them


class GraphWriter:
    """Nodes in order of computation, and initializers under plain readable names, for a bundle's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[NodeProto] = []
        self._weights: dict[str, TensorProto] = {}

    def node(
        self, op: str, inputs: Sequence[str], *outputs: str, domain: str = "", **attributes: int | float
    ) -> str:
        """Append a node named after its first output; return that. Empty inputs at the end are dropped."""
        given = list(inputs)
        while given and not given[-1]:
            given.pop()
        options: dict[str, Any] = attributes
        made = helper.make_node(op, given, list(outputs), name=outputs[0], domain=domain, **options)
        self.nodes.append(made)
        return outputs[0]

    def weight(self, name: str, values: torch.Tensor | NDArray[Any]) -> str:
        """Store a tensor under `name`, once; large ones go to the data file at a page's start."""
        if name in self._weights:
            return name
        array = np.ascontiguousarray(values.detach().numpy() if isinstance(values, torch.Tensor) else values)
        small = array.nbytes <= INLINE_BYTES
        self._weights[name] = numpy_helper.from_array(array, name) if small else self._outside(name, array)
        return name

    def _outside(self, name: str, array: NDArray[Any]) -> TensorProto:
        """Append `array` to the data file straight from its memory; onnx's own function copies it twice."""
        with (self.folder / DATA).open("ab") as file:
            file.write(bytes(-file.tell() % PAGE))
            tensor = placed(name, array, file.tell())
            array.tofile(file)
        return tensor

    def integers(self, name: str, *values: int) -> str:
        """A constant int64 vector: shapes, axes, splits."""
        return self.weight(name, np.array(values, np.int64))

    def save(self, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> None:
        """Write `model.onnx`; the weights already lie in `model.onnx.data`."""
        (self.folder / GRAPH).write_bytes(self.model(inputs, outputs).SerializeToString())

    def model(self, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> ModelProto:
        """What `save` writes."""
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, list(self._weights.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgedisp")


def placed(name: str, array: NDArray[Any], offset: int) -> TensorProto:
    """The entry of a tensor whose values lie at `offset` of the data file."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", DATA), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
