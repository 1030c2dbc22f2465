"""What rounding a weight costs: KL(model || model with that weight rounded), in nats per token.

Each weight is measured with one usual rounding, alone and as the last of all (`measure`); the mean of the two
is its Shapley value if the loss is quadratic in the errors (`shares`). Other candidates follow by the Fisher
score, the second-order term of the KL with tokens, rows and columns taken as independent (the diagonal of
K-FAC, Martens and Grosse 2015). For inputs x and gradients g of the log-likelihood of tokens drawn from the
model:

    fisher(dW) = 1/2 sum_rc E[g_r^2] dW_rc^2 E[x_c^2]

On SmolLM2-135M its rank correlation with the measured KL over 30 weights at 4 bits is 0.94.
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
from edgedisp.core.progress import Progress, silent
from edgedisp.quantize.grid import dequantize
from edgedisp.quantize.onnx_rewrite import Choice
from edgedisp.quantize.onnx_weights import find_uses, outer_weights, read_graph
from edgedisp.quantize.weight_map import Origin, read_weight_map

ROWS = 64  # of a weight, rounded to see what a candidate costs


# ---------------------------------------------------------------- the weights


@dataclass(frozen=True)
class Unit:
    """A weight [rows, columns] of the graph, which has one grid. `modules`: the linear maps that multiply by
    it, in the order of its rows; `embeds`: it is also (or only) the embedding; `outer`: embedding or head."""

    name: str
    origin: Origin
    modules: tuple[str, ...]
    rows: int
    columns: int
    embeds: bool
    outer: bool


def find_units(source: Path, model: nn.Module) -> list[Unit]:
    """The weights of the fp32 bundle `source`, in the graph's order, as parts of the `model` it was made of.
    BuildFailed names a weight of the graph that is none of the model's."""
    graph, origins = read_graph(source).graph, read_weight_map(source)
    uses = find_uses(graph)
    outer = outer_weights(uses)
    output = model.get_output_embeddings()  # type: ignore[operator]
    head = next(name for name, module in model.named_modules() if module is output)
    units = []
    for tensor in graph.initializer:
        name, users = tensor.name, uses.get(tensor.name)
        if users is None:
            continue
        if name not in origins:
            raise BuildFailed(f"{source}: {name} is no weight of the model")
        modules = tuple(parameter.removesuffix(".weight") for parameter in origins[name].parameters)
        if name in outer:
            modules = () if all(use.gather for use in users) else (head,)
        rows, columns = tensor.dims if users[0].rows_first else reversed(tensor.dims)
        embeds = any(use.gather for use in users)
        units.append(Unit(name, origins[name], modules, rows, columns, embeds, name in outer))
    return units


def _matrices(model: nn.Module, unit: Unit) -> list[Tensor]:
    """Views [out, in] of the parameters that the unit is made of."""
    views = []
    for name in unit.origin.parameters:
        weight = model.get_parameter(name).detach()
        is_conv1d = isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
        views.append(weight.T if is_conv1d else weight)
    return views


def read_unit(model: nn.Module, unit: Unit) -> Tensor:
    """The weight fp32 [rows, columns], in the order of its parameters; a copy where it has several."""
    matrices = _matrices(model, unit)
    return (matrices[0] if len(matrices) == 1 else torch.cat(matrices)).float()


def _write_unit(model: nn.Module, unit: Unit, values: Tensor) -> None:
    matrices = _matrices(model, unit)
    for matrix, part in zip(matrices, values.split([len(matrix) for matrix in matrices])):
        matrix.copy_(part)


@contextmanager
def changed(
    model: nn.Module, units: Iterable[Unit], change: Callable[[Unit, Tensor], Tensor]
) -> Iterator[dict[Unit, Tensor]]:
    """The model with `change(unit, weight)` in the place of each weight; yields the original weights, which
    are put back at the end."""
    originals: dict[Unit, Tensor] = {}
    try:
        for unit in units:
            originals[unit] = read_unit(model, unit).clone()
            _write_unit(model, unit, change(unit, originals[unit]))
        yield originals
    finally:
        for unit, weight in originals.items():
            _write_unit(model, unit, weight)


