"""The geometry of token vectors of torch models and of bundles, on held-out blocks that all models share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgedisp.core.progress import Progress
from edgedisp.dispersion.condensation import Profile, profile
from edgedisp.graph.session import HiddenStates

CONDENSATION_SEQUENCES = 16  # held-out blocks; a few seconds for 135M parameters


def measure_bundle(bundle: Path, blocks: Tensor, threads: int, progress: Progress) -> Profile:
    """The profile of a bundle over token blocks, int64 [sequences, tokens]."""
    graph = HiddenStates(bundle, threads)

    def states(block: Tensor) -> list[Tensor]:
        return [torch.from_numpy(state) for state in graph(block.numpy())]

    return profile(states, blocks, progress)


def heldout_blocks(corpus_folder: Path, count: int = CONDENSATION_SEQUENCES) -> Tensor:
    """The first held-out blocks, int64 [count, context]."""
    blocks = np.load(corpus_folder / "heldout.npy", allow_pickle=False)[:count]
    return torch.from_numpy(blocks.astype(np.int64))
