"""Training text that choices about storage are measured on; what is scored later is never among it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgedisp.core.errors import BadInput

PIECES, PIECE_TOKENS = 4, 128  # on which KL and gradients are taken
PERPLEXITY_TOKENS = 4096  # on which a limit on perplexity is held
FEWEST_TOKENS = 64
REFERENCE_BYTES = 1 << 28  # of the unrounded model's log-probabilities, which are kept


def pieces_of(tokens: Any, opened: Any) -> list[Tensor]:
    """Beginnings of blocks from all over the text, as many as memory allows; int64 [tokens] each."""
    vocabulary = opened.get_output_embeddings().weight.shape[0]
    length = min(PIECE_TOKENS, tokens.shape[1])
    count = max(
        1, min(PIECES * PIECE_TOKENS // length, len(tokens), REFERENCE_BYTES // (4 * vocabulary * length))
    )
    if count * length < FEWEST_TOKENS:
        raise BadInput(
            f"quantize: a search needs at least {FEWEST_TOKENS} tokens of training text, there are "
            f"{count * length}; raise train.tokens"
        )
    places = np.linspace(0, len(tokens) - 1, count).round().astype(int)
    return [_long(tokens[place][:length]) for place in places]


def blocks_of(tokens: Any) -> list[Tensor]:
    """The first blocks of the text, PERPLEXITY_TOKENS of it; int64 [context] each."""
    return [_long(block) for block in tokens[: -(-PERPLEXITY_TOKENS // tokens.shape[1])]]


def _long(block: Any) -> Tensor:
    return torch.from_numpy(np.asarray(block, np.int64))
