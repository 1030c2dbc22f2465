"""Weights that were rounded outside the graph, found again in it by their values.

Calibrated methods work on the torch model, where activations are at hand; the graph joins weights (q, k and v
into one), turns them, puts their rows into another order (partial rotary positions) and calls them by other
names, each exporter in its own way. A weight of the graph is therefore looked up by its content, row by row:
first as known weights one above the other, then with their rows in any order. Rows are rounded one by one, so
both are exact. All rows must be those of whole known weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from edgedisp.quantize.grid import Blocks, Grid, concatenate, take_rows

Known = TypeVar("Known")
ROWS = 4096  # copied at a time


@dataclass(frozen=True)
class _Part(Generic[Known]):
    """A known weight: what stands in each row, and what is known of it."""

    rows: list[bytes]
    known: Known


@dataclass(frozen=True)
class Found(Generic[Known]):
    """The known weights that a weight is made of. `order` int64 [out]: for each of its rows, which one it is
    of theirs, put one above the other; None where they stand so already."""

    known: list[Known]
    order: Tensor | None = None


class Parts(Generic[Known]):
    """What is known of weights, by the weights' own values."""

    def __init__(self) -> None:
        self._with_row: dict[bytes, list[_Part[Known]]] = defaultdict(list)  # a row -> weights that have it

    def put(self, weight: Tensor, known: Known) -> None:
        """Remember `known` of fp32 `weight` [out, in]."""
        part = _Part(_digests(weight), known)
        for row in dict.fromkeys(part.rows):
            self._with_row[row].append(part)

    def get(self, weight: Tensor) -> Found[Known] | None:
        """The known weights in `weight` [out, in], one above the other or with their rows in any order."""
        rows = _digests(weight)
        return self._in_order(rows) or self._in_any_order(rows)

    def _in_order(self, rows: list[bytes]) -> Found[Known] | None:
        found: list[Known] = []
        row = 0
        while row < len(rows):
            here = (part for part in self._of(rows[row]) if rows[row : row + len(part.rows)] == part.rows)
            part = next(here, None)
            if part is None:
                return None
            found.append(part.known)
            row += len(part.rows)
        return Found(found)

    def _in_any_order(self, rows: list[bytes]) -> Found[Known] | None:
        missing = Counter(rows)
        places: dict[bytes, list[int]] = defaultdict(list)  # of a row among the rows of all parts found
        found: list[Known] = []
        above = 0
        for row in rows:
            if not missing[row]:
                continue
            part = next((one for one in self._of(row) if Counter(one.rows) <= missing), None)
            if part is None:
                return None
            missing -= Counter(part.rows)
            for known in part.rows:
                places[known].append(above)
                above += 1
            found.append(part.known)
        return Found(found, torch.tensor([places[row].pop(0) for row in rows]))

    def _of(self, row: bytes) -> list[_Part[Known]]:
        return self._with_row.get(row, [])


class Made:
    """Blocks of weights and their grids."""

    def __init__(self) -> None:
        self.grids: set[Grid] = set()
        self._parts: Parts[tuple[Blocks, Grid]] = Parts()

    def add(self, weight: Tensor, blocks: Blocks, grid: Grid) -> None:
        """`blocks` on `grid` stand for fp32 `weight` [out, in]."""
        self.grids.add(grid)
        self._parts.put(weight, (blocks, grid))

    def find(self, weight: Tensor) -> tuple[Blocks, Grid] | None:
        """The blocks of `weight` [out, in] and their grid. ValueError if its parts lie on several grids."""
        found = self._parts.get(weight)
        if found is None:
            return None
        grids = {grid for _, grid in found.known}
        if len(grids) > 1:
            raise ValueError(
                f"parts of one weight were rounded to different grids: {sorted(map(str, grids))}"
            )
        blocks = concatenate([blocks for blocks, _ in found.known])
        return blocks if found.order is None else take_rows(blocks, found.order), grids.pop()


def _digests(weight: Tensor) -> list[bytes]:
    """Of each row's values and their number; -0.0 and 0.0 are the same, as exporters may add a zero."""
    found: list[bytes] = []
    for first in range(0, len(weight), ROWS):
        rows = weight[first : first + ROWS].detach().to("cpu", torch.float32) + 0.0
        found += (hashlib.blake2b(row, digest_size=16).digest() for row in rows.contiguous().numpy())
    return found
