"""The graph of a model before there are weights: every node and tensor with its shape, and no values.

Sizes can then be told before anything is downloaded, trained or exported. The graph is made by the very
code that writes it (`decoder_graph.compose`), over a model whose parameters have shapes alone, so its
figures cannot drift from the files. Families that onnxruntime-genai's builder writes get an outline from
the torch modules instead: the same weights, but not the same nodes (`exact` is False).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper, numpy_helper
from torch import nn

from edgedisp.graph import architectures
from edgedisp.graph.decoder_graph import INLINE_BYTES, GraphWriter, compose, external_tensor
from edgedisp.graph.onnx_graph import DATA, MICROSOFT, PAGE

__all__ = ["DATA", "Outline", "cache_bytes", "outline"]


@dataclass(frozen=True)
class Outline:
    """A graph whose large tensors have places in a data file that was never written.

    model: the fp32 graph. context: positions that the bundle would be made for. exact: whether the graph is
    the one that an export writes, node for node.
    """

    model: ModelProto
    context: int
    exact: bool


def outline(model: nn.Module, max_context: int | None = None) -> Outline:
    """The fp32 graph of a torch model, whose parameters may be on the meta device (buffers may not).

    BadInput where an export of the model would be refused for its configuration.
    """
    config: Any = model.config
    shapes = _Shapes()
    if config.model_type not in architectures.READERS:
        context = int(getattr(config, "max_position_embeddings", None) or architectures.DEFAULT_CONTEXT)
        return Outline(shapes.model(*_by_modules(shapes, model, context)), context, False)
    decoder = architectures.read_decoder(model, max_context)
    anything: Any = model
    head, embedding = anything.get_output_embeddings().weight, anything.get_input_embeddings().weight
    if (
        head is not embedding
    ):  # tensors without memory all seem to lie at one place: the reader took it as tied
        decoder = replace(decoder, head=head)
    return Outline(shapes.model(*compose(shapes, decoder)), decoder.context, True)


def cache_bytes(model: ModelProto, positions: int) -> int:
    """Bytes of the KV cache of one sequence of `positions` tokens: every past key and value, in fp32."""
    total = 0
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            _, heads, _, width = value.type.tensor_type.shape.dim
            total += 4 * heads.dim_value * positions * width.dim_value
    return total


class _Shapes(GraphWriter):
    """Notes where each tensor would lie, and writes nothing."""

    def __init__(self) -> None:
        super().__init__(Path())
        self._end = 0

    def weight(self, name: str, values: torch.Tensor | NDArray[Any]) -> str:
        if name not in self._weights:
            array = _shaped(values)
            small = array.nbytes <= INLINE_BYTES
            entry = numpy_helper.from_array(np.ascontiguousarray(array), name) if small else None
            self._weights[name] = entry or self._place(name, array)
        return name

    def _place(self, name: str, array: NDArray[Any]) -> Any:
        start = self._end + -self._end % PAGE
        self._end = start + array.nbytes
        return external_tensor(name, array, start)


def _shaped(values: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    """An array of the same shape and type; in the place of values that are not there, one zero repeated."""
    if not isinstance(values, torch.Tensor):
        return values
    if not values.is_meta:
        return values.detach().numpy()
    return np.broadcast_to(np.zeros((), np.float32), tuple(values.shape))


def _by_modules(
    graph: GraphWriter, model: nn.Module, context: int
) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
    """Embedding, linear maps, all other parameters and rotary tables, each with the node that reads it."""
    anything: Any = model
    embedding = anything.get_input_embeddings().weight
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(owner, recurse=False):
            if parameter is embedding and isinstance(module, nn.Embedding):
                graph.node("Gather", [graph.weight(name, parameter), "input_ids"], owner, axis=0)
                table = name
            elif parameter is embedding:
                graph.node("FusedMatMul", [owner, table], "logits", domain=MICROSOFT, transB=1)
            elif isinstance(module, nn.Linear) and parameter.ndim == 2:
                graph.node("MatMul", [f"{owner}.input", graph.weight(name, parameter.t())], owner)
            else:
                graph.weight(name, parameter)
    config: Any = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for part in ("cos_cache", "sin_cache"):
        graph.weight(part, np.broadcast_to(np.zeros((), np.float32), (context, width // 2)))
    caches = [
        helper.make_tensor_value_info(f"past_key_values.{i}.{part}", 1, ["batch", heads, "past", width])
        for i in range(config.num_hidden_layers)
        for part in ("key", "value")
    ]
    return caches, []