# ---------------------------------------------------------------- the Fisher score


@dataclass(frozen=True)
class Moments:
    """E[g^2] by row and E[x^2] by column, fp32, of each way in which a weight is used.

    A weight that is embedding and head has two terms. The first is that of the product, if there is one.
    """

    terms: tuple[tuple[Tensor, Tensor], ...]

    @property
    def importance(self) -> Tensor:
        """[columns]: what an error in a column costs, for the methods that weight errors by it."""
        columns = self.terms[0][1]
        return columns.clamp(min=1e-6 * float(columns.mean()) + 1e-30)

    def fisher(self, error: Tensor, rows: Tensor | None = None) -> float:
        """1/2 sum E[g_r^2] error_rc^2 E[x_c^2], nats per token. `rows`: those that `error` has; the sum is
        then scaled up by the rows' shares of E[g^2]."""
        squared, total = error.square(), 0.0
        for by_row, by_column in self.terms:
            here = by_row if rows is None else by_row[rows]
            scale = 1.0 if rows is None else float(by_row.sum() / here.sum().clamp(min=1e-30))
            total += 0.5 * scale * float(here.double() @ (squared @ by_column).double())
        return total

    def fisher_of(self, weight: Tensor, choice: Choice) -> float:
        """The score of what `choice` does to `weight` [rows, columns], seen on some of its rows."""
        rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).round().long()
        some = weight[rows]
        return self.fisher(dequantize(choice.blocks(some, self.importance), choice.grid) - some, rows)


