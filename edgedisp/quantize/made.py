"""Weights that were rounded outside the graph, found again in it by their values.

Calibrated methods work on the torch model, where activations are at hand; the graph joins weights (q, k and v
into one), turns them and calls them by other names, each exporter in its own way. A weight of the graph is
therefore looked up by its content: row by row, the next part is the one whose rows stand there.
"""

from __future__ import annotations

import hashlib
from typing import Generic, TypeVar

import torch
from torch import Tensor

from edgedisp.quantize.grid import Blocks, Grid, concatenate

_Known = TypeVar("_Known")


class Parts(Generic[_Known]):
    """What is known of weights, by the weights' own values."""

    def __init__(self) -> None:
        # first row -> of each weight that starts with it: digest of all rows, their number, what is known
        self._parts: dict[bytes, list[tuple[bytes, int, _Known]]] = {}

    def put(self, weight: Tensor, known: _Known) -> None:
        """Remember `known` of fp32 `weight` [out, in]."""
        self._parts.setdefault(_digest(weight[:1]), []).append((_digest(weight), len(weight), known))

    def get(self, weight: Tensor) -> list[_Known] | None:
        """What is known of `weight` [out, in], which may be several known weights one above the other."""
        found: list[_Known] = []
        row = 0
        while row < len(weight):
            part = self._starting(weight, row)
            if part is None:
                return None
            row += part[0]
            found.append(part[1])
        return found

    def _starting(self, weight: Tensor, row: int) -> tuple[int, _Known] | None:
        for digest, rows, known in self._parts.get(_digest(weight[row : row + 1]), []):
            if digest == _digest(weight[row : row + rows]):
                return rows, known
        return None


class Made:
    """Blocks of weights and their grids."""

    def __init__(self) -> None:
        self._parts: Parts[tuple[Blocks, Grid]] = Parts()

    def add(self, weight: Tensor, blocks: Blocks, grid: Grid) -> None:
        """`blocks` on `grid` stand for fp32 `weight` [out, in]."""
        self._parts.put(weight, (blocks, grid))

    def find(self, weight: Tensor) -> tuple[Blocks, Grid] | None:
        """The blocks of `weight` [out, in] and their grid. ValueError if its parts lie on several grids."""
        parts = self._parts.get(weight)
        if not parts:
            return None
        grids = {grid for _, grid in parts}
        if len(grids) > 1:
            raise ValueError(f"one stored weight was rounded to several grids: {sorted(map(str, grids))}")
        return concatenate([blocks for blocks, _ in parts]), grids.pop()


def _digest(rows: Tensor) -> bytes:
    """Of the values and the shape; -0.0 and 0.0 are the same, as exporters may add a zero."""
    plain = (rows.detach().to("cpu", torch.float32) + 0.0).contiguous()
    digest = hashlib.sha256(repr(tuple(plain.shape)).encode())
    digest.update(plain.numpy().data)
    return digest.digest()
