"""Which torch parameters a weight of the graph is made of, as `weight_map.json` of an fp32 bundle says.

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

from edgedisp.core.errors import BuildFailed
from edgedisp.graph.export import WEIGHT_MAP
from edgedisp.quantize.grid import Blocks, concatenate, take_rows


@dataclass(frozen=True, eq=False)
class Origin:
    """The torch parameters of one graph weight; `rows` int64 [out] where the graph orders them otherwise."""

    parameters: tuple[str, ...]
    transposed: bool
    rows: Tensor | None = None

    def weight(self, tensors: Mapping[str, Tensor], rows_first: bool) -> Tensor:
        """The graph weight fp32 [out, in]. `rows_first`: the initializer is stored so. KeyError for a
        parameter that `tensors` lacks."""
        parts = [tensors[name].detach().float() for name in self.parameters]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if rows_first == self.transposed:  # Conv1D keeps [in, out]
            whole = whole.T
        return whole if self.rows is None else whole[self.rows]

    def blocks(self, by_parameter: Mapping[str, Blocks]) -> Blocks | None:
        """The blocks of the graph weight from those of its parameters; None if there are none of them."""
        if not all(name in by_parameter for name in self.parameters):
            return None
        whole = concatenate([by_parameter[name] for name in self.parameters])
        return self.in_graph_order(whole)

    def in_graph_order(self, blocks: Blocks) -> Blocks:
        """Blocks of the concatenated parameters, their rows as the graph stores them."""
        return blocks if self.rows is None else take_rows(blocks, self.rows)


def read_weight_map(bundle: Path) -> dict[str, Origin]:
    """Initializer -> its origin. BuildFailed for a bundle without the file."""
    path = bundle / WEIGHT_MAP
    if not path.is_file():
        raise BuildFailed(f"{bundle}: there is no {WEIGHT_MAP}; export the model again")
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: Origin(
            tuple(entry["torch"]),
            entry["transposed"],
            torch.tensor(entry["rows"]) if "rows" in entry else None,
        )
        for name, entry in entries.items()
    }
