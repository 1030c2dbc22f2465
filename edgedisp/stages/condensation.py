"""What training did to the geometry of the token vectors, in torch and on the bundles that ship.

Every model of a run is measured on the same held-out blocks, so that arms and precisions can be compared
sequence by sequence. What a sequence gave is kept in the stage's condensation.json; the record holds means
and intervals.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgedisp import models
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import write_json
from edgedisp.dispersion.condensation import compare, measure_model, profile
from edgedisp.graph.hidden_states import HiddenStates

CONDENSATION_SEQUENCES = 16  # held-out blocks; a few seconds for 135M parameters
MEASURED = "condensation.json"


def condensation(
    model_folder: Path, corpus_folder: Path, baseline: Path | None, own: Path, progress: Progress
) -> dict[str, Any]:
    """The condensation profile of an arm's model folder over held-out blocks.

    `baseline` is the baseline's finished stage of this kind: what differs from it stands under `change`.
    """
    measured = measure_model(models.load(model_folder), _heldout(corpus_folder), progress)
    return _recorded(measured, baseline, own)


def bundle_condensation(
    bundle: Path, torch_folder: Path, corpus_folder: Path, threads: int, own: Path, progress: Progress
) -> dict[str, Any]:
    """The same of a bundle, and under `change` what differs from the arm's torch model.

    `torch_folder` is the arm's finished `condensation` stage.
    """
    return _recorded(measure_bundle(bundle, _heldout(corpus_folder), threads, progress), torch_folder, own)


def measure_bundle(bundle: Path, blocks: Tensor, threads: int, progress: Progress) -> dict[str, Any]:
    """The profile of a bundle over token blocks, int64 [sequences, tokens]; see `dispersion/profile.py`."""
    shipped = HiddenStates(bundle, threads)

    def states(block: Tensor) -> list[Tensor]:
        return [torch.from_numpy(state) for state in shipped(block.numpy())]

    return profile(states, blocks, progress)


def _recorded(measured: dict[str, Any], before: Path | None, own: Path) -> dict[str, Any]:
    """Keep every sequence's figures in the stage's folder; give the rest, and the change from `before`."""
    write_json(own / MEASURED, measured)
    results = without_sequences(measured)
    if before is not None:
        earlier = json.loads((before / MEASURED).read_text(encoding="utf-8"))
        results["change"] = compare(earlier, measured)
    return results


def without_sequences(measured: dict[str, Any]) -> dict[str, Any]:
    """A profile without the figures of each sequence, which are many."""
    return {name: value for name, value in measured.items() if name != "by_sequence"}


def _heldout(corpus_folder: Path) -> Tensor:
    held = np.load(corpus_folder / "heldout.npy", allow_pickle=False)[:CONDENSATION_SEQUENCES]
    return torch.from_numpy(held.astype(np.int64))
