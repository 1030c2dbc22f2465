"""What rounding a weight costs: KL(model || model with that weight rounded), in nats per token.

The weights of a bundle's graph are found as parts of the torch model, and replaced there while a loss is
measured on training text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BuildFailed
from edgedisp.quantize.onnx_weights import (
    Origin,
    embedding_and_head,
    find_uses,
    read_fp32_graph,
    read_weight_map,
)


@dataclass(frozen=True)
class Weight:
    """A weight [rows, columns] of the graph, rows in the order of its torch parameters. `module`: a linear
    map that multiplies by it, None for an embedding alone; `outer`: embedding or head."""

    name: str
    origin: Origin
    module: str | None
    rows: int
    columns: int
    outer: bool

    def read(self, model: nn.Module) -> Tensor:
        """A copy, fp32 [rows, columns]."""
        return torch.cat(self._views(model)).float()

    def write(self, model: nn.Module, values: Tensor) -> None:
        views = self._views(model)
        for view, part in zip(views, values.split([len(view) for view in views])):
            view.copy_(part)

    def _views(self, model: nn.Module) -> list[Tensor]:
        views = []
        for name in self.origin.parameters:
            is_conv1d = isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
            parameter = model.get_parameter(name).detach()
            views.append(parameter.T if is_conv1d else parameter)
        return views


def find_weights(bundle: Path, model: nn.Module) -> list[Weight]:
    """The weights of an fp32 bundle, in the graph's order, as parts of the `model` it was exported from.
    BuildFailed names a weight of the graph that is none of the model's."""
    graph, origins = read_fp32_graph(bundle).graph, read_weight_map(bundle)
    uses = find_uses(graph)
    outer, output = embedding_and_head(uses), model.get_output_embeddings()  # type: ignore[operator]
    head = next(name for name, module in model.named_modules() if module is output)
    weights = []
    for name, users in uses.items():
        if name not in origins:
            raise BuildFailed(f"{bundle}: {name} is no weight of the model")
        module: str | None = head if name in outer else origins[name].parameters[0].removesuffix(".weight")
        if all(use.gather for use in users):
            module = None
        shape: Any = tuple(graph.initializers[name].shape or ())
        rows, columns = shape if users[0].rows_first else shape[::-1]
        weights.append(Weight(name, origins[name], module, rows, columns, name in outer))
    return weights


@contextmanager
def replaced(
    model: nn.Module, weights: Iterable[Weight], change: Callable[[Weight, Tensor], Tensor]
) -> Iterator[None]:
    """The model with `change(weight, values)` in the place of each weight; all are put back at the end."""
    originals: list[tuple[Weight, Tensor]] = []
    try:
        for weight in weights:
            originals.append((weight, weight.read(model)))
            weight.write(model, change(*originals[-1]))
        yield
    finally:
        for weight, values in originals:
            weight.write(model, values)


@torch.no_grad()
def importances(
    model: nn.Module, weights: Sequence[Weight], pieces: Sequence[Tensor]
) -> dict[str, Tensor | None]:
    """Weight's name -> E[x^2] [columns] of its inputs over `pieces` (int64 [tokens] each), what an error in a
    column costs; None for an embedding alone."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, 0) + x.reshape(-1, x.shape[-1]).float().square().sum(0)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name in {weight.module for weight in weights if weight.module}
    ]
    for piece in pieces:
        model(input_ids=piece[None], use_cache=False)
    for handle in handles:
        handle.remove()
    means = {name: total / sum(map(len, pieces)) for name, total in sums.items()}
    floors = {name: 1e-6 * float(mean.mean()) + 1e-30 for name, mean in means.items()}
    return {w.name: means[w.module].clamp(min=floors[w.module]) if w.module else None for w in weights}


class Reference:
    """What the unrounded model says of every next token of `pieces` (int64 [tokens] each)."""

    def __init__(self, model: nn.Module, pieces: Sequence[Tensor]) -> None:
        self.pieces = list(pieces)
        self.tokens = sum(map(len, self.pieces))
        self._log_probs = [_log_probs(model, piece) for piece in self.pieces]

    def kl(self, model: nn.Module) -> float:
        """KL(unrounded || model), mean over tokens, in nats."""
        total = 0.0
        for piece, reference in zip(self.pieces, self._log_probs):
            values = _log_probs(model, piece)
            terms = nn.functional.kl_div(values, reference, reduction="none", log_target=True)
            total += float(terms.sum(dtype=torch.float64))
        return max(total / self.tokens, 0.0)


def loss(model: nn.Module, pieces: Sequence[Tensor]) -> float:
    """Mean negative log-likelihood of the pieces' own next tokens, in nats."""
    total = 0.0
    for piece in pieces:
        total -= float(_log_probs(model, piece)[:-1].gather(1, piece[1:, None]).double().sum())
    return total / sum(len(piece) - 1 for piece in pieces)


@torch.no_grad()
def _log_probs(model: nn.Module, piece: Tensor) -> Tensor:
    """float32 [tokens, vocabulary]."""
    logits: Tensor = model(input_ids=piece[None], use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)
