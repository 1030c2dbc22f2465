"""Which torch parameters a weight of the graph is made of: `weight_map.json` of an fp32 bundle.

The parameters are concatenated along dimension 0, `rows` then picks rows, and `transposed` says that the
initializer is the transpose of that (graph/export.py writes the file).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgedisp.graph.export import WEIGHT_MAP
from edgedisp.quantize.grid import Blocks, concatenate


@dataclass(frozen=True, eq=False)
class Origin:
    """The torch parameters of one graph weight; `row_order` int64 [out] where the graph orders rows
    otherwise."""

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
        """The blocks of the graph weight from those of its parameters; None if one has none."""
        if not all(name in by_parameter for name in self.parameters):
            return None
        return self.in_graph_order(concatenate([by_parameter[name] for name in self.parameters]))

    def in_graph_order(self, blocks: Blocks) -> Blocks:
        """Blocks of the concatenated parameters, with the graph's order of rows."""
        return blocks if self.row_order is None else blocks.rows(self.row_order)


def read_weight_map(bundle: Path) -> dict[str, Origin]:
    """Initializer -> its origin."""
    entries = json.loads((bundle / WEIGHT_MAP).read_text(encoding="utf-8"))
    orders = {name: torch.tensor(entry["rows"]) for name, entry in entries.items() if "rows" in entry}
    return {
        name: Origin(tuple(entry["torch"]), entry["transposed"], orders.get(name))
        for name, entry in entries.items()
    }
