"""What a weight could be stored as in a search: grids and methods, their bytes, their predicted loss.

4 bits in groups of 16 to 128, with and without zero points, each by the method that the Fisher score likes
best, and 8 bits without zero points (there, rounding to nearest loses next to nothing). The best method is
found in groups of 32 and taken for the other widths. Left out: 2 bits, which onnxruntime computes in fp32, so
that they are slower than 4, and which models this small do not survive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from edgedisp.quantize.assignment import Choice
from edgedisp.quantize.grid import Grid
from edgedisp.quantize.search import Option
from edgedisp.quantize.sensitivity import Moments, fisher_of
from edgedisp.quantize.store import INLINE_BYTES, PAGE
from edgedisp.quantize.units import Unit

METHODS_TRIED = ("rtn", "k_quant")
GROUPS_TRIED = (16, 32, 64, 128)
FOUR_BITS = tuple(Grid(4, group, symmetric) for symmetric in (False, True) for group in GROUPS_TRIED)
EIGHT_BITS = tuple(Grid(8, group, True) for group in (32, 64, 128))
USUAL = Choice(Grid(4, 32, False))  # what is measured of each weight, and the uniform bundle's body
OUTER = Choice(Grid(8, 32, True))  # the uniform bundle's embedding and head


@dataclass(frozen=True)
class Candidates:
    """Of one unit: choices, what they cost in bytes, and their predicted KL."""

    unit: Unit
    choices: tuple[Choice, ...]
    options: tuple[Option, ...]


def candidates(
    unit: Unit, weight: Tensor, known: Moments, scale: float, methods: Sequence[str], accuracy_level: int
) -> Candidates:
    """The candidates for `unit`, whose values are `weight`. `scale`: measured KL over Fisher score."""
    found: list[tuple[Choice, float]] = []
    for symmetric in (False, True):
        tried = [Choice(Grid(4, 32, symmetric), name, accuracy_level) for name in methods]
        scores = [fisher_of(weight, choice, known) for choice in tried]
        best = min(range(len(tried)), key=scores.__getitem__)
        found.append((tried[best], scores[best]))
        others = (Grid(4, group, symmetric) for group in GROUPS_TRIED if group != 32)
        found += _scored(weight, known, others, tried[best].method, accuracy_level)
    found += _scored(weight, known, EIGHT_BITS, "rtn", accuracy_level)
    options = (
        Option(stored_bytes(unit.rows, unit.columns, choice.grid), scale * score) for choice, score in found
    )
    return Candidates(unit, tuple(choice for choice, _ in found), tuple(options))


def _scored(
    weight: Tensor, known: Moments, grids: Iterable[Grid], method: str, accuracy_level: int
) -> list[tuple[Choice, float]]:
    choices = [Choice(grid, method, accuracy_level) for grid in grids]
    return [(choice, fisher_of(weight, choice, known)) for choice in choices]


def stored_bytes(rows: int, columns: int, grid: Grid) -> int:
    """Of a weight's tensors in the files: large ones in whole pages, small ones as they are."""
    stored = grid.empty(rows, columns)
    arrays = (stored.data, stored.scales, stored.zero_points)
    parts = [array.nbytes for array in arrays if array is not None]
    return sum(part if part <= INLINE_BYTES else part + -part % PAGE for part in parts)


def read_bytes(unit: Unit, grid: Grid) -> int:
    """Of a weight in memory, where its scales are fp32."""
    stored = grid.empty(unit.rows, unit.columns)
    return stored.size_bytes + stored.scales.nbytes
