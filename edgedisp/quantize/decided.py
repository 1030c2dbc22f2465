"""A choice for each weight that another arm's search has made, applied to this arm's weights.

Twins are stored alike: if each arm had bits of its own choosing, a difference between their bundles would be
one of storage as well as of training, and their graphs would differ. So one arm's search decides for all, and
here the others follow it. How each weight is rounded on its grid, and what that costs, is this arm's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.quantize.assignment import Choice
from edgedisp.quantize.grid import Grid, dequantize
from edgedisp.quantize.made import Made
from edgedisp.quantize.methods import METHODS
from edgedisp.quantize.sensitivity import Text, loss, moments
from edgedisp.quantize.units import Unit, find_units, module_grids, read_unit, written


class Decided:
    """The weights of the bundle `source`, stored as `rows` (`by_tensor` of the deciding bundle's record) say.

    `model`, `pieces`, `blocks`, `seed` as in `mixed.Search`. BuildFailed if the rows are of another graph.
    """

    def __init__(
        self,
        source: Path,
        model: nn.Module,
        rows: Sequence[dict[str, Any]],
        pieces: Sequence[Tensor],
        blocks: Sequence[Tensor],
        *,
        accuracy_level: int = 4,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        self.model, self.pieces, self.blocks = model.eval(), list(pieces), list(blocks)
        self.units = find_units(source, model)
        self.assignment = {row["name"]: _choice(row, accuracy_level) for row in rows}
        if set(self.assignment) != {unit.name for unit in self.units}:
            raise BuildFailed(f"{source}: its weights are not those of the bundle whose search decides")
        self._seed, self._progress = seed, progress

    def add(self, made: Made, *, ends_alone: bool = False) -> None:
        """Round the weights into `made`; or embedding and head alone, which calibration leaves out."""
        known = moments(self.model, self.units, self.pieces, self._seed, self._progress)
        for unit in self.units:
            if unit.outer or not ends_alone:
                weight, choice = read_unit(self.model, unit), self.assignment[unit.name]
                made.add(weight, choice.blocks(weight, known[unit.name].importance), choice.grid)

    def module_grids(self) -> dict[str, Grid]:
        """Linear map of the layers -> its grid."""
        return module_grids(self.units, self.assignment)

    def cost(self, made: Made) -> dict[str, float]:
        """{measured_kl on the pieces, perplexity_increase on the blocks} of the model rounded as `made`."""
        text, before = Text(self.model, self.pieces), loss(self.model, self.blocks)

        def change(unit: Unit, weight: Tensor) -> Tensor:
            found = made.find(weight)
            if found is None:
                raise ValueError(f"{unit.name} is not among the blocks")
            return dequantize(*found)

        with written(self.model, self.units, change):
            kl, after = text.kl(self.model), loss(self.model, self.blocks)
        return {"measured_kl": kl, "perplexity_increase": math.expm1(after - before)}


def _choice(row: dict[str, Any], accuracy_level: int) -> Choice:
    method = row["method"] if row["method"] in METHODS else "k_quant"
    return Choice(Grid(row["bits"], row["group"], row["symmetric"]), method, accuracy_level)
