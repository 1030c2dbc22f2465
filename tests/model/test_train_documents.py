"""Documents of a packed block that are kept apart: nothing is seen and nothing predicted across borders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import open_tiny

from edgedisp.train.chunked_cross_entropy import IGNORED
from edgedisp.train.trainer import PackedDataset

END = 1


def document(length: int) -> np.ndarray:
    """Random tokens and the end-of-text token."""
    return np.append(np.random.default_rng(length).integers(3, 400, length - 1), END)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 8))
def test_positions_count_each_document_from_zero(lengths: list[int], cut: int) -> None:
    cut = min(cut, lengths[0] - 1)  # a block may begin inside a document
    stream = np.concatenate([document(length) for length in lengths])[cut:]
    lengths = [lengths[0] - cut, *lengths[1:]]
    block = PackedDataset(stream[None], END)[0]
    assert block["position_ids"].tolist() == [index for length in lengths for index in range(length)]
    # The first token of a document is no target, and the end of text is.
    labels = block["input_ids"].where(block["position_ids"] > 0, IGNORED)
    assert torch.equal(block["labels"], labels)


# Gemma's twin has a sliding window of 64 in its first layer: 100 tokens reach over it.
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_a_document_in_a_block_computes_what_it_computes_alone(
    tiny_folder: dict[str, Path], architecture: str
) -> None:
    model = open_tiny(tiny_folder[architecture]).eval()
    documents = [document(100), document(80)]
    block = PackedDataset(np.concatenate(documents)[None], END)[0]
    with torch.no_grad():
        packed = model(**{name: value[None] for name, value in block.items()}, use_cache=False)
        ids = [torch.from_numpy(tokens)[None] for tokens in documents]
        alone = [model(input_ids=row, labels=row, use_cache=False) for row in ids]
    expected = torch.cat([output.logits[0] for output in alone])
    torch.testing.assert_close(packed.logits[0], expected, rtol=1e-4, atol=1e-4)
    # The loss is the mean over what the documents predict of themselves.
    loss = (99 * alone[0].loss + 79 * alone[1].loss) / 178
    torch.testing.assert_close(packed.loss, loss, rtol=1e-5, atol=0)
