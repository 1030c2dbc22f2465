"""Where the rows of a graph's weight come from in the torch model, found by their values.

Graphs join weights (q, k and v into one), turn them, order rows by head, and call them by other names, each
exporter in its own way. The values are the same, bit for bit, in an fp32 bundle and the model that it was
made from. So a row of the graph is looked up among all rows of the model, and the same rows of another model
of the same shape (the base, a twin) are then what stands in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Place = tuple[str, int]
"""A tensor of the model and a row of it."""


@dataclass(frozen=True)
class Run:
    """Rows `start` to `stop` of a tensor [out, in], or of one stored as [in, out] (`turned`)."""

    name: str
    start: int
    stop: int
    turned: bool


class Origins:
    """Rows of every matrix of a model, by their values."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._rows: dict[bool, dict[int, list[Place]]] = {}  # turned -> fingerprint -> places

    def find(self, weight: Tensor) -> list[Run] | None:
        """The runs that make up `weight` fp32 [out, in], in order; None if a row is nowhere in the model.

        Where several rows are equal, the one that continues a run is taken.
        """
        for turned in (False, True):
            runs = self._runs(weight, turned)
            if runs is not None and torch.equal(gather(self._weights, runs), weight):
                return runs
        return None  # or two different rows share a fingerprint, which is as good as never

    def _runs(self, weight: Tensor, turned: bool) -> list[Run] | None:
        index = self._index(turned)
        runs: list[Run] = []
        for mark in fingerprints(weight).tolist():
            places = index.get(mark, [])
            if not places:
                return None
            following = (runs[-1].name, runs[-1].stop) if runs else None
            name, row = following if following in places else places[0]
            if (name, row) == following:
                runs[-1] = Run(name, runs[-1].start, row + 1, turned)
            else:
                runs.append(Run(name, row, row + 1, turned))
        return runs

    def _index(self, turned: bool) -> dict[int, list[Place]]:
        if turned not in self._rows:
            found = self._rows[turned] = {}
            for name, matrix in _matrices(self._weights):
                for row, mark in enumerate(fingerprints(matrix.T if turned else matrix).tolist()):
                    found.setdefault(mark, []).append((name, row))
        return self._rows[turned]


def gather(weights: Mapping[str, Tensor], runs: list[Run]) -> Tensor:
    """The rows of `runs`, one above the other, fp32 [out, in]. KeyError where a tensor is not there."""
    held: dict[str, Tensor] = {}  # a run may be a head's rows: read a tensor once
    parts = []
    for run in runs:
        if run.name not in held:
            held[run.name] = weights[run.name].T if run.turned else weights[run.name]
        parts.append(held[run.name][run.start : run.stop])
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # an embedding is not copied


def fingerprints(weight: Tensor, slice_values: int = 1 << 22) -> NDArray[np.uint64]:
    """One number a row, from all its bits: equal rows have equal numbers (-0.0 counts as 0.0)."""
    factors = np.random.default_rng(0).integers(1, 1 << 63, weight.shape[1], dtype=np.uint64) | np.uint64(1)
    step = max(1, slice_values // weight.shape[1])
    sums = []
    for rows in weight.split(step):
        bits = (rows.contiguous() + 0.0).numpy().view(np.uint32)
        sums.append(np.einsum("ij,j->i", bits, factors, dtype=np.uint64, casting="unsafe"))
    return np.concatenate(sums)


def _matrices(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name in weights:
        found = weights[name]
        if found.ndim == 2:
            yield name, found
