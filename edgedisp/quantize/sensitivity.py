"""What rounding a weight costs: KL(model || model with that weight rounded), in nats per token.

Each weight is measured with one usual rounding, alone and as the last of all (`measure`); the mean of the two
is its Shapley value if the loss is quadratic in the errors (`shares`). Other candidates follow by the Fisher
score, the second-order term of the KL with tokens, rows and columns taken as independent (the diagonal of
K-FAC, Martens and Grosse 2015), from one backward pass for inputs x and gradients g of the log-likelihood of
tokens drawn from the model:

    fisher(dW) = 1/2 sum_rc E[g_r^2] dW_rc^2 E[x_c^2]

On SmolLM2-135M its rank correlation with the measured KL over 30 weights at 4 bits is 0.94.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.graph.onnx_graph import GRAPH
from edgedisp.quantize.grid import dequantize
from edgedisp.quantize.onnx_rewrite import Choice, weights_of
from edgedisp.quantize.onnx_weights import outer_weights
from edgedisp.quantize.weight_map import Origin, read_weight_map

ROWS = 64  # of a weight, rounded to see what a candidate costs


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

    BuildFailed names a weight of the graph that is none of the model's.
    """
    origins, uses = read_weight_map(source), weights_of(source)
    outer = outer_weights(uses)
    output = model.get_output_embeddings()  # type: ignore[operator]
    head = next(name for name, module in model.named_modules() if module is output)
    units = []
    for tensor in onnx.load(source / GRAPH, load_external_data=False).graph.initializer:
        users, origin = uses.get(tensor.name), origins.get(tensor.name)
        if users is None:
            continue
        rows, columns = tensor.dims if users[0].rows_first else reversed(tensor.dims)
        if origin is None or rows * columns != sum(model.get_parameter(n).numel() for n in origin.parameters):
            raise BuildFailed(f"{source}: {tensor.name} is no whole weight of the model")
        modules = tuple(name.removesuffix(".weight") for name in origin.parameters)
        if tensor.name in outer:
            modules = (head,) if any(not use.gather for use in users) else ()
        embeds = any(use.gather for use in users)
        units.append(Unit(tensor.name, origin, modules, rows, columns, embeds, tensor.name in outer))
    return units


def _matrices(model: nn.Module, unit: Unit) -> list[Tensor]:
    """Views [out, in] of the parameters that the unit is made of."""
    views = []
    for name in unit.origin.parameters:
        turned = isinstance(model.get_submodule(name.removesuffix(".weight")), Conv1D)
        views.append(model.get_parameter(name).detach().T if turned else model.get_parameter(name).detach())
    return views


def read_unit(model: nn.Module, unit: Unit) -> Tensor:
    """The weight fp32 [rows, columns], in the order of its parameters; a copy where it has several."""
    matrices = _matrices(model, unit)
    return (matrices[0] if len(matrices) == 1 else torch.cat(matrices)).float()


def write_unit(model: nn.Module, unit: Unit, values: Tensor) -> None:
    """Put [rows, columns] into the model in place."""
    matrices = _matrices(model, unit)
    for matrix, part in zip(matrices, values.split([len(matrix) for matrix in matrices])):
        matrix.copy_(part)


@contextmanager
def written(
    model: nn.Module, units: Iterable[Unit], change: Callable[[Unit, Tensor], Tensor]
) -> Iterator[dict[Unit, Tensor]]:
    """The model with `change(unit, weight)` in the place of each weight; yields the original weights, which
    are put back at the end."""
    originals: dict[Unit, Tensor] = {}
    try:
        for unit in units:
            originals[unit] = read_unit(model, unit).clone()
            write_unit(model, unit, change(unit, originals[unit]))
        yield originals
    finally:
        for unit, weight in originals.items():
            write_unit(model, unit, weight)


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


@dataclass(frozen=True)
class Measured:
    """KL in nats per token that rounding one weight adds: to the unrounded model, and to one whose other
    weights are rounded already, with the standard error of the latter over tokens."""

    alone: float
    last: float
    error: float


class Text:
    """Calibration text, and what the unrounded model says of every next token in it."""

    def __init__(self, model: nn.Module, pieces: Sequence[Tensor]) -> None:
        """pieces: int64 [tokens] each. Holds float32 [tokens, vocabulary]. BadInput without any."""
        if not pieces:
            raise BadInput("no calibration text: at least one block of tokens is needed")
        self.pieces = list(pieces)
        self._reference = [_log_probabilities(model, piece) for piece in self.pieces]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pieces))

    def kl(self, model: nn.Module) -> float:
        """KL(unrounded || model), mean over tokens, in nats."""
        return max(float(self.by_token(model).mean()), 0.0)

    def by_token(self, model: nn.Module) -> Tensor:
        """The same of each token, float64 [tokens]."""
        found = []
        for piece, known in zip(self.pieces, self._reference):
            here = _log_probabilities(model, piece)
            terms = nn.functional.kl_div(here, known, reduction="none", log_target=True)
            found.append(terms.sum(-1, dtype=torch.float64))
        return torch.cat(found)


@torch.no_grad()
def loss(model: nn.Module, pieces: Sequence[Tensor]) -> float:
    """Mean negative log-likelihood of the pieces' own next tokens, in nats."""
    total, count = 0.0, 0
    for piece in pieces:
        found = _log_probabilities(model, piece)[:-1]
        total -= float(found.gather(1, piece[1:, None]).double().sum())
        count += len(found)
    return total / count


