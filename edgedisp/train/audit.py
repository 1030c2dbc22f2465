"""What a merge is judged by: the loss of each held-out block, of weights that may be rounded (rounded.py).

The loss is the plain next-token cross-entropy in float32, block by block, so that two models can be compared
block by block (paired). Weights alone: a bundle's kernel may also round activations (`accuracy_level: 4`),
which is left out here.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from edgedisp.core.progress import Progress, silent
from edgedisp.train.noise import quiet_bitsandbytes

LOGITS_AT_ONCE = 1 << 24  # values of one slice of the loss: 64 MB in float32


def block_losses(
    model: nn.Module, blocks: NDArray[np.int64], progress: Progress = silent, note: str = ""
) -> NDArray[np.float64]:
    """Cross-entropy of each block, summed over its predicted tokens, in nats: float64 [blocks].

    blocks: int64 [blocks, tokens]; a block of n tokens predicts n - 1. The model is run in eval mode, one
    block at a time, on the device where it lies, and is left in eval mode.
    """
    model.eval()
    device = next(model.parameters()).device
    losses = np.zeros(len(blocks))
    with torch.inference_mode(), quiet_bitsandbytes():
        for index, block in enumerate(blocks):
            ids = torch.from_numpy(block).to(device)
            seen = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
            logits = model(**seen, use_cache=False).logits[0, :-1]
            step = max(1, LOGITS_AT_ONCE // logits.shape[-1])
            for part, wanted in zip(logits.split(step), ids[1:].split(step)):
                losses[index] += functional.cross_entropy(part.float(), wanted, reduction="sum").item()
            progress(index + 1, len(blocks), note)
    return losses


def to_bfloat16(model: nn.Module) -> None:
    """Round every parameter of `model` in place to the nearest bfloat16; it stays float32."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
