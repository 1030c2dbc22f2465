"""Weights that were rounded outside the graph, found again in it by their values.

Calibrated methods work on the torch model, where activations are at hand; the graph joins weights (q, k and v
into one), turns them and calls them by other names, each exporter in its own way. A weight of the graph is
therefore looked up by its content: row by row, the next part is the one whose rows stand there.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from edgedisp.quantize.grid import Blocks, Grid, concatenate


class Made:
    """Blocks of weights, by the weights' own values."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._parts: dict[bytes, list[tuple[bytes, Blocks]]] = {}  # first row -> digests of all rows, blocks

    def add(self, weight: Tensor, blocks: Blocks) -> None:
        """`blocks` stand for fp32 `weight` [out, in]."""
        self._parts.setdefault(_digest(weight[:1]), []).append((_digest(weight), blocks))

    def find(self, weight: Tensor) -> Blocks | None:
        """The blocks of `weight` [out, in], which may be several known weights one above the other."""
        parts: list[Blocks] = []
        row = 0
        while row < len(weight):
            part = self._starting(weight, row)
            if part is None:
                return None
            parts.append(part)
            row += len(part.q)
        return concatenate(parts)

    def _starting(self, weight: Tensor, row: int) -> Blocks | None:
        for digest, blocks in self._parts.get(_digest(weight[row : row + 1]), []):
            if digest == _digest(weight[row : row + len(blocks.q)]):
                return blocks
        return None


def _digest(rows: Tensor) -> bytes:
    """Of the values and the shape; -0.0 and 0.0 are the same, as exporters may add a zero."""
    plain = (rows.detach().to("cpu", torch.float32) + 0.0).contiguous()
    digest = hashlib.sha256(repr(tuple(plain.shape)).encode())
    digest.update(plain.numpy().data)
    return digest.digest()
