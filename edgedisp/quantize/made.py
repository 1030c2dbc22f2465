"""Weights that were rounded outside the graph, found again in it by their values.

Calibrated methods work on the torch model, where activations are at hand; the graph joins weights (q, k and v
into one), turns them, sorts their rows (GPT-NeoX's queries, keys and values) and calls them by other names,
each exporter in its own way. A weight of the graph is therefore looked up by its content. Rows are what a
grid rounds one by one, so rows in another order carry their blocks along exactly.

First, row by row, the next part is the weight whose rows stand there in their order. Where none does, the
rows must be those of whole known weights in any order; rows of equal values are then taken as they come.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from edgedisp.quantize.grid import Blocks, Grid, concatenate, take_rows


@dataclass(frozen=True)
class _Part:
    """A known weight: what stands in each row, and the blocks of all."""

    rows: list[bytes]
    blocks: Blocks


class Made:
    """Blocks of weights, by the weights' own values."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._with_row: dict[bytes, list[_Part]] = defaultdict(list)  # a row -> the weights that have it

    def add(self, weight: Tensor, blocks: Blocks) -> None:
        """`blocks` stand for fp32 `weight` [out, in]."""
        part = _Part(_digests(weight), blocks)
        for row in dict.fromkeys(part.rows):
            self._with_row[row].append(part)

    def find(self, weight: Tensor) -> Blocks | None:
        """The blocks of `weight` [out, in]: known weights one above the other, or their rows in any order."""
        rows = _digests(weight)
        return self._in_order(rows) or self._in_any_order(rows)

    def _in_order(self, rows: list[bytes]) -> Blocks | None:
        parts: list[Blocks] = []
        row = 0
        while row < len(rows):
            here = (part for part in self._known(rows[row]) if rows[row : row + len(part.rows)] == part.rows)
            part = next(here, None)
            if part is None:
                return None
            parts.append(part.blocks)
            row += len(part.rows)
        return concatenate(parts)

    def _in_any_order(self, rows: list[bytes]) -> Blocks | None:
        missing = Counter(rows)
        places: dict[bytes, list[int]] = defaultdict(list)  # of a row among the rows of all parts found
        parts: list[Blocks] = []
        found = 0
        for row in rows:
            if not missing[row]:
                continue
            part = next((p for p in self._known(row) if Counter(p.rows) <= missing), None)
            if part is None:
                return None
            missing -= Counter(part.rows)
            for known in part.rows:
                places[known].append(found)
                found += 1
            parts.append(part.blocks)
        order = [places[row].pop(0) for row in rows]
        return take_rows(concatenate(parts), torch.tensor(order))

    def _known(self, row: bytes) -> list[_Part]:
        return self._with_row.get(row, [])


def _digests(weight: Tensor) -> list[bytes]:
    """Of each row's values and their number; -0.0 and 0.0 are the same, as exporters may add a zero."""
    plain = (weight.detach().to("cpu", torch.float32) + 0.0).contiguous().numpy()
    return [hashlib.blake2b(row, digest_size=16).digest() for row in plain]
