"""What training did to the geometry of the token vectors, in torch and on the bundles that ship.

Every model of a run is measured on the same held-out blocks, so that arms and precisions can be compared
sequence by sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgedisp.core.progress import Progress
from edgedisp.core.results import Condensation, Estimate, LayerProfile
from edgedisp.dispersion.condensation import FIGURES, compare, profile
from edgedisp.graph.session import HiddenStates

CONDENSATION_SEQUENCES = 16  # held-out blocks; a few seconds for 135M parameters


def measure_bundle(bundle: Path, blocks: Tensor, threads: int, progress: Progress) -> dict[str, Any]:
    """The profile of a bundle over token blocks, int64 [sequences, tokens] (`dispersion.condensation`)."""
    shipped = HiddenStates(bundle, threads)

    def states(block: Tensor) -> list[Tensor]:
        return [torch.from_numpy(state) for state in shipped(block.numpy())]

    return profile(states, blocks, progress)


def without_sequences(measured: dict[str, Any]) -> dict[str, Any]:
    """A profile without the figures of each sequence, which are many."""
    return {name: value for name, value in measured.items() if name != "by_sequence"}


def heldout_blocks(corpus_folder: Path, count: int = CONDENSATION_SEQUENCES) -> Tensor:
    """The first held-out blocks, int64 [count, context]."""
    held = np.load(corpus_folder / "heldout.npy", allow_pickle=False)[:count]
    return torch.from_numpy(held.astype(np.int64))


def condensation(measured: Mapping[str, Any], reference: Mapping[str, Any] | None) -> Condensation:
    """A profile as a result; `change`: what differs from the profile of a reference over the same blocks."""
    change = None if reference is None else compare(dict(reference), dict(measured))
    return _result(measured, None if change is None else _result(change, None))


def _result(of: Mapping[str, Any], change: Condensation | None) -> Condensation:
    return Condensation(
        [_layer(row) for row in of["layers"]],
        _layer(of["final_norm"]) if of["final_norm"] else None,
        _estimate(of["mean_cosine"]),
        {name: _estimate(value) for name, value in of["correlations"].items()},
        of.get("sequences", 0),
        of.get("tokens", 0),
        change,
    )


def _layer(row: Mapping[str, Any]) -> LayerProfile:
    figures = {}
    for name in FIGURES:
        if isinstance(row[name], Mapping):
            figures[name] = _estimate(row[name])
        else:
            low, high = row["intervals"].get(name, (None, None))
            figures[name] = Estimate(row[name], low, high)
    return LayerProfile(row.get("layer"), figures, tuple(row.get("histogram", ())))


def _estimate(ends: Mapping[str, Any]) -> Estimate:
    value = ends["difference"] if "difference" in ends else ends["value"]
    return Estimate(value, ends["low"], ends["high"])
