"""Weights that were rounded outside the graph, found again in it by their values.

Calibrated methods work on the torch model, where activations are at hand; the graph joins weights (q, k and v
into one), turns them and calls them by other names, each exporter in its own way. A weight of the graph is
therefore looked up by its content: row by row, the next part is the one whose rows stand there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from edgedisp.quantize.grid import Blocks, Grid, concatenate


@dataclass(frozen=True)
class _Part:
    """A weight that was rounded: the digest of all its values, and what they became."""

    digest: bytes
    blocks: Blocks
    grid: Grid


class Made:
    """Blocks of weights, by the weights' own values."""

    def __init__(self) -> None:
        self.grids: set[Grid] = set()
        self._parts: dict[bytes, list[_Part]] = {}  # by the first row

    def add(self, weight: Tensor, blocks: Blocks, grid: Grid) -> None:
        """`blocks` on `grid` stand for fp32 `weight` [out, in]."""
        self.grids.add(grid)
        self._parts.setdefault(_digest(weight[:1]), []).append(_Part(_digest(weight), blocks, grid))

    def find(self, weight: Tensor) -> tuple[Blocks, Grid] | None:
        """Blocks and grid of `weight` [out, in], which may be several known weights one above the other.

        ValueError if those lie on different grids: one tensor of a graph has one.
        """
        parts: list[_Part] = []
        row = 0
        while row < len(weight):
            part = self._starting(weight, row)
            if part is None:
                return None
            parts.append(part)
            row += len(part.blocks.q)
        grids = {part.grid for part in parts}
        if len(grids) > 1:
            raise ValueError(f"parts of one weight were rounded to different grids: {grids}")
        return concatenate([part.blocks for part in parts]), parts[0].grid

    def _starting(self, weight: Tensor, row: int) -> _Part | None:
        for part in self._parts.get(_digest(weight[row : row + 1]), []):
            if part.digest == _digest(weight[row : row + len(part.blocks.q)]):
                return part
        return None


def _digest(rows: Tensor) -> bytes:
    """Of the values and the shape; -0.0 and 0.0 are the same, as exporters may add a zero."""
    plain = (rows.detach().to("cpu", torch.float32) + 0.0).contiguous()
    digest = hashlib.sha256(repr(tuple(plain.shape)).encode())
    digest.update(plain.numpy().data)
    return digest.digest()