def moments(
    model: Any, units: Sequence[Unit], pieces: Sequence[Tensor], seed: int, progress: Progress = silent
) -> dict[str, Moments]:
    """Unit's name -> its moments over `pieces` (int64 [tokens] each), from one backward pass for each.

    `seed` draws the tokens whose likelihood is differentiated. The model is left in eval mode, its parameters
    without gradients.
    """
    model.eval().requires_grad_(False)
    embedding, generator = model.get_input_embeddings(), torch.Generator().manual_seed(seed)
    looked_up, scale = torch.zeros(len(embedding.weight)), 1.0  # Gemma scales what is looked up
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}  # "": of the embedding's output

    def add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
        squares = values.detach().reshape(-1, values.shape[-1]).float().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    def start(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Gradients begin at what the embedding gives."""
        nonlocal scale
        scale = float(output.detach().norm() / module.weight.detach()[args[0]].norm().clamp(min=1e-30))
        first = output.detach().requires_grad_()
        first.register_hook(lambda gradient: add(gradients, "", gradient))
        return first

    handles = [embedding.register_forward_hook(start)]
    for name in {name for unit in units for name in unit.modules}:
        module = model.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(lambda _, args, name=name: add(inputs, name, args[0])),
            module.register_full_backward_hook(
                lambda _, inner, outer, name=name: add(gradients, name, outer[0])
            ),
        ]
    try:
        for index, piece in enumerate(pieces):
            progress(index, len(pieces), "gradients on calibration text")
            likelihood = torch.log_softmax(
                model(input_ids=piece[None], use_cache=False).logits[0].float(), -1
            )
            drawn = torch.multinomial(likelihood.detach().exp(), 1, generator=generator)
            likelihood.gather(1, drawn).sum().backward()
            looked_up += torch.bincount(piece, minlength=len(looked_up)).float()
    finally:
        for handle in handles:
            handle.remove()
    tokens, result = sum(map(len, pieces)), {}
    for unit in units:
        terms = []
        if unit.modules:
            by_row = torch.cat([gradients[name] for name in unit.modules])
            terms.append((by_row / tokens, inputs[unit.modules[0]] / tokens))
        if unit.embeds:
            terms.append((looked_up / tokens, gradients[""] * scale**2 / tokens))
        result[unit.name] = Moments(tuple(terms))
    return result


# ---------------------------------------------------------------- measured KL


class Text:
    """Calibration text, and what the unrounded model says of every next token in it."""

    def __init__(self, model: nn.Module, pieces: Sequence[Tensor]) -> None:
        """pieces: int64 [tokens] each. Holds float32 [tokens, vocabulary]."""
        self.pieces = list(pieces)
        self._reference = [_log_probs(model, piece) for piece in self.pieces]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pieces))

    def kl(self, model: nn.Module) -> float:
        """KL(unrounded || model), mean over tokens, in nats."""
        return max(float(self.by_token(model).mean()), 0.0)

    def by_token(self, model: nn.Module) -> Tensor:
        """The same of each token, float64 [tokens]."""
        parts = []
        for piece, reference in zip(self.pieces, self._reference):
            terms = nn.functional.kl_div(
                _log_probs(model, piece), reference, reduction="none", log_target=True
            )
            parts.append(terms.sum(-1, dtype=torch.float64))
        return torch.cat(parts)


def loss(model: nn.Module, pieces: Sequence[Tensor]) -> float:
    """Mean negative log-likelihood of the pieces' own next tokens, in nats."""
    total, count = 0.0, 0
    for piece in pieces:
        log_probs = _log_probs(model, piece)[:-1]
        total -= float(log_probs.gather(1, piece[1:, None]).double().sum())
        count += len(log_probs)
    return total / count


@torch.no_grad()
def _log_probs(model: nn.Module, piece: Tensor) -> Tensor:
    """float32 [tokens, vocabulary]."""
    logits: Tensor = model(input_ids=piece[None], use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


@dataclass(frozen=True)
class Measured:
    """KL in nats per token that rounding one weight adds: to the unrounded model, and to one whose other
    weights are rounded already, with the standard error of the latter over tokens."""

    alone: float
    last: float
    error: float


def measure(
    model: nn.Module,
    units: Sequence[Unit],
    text: Text,
    change: Callable[[Unit, Tensor], Tensor],
    progress: Progress = silent,
) -> dict[str, Measured]:
    """Unit's name -> what it costs on `text` that `change` rounds its weight, alone and after all others."""
    alone, measured, steps = {}, {}, 2 * len(units)
    for index, unit in enumerate(units):
        progress(index, steps, "sensitivity of each weight")
        with changed(model, [unit], change):
            alone[unit.name] = text.kl(model)
    with changed(model, units, change) as originals:
        of_all = text.by_token(model)
        for index, unit in enumerate(units, start=len(units)):
            progress(index, steps, "sensitivity of each weight")
            with changed(model, [unit], lambda unit, _: originals[unit]):
                added = of_all - text.by_token(model)
            error = float(added.std()) / text.tokens**0.5
            measured[unit.name] = Measured(alone[unit.name], float(added.mean()), error)
    return measured


def shares(measured: dict[str, Measured]) -> dict[str, float]:
    """Each weight's share of the whole loss: the mean of what it adds alone and as the last one.

    What it adds last is a small difference of large figures. Where the text is too short to tell it, it is
    drawn to what the weight costs alone, times what all weights cost more among others (empirical Bayes: the
    measured value and the expected one are weighted by variance, the latter's taken as its square). No share
    is less than a quarter of what the weight costs alone.
    """
    alone, last = (sum(getattr(one, key) for one in measured.values()) for key in ("alone", "last"))
    ratio = max(last / max(alone, 1e-30), 0.25)
    result = {}
    for name, one in measured.items():
        expected = one.alone * ratio
        trust = expected**2 / max(expected**2 + one.error**2, 1e-60)
        added_last = trust * one.last + (1 - trust) * expected
        result[name] = max((one.alone + added_last) / 2, one.alone / 4)
    return result