@torch.no_grad()
def _log_probabilities(model: nn.Module, piece: Tensor) -> Tensor:
    """float32 [tokens, vocabulary]."""
    logits: Tensor = model(input_ids=piece[None], use_cache=False).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def moments(
    model: nn.Module,
    units: Sequence[Unit],
    pieces: Sequence[Tensor],
    seed: int,
    progress: Progress = silent,
) -> dict[str, Moments]:
    """Unit's name -> its moments over `pieces` (int64 [tokens] each), from one backward pass for each.

    `seed` draws the tokens whose likelihood is differentiated. The model is left in eval mode.
    """
    model.eval()
    names = {name for unit in units for name in unit.modules}
    gathered = _Gathered(model)
    generator = torch.Generator().manual_seed(seed)
    with _frozen(model), gathered.watching(names):
        for done, piece in enumerate(pieces):
            progress(done, len(pieces), "gradients on calibration text")
            likelihood = torch.log_softmax(
                model(input_ids=piece[None], use_cache=False).logits[0].float(), dim=-1
            )
            drawn = torch.multinomial(likelihood.detach().exp(), 1, generator=generator)
            likelihood.gather(1, drawn).sum().backward()
            gathered.count(piece)
    return {unit.name: gathered.moments(unit) for unit in units}


class _Gathered:
    """Sums of x^2 and g^2 over tokens, by module; of the embedding, how often each row is looked up."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.looked_up = torch.zeros(len(self.embedding.weight))
        self.scale = 1.0  # of what is looked up; Gemma multiplies it
        self.tokens = 0

    @contextmanager
    def watching(self, names: set[str]) -> Iterator[None]:
        handles = [self.embedding.register_forward_hook(self._start)]
        for name in names:
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._before(name)))
            handles.append(module.register_full_backward_hook(self._after(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _start(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Gradients begin at what the embedding gives."""
        plain = module.weight.detach()[args[0]]
        self.scale = float(output.detach().norm() / plain.norm().clamp(min=1e-30))
        start = output.detach().requires_grad_()
        start.register_hook(lambda gradient: self._add(self.gradients, "", gradient))
        return start

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._add(self.inputs, name, args[0].detach())

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, inner: Any, outer: tuple[Tensor, ...]) -> None:
            self._add(self.gradients, name, outer[0])

        return hook

    def _add(self, sums: dict[str, Tensor], name: str, values: Tensor) -> None:
        found = values.reshape(-1, values.shape[-1]).float().square().sum(0)
        sums[name] = sums[name] + found if name in sums else found

    def count(self, piece: Tensor) -> None:
        self.looked_up += torch.bincount(piece, minlength=len(self.looked_up)).float()
        self.tokens += len(piece)

    def moments(self, unit: Unit) -> Moments:
        terms = []
        if unit.modules:
            by_row = torch.cat([self.gradients[name] for name in unit.modules])
            terms.append((by_row / self.tokens, self.inputs[unit.modules[0]] / self.tokens))
        if unit.embeds:
            by_column = self.gradients[""] * self.scale**2
            terms.append((self.looked_up / self.tokens, by_column / self.tokens))
        return Moments(tuple(terms))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Without gradients of the weights, which nobody asks for here."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def fisher_of(weight: Tensor, choice: Choice, known: Moments) -> float:
    """`known.fisher` of what `choice` does to `weight` [rows, columns], seen on some of its rows."""
    count = min(ROWS, len(weight))
    rows = torch.linspace(0, len(weight) - 1, count).round().long()
    some = weight[rows]
    return known.fisher(dequantize(choice.blocks(some, known.importance), choice.grid) - some, rows)


def measure(
    model: nn.Module,
    units: Sequence[Unit],
    text: Text,
    change: Callable[[Unit, Tensor], Tensor],
    progress: Progress = silent,
) -> dict[str, Measured]:
    """Unit's name -> what it costs on `text` that `change` rounds its weight, alone and after all others."""
    alone, found, steps = {}, {}, 2 * len(units)
    for done, unit in enumerate(units):
        progress(done, steps, "sensitivity of each weight")
        with written(model, [unit], change):
            alone[unit.name] = text.kl(model)
    with written(model, units, change) as originals:
        whole = text.by_token(model)
        for done, unit in enumerate(units, start=len(units)):
            progress(done, steps, "sensitivity of each weight")
            with written(model, [unit], lambda unit, _: originals[unit]):
                added = whole - text.by_token(model)
            error = float(added.std()) / text.tokens**0.5
            found[unit.name] = Measured(alone[unit.name], float(added.mean()), error)
    return found


def shares(measured: dict[str, Measured]) -> dict[str, float]:
    """Each weight's share of the whole loss: the mean of what it adds alone and as the last one.

    What it adds last is a small difference of large figures. Where the text is too short to tell it, it is
    drawn to what the weight costs alone, times what all weights cost more among others (empirical Bayes: the
    measured value and the expected one are weighted by variance, the latter's taken as its square). No share
    is less than a quarter of what the weight costs alone.
    """
    ratio = sum(one.last for one in measured.values()) / max(
        sum(one.alone for one in measured.values()), 1e-30
    )
    found = {}
    for name, one in measured.items():
        expected = one.alone * max(ratio, 0.25)
        trust = expected**2 / max(expected**2 + one.error**2, 1e-60)
        last = trust * one.last + (1 - trust) * expected
        found[name] = max((one.alone + last) / 2, one.alone / 4)
    return found
