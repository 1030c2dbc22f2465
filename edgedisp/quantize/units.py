"""The weights of a graph as parts of the torch model: what is rounded together is one unit.

A graph joins q, k and v, or gate and up, into one stored weight, which has one grid. So the unit of a choice
is the graph's weight, and its parts are the torch modules whose weights stand in it one above the other.
They are found by their values (`made.py`), the embedding and the head by their place in the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BuildFailed
from edgedisp.quantize.assignment import Choice, ends
from edgedisp.quantize.calibrate import LINEAR
from edgedisp.quantize.grid import Grid
from edgedisp.quantize.made import Parts
from edgedisp.quantize.rewrite import weights_of
from edgedisp.quantize.store import GRAPH, TensorReader


@dataclass(frozen=True)
class Unit:
    """A weight [rows, columns] of the graph. `modules`: the linear maps it is made of, in the order of its
    rows; `embeds`: it is also (or only) the embedding; `outer`: embedding or head."""

    name: str
    modules: tuple[str, ...]
    rows: int
    columns: int
    embeds: bool
    outer: bool

    @property
    def parameters(self) -> int:
        return self.rows * self.columns


def find_units(source: Path, model: nn.Module) -> list[Unit]:
    """The units of the fp32 bundle `source`, in the graph's order, as parts of the `model` it was made of.

    BuildFailed names a weight of the graph that is none of the model's.
    """
    known: Parts[str] = Parts()
    for name, module in model.named_modules():
        if isinstance(module, LINEAR):
            known.put(weight_of(module), name)
    uses = weights_of(source)
    outside, reader = ends(uses), TensorReader(source)
    head = _name_of(model, model.get_output_embeddings())  # type: ignore[operator]
    found = []
    for tensor in onnx.load(source / GRAPH, load_external_data=False).graph.initializer:
        users = uses.get(tensor.name)
        if users is None:
            continue
        stored = torch.from_numpy(reader.read(tensor))
        values = stored if users[0].rows_first else stored.T
        outer = tensor.name in outside
        if outer:
            modules = [head] if any(not use.gather for use in users) else []
        else:
            parts = known.get(values)
            modules = [] if parts is None else parts.known
            if not modules:
                raise BuildFailed(f"{source}: {tensor.name} is no weight of the model that was calibrated")
        embeds = any(use.gather for use in users)
        found.append(Unit(tensor.name, tuple(modules), len(values), values.shape[1], embeds, outer))
    return found


def _name_of(model: nn.Module, wanted: Any) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def weight_of(module: Any) -> Tensor:
    """[out, in], a view."""
    return module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()


def parameters_of(model: nn.Module, unit: Unit) -> list[str]:
    """The parameters that the unit is made of, by name; a tied weight by both of its names."""
    modules = list(unit.modules)
    if unit.embeds:
        modules.append(_name_of(model, model.get_input_embeddings()))  # type: ignore[operator]
    return [f"{name}.weight" for name in modules]


def read_unit(model: nn.Module, unit: Unit) -> Tensor:
    """The weight fp32 [rows, columns]; a copy where it has several parts."""
    if not unit.modules:
        return weight_of(model.get_input_embeddings()).float()  # type: ignore[operator]
    return torch.cat([weight_of(model.get_submodule(name)) for name in unit.modules]).float()


@torch.no_grad()
def write_unit(model: nn.Module, unit: Unit, values: Tensor) -> None:
    """Put [rows, columns] into the model in place. Where embedding and head are tied, into both."""
    if not unit.modules:
        weight_of(model.get_input_embeddings()).copy_(values)  # type: ignore[operator]
        return
    row = 0
    for name in unit.modules:
        weight = weight_of(model.get_submodule(name))
        weight.copy_(values[row : row + len(weight)])
        row += len(weight)


class Aside:
    """Weights fp32 [rows, columns] in a file: those of a whole model would be a second model in memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: dict[Unit, int] = {}

    def __iter__(self) -> Iterator[Unit]:
        return iter(self._places)

    def put(self, unit: Unit, weight: Tensor) -> None:
        self._places[unit] = self._file.seek(0, SEEK_END)
        self._file.write(weight.detach().cpu().contiguous().numpy().data)

    def get(self, unit: Unit) -> Tensor:
        weight = np.empty((unit.rows, unit.columns), np.float32)
        self._file.seek(self._places[unit])
        self._file.readinto(weight.data)  # type: ignore[attr-defined]
        return torch.from_numpy(weight)


@contextmanager
def written(
    model: nn.Module, units: Iterable[Unit], change: Callable[[Unit, Tensor], Tensor]
) -> Iterator[Aside]:
    """The model with `change(unit, weight)` in the place of each weight [rows, columns] of `units`.

    The old ones, which are given, are put aside meanwhile and put back at the end.
    """
    with tempfile.TemporaryFile() as file:
        before = Aside(file)
        try:
            for unit in units:
                weight = read_unit(model, unit)
                before.put(unit, weight)
                write_unit(model, unit, change(unit, weight))
            yield before
        finally:
            for unit in before:
                write_unit(model, unit, before.get(unit))


def module_grids(units: Iterable[Unit], chosen: Mapping[str, Choice]) -> dict[str, Grid]:
    """Linear map of the layers -> the grid of its unit, for a method that goes through the model itself."""
    inner = (unit for unit in units if not unit.outer)
    return {name: chosen[unit.name].grid for unit in inner for name in unit.modules}
