"""Packed blocks of tokens as a training set, with or without walls between the documents in a block.

Plain packing lets attention run through the block, as most pre-training does. With walls, position ids count
from 0 in each document, of which transformers makes a block-diagonal attention mask; the end-of-text token
belongs to the document before it; and the first token of a document is no target. The dispersion loss has no
walls: its sequence is the block, as its pairs do not have to attend to one another.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The label that cross-entropy leaves out."""


def document_positions(ids: Tensor, end_of_text: int) -> Tensor:
    """Place of each token in its document, from 0: `(tokens,)` int64 -> `(tokens,)` int64."""
    index = torch.arange(len(ids))
    starts = torch.zeros_like(index)
    starts[1:] = torch.where(ids[:-1] == end_of_text, index[1:], 0)
    return index - starts.cummax(dim=0).values


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed blocks `(blocks, context)` as a data set; labels are the inputs (the model shifts them).

    With `end_of_text`, the token id that ends a document, there are walls between documents.
    """

    def __init__(self, tokens: np.ndarray, end_of_text: int | None = None) -> None:
        self.tokens, self.end_of_text = tokens, end_of_text

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        if self.end_of_text is None:
            return {"input_ids": ids, "labels": ids}
        positions = document_positions(ids, self.end_of_text)
        labels = ids.masked_fill(positions == 0, IGNORED)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
