"""Walls between the documents of a packed block: nothing is seen and nothing is predicted across them."""

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


def document(length: int, seed: int) -> np.ndarray:
    """Random tokens and the end-of-text token."""
    body = np.random.default_rng(seed).integers(3, 400, length - 1)
    return np.append(body, END).astype(np.uint32)


def batch(*rows: np.ndarray) -> dict[str, torch.Tensor]:
    """What the model gets of these blocks."""
    data = PackedDataset(np.stack(rows), END)
    items = [data[index] for index in range(len(data))]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 8))
def test_positions_count_each_document_from_zero(lengths: list[int], cut: int) -> None:
    stream = np.concatenate([document(length, seed=length) for length in lengths])
    expected = np.concatenate([np.arange(length) for length in lengths])
    # A block may begin inside a document: what is left of it counts from 0 too.
    cut = min(cut, lengths[0] - 1)
    expected[: lengths[0]] -= cut
    block = PackedDataset(stream[None, cut:], END)[0]
    assert block["position_ids"].tolist() == expected[cut:].tolist()
    # The first token of a document is no target, and the end of text is.
    assert torch.equal(block["labels"] == IGNORED, block["position_ids"] == 0)
    kept = block["labels"] != IGNORED
    assert torch.equal(block["labels"][kept], block["input_ids"][kept])


# Gemma's twin has a sliding window of 64 in its first layer: 100 tokens reach over it.
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
def test_a_document_in_a_block_computes_what_it_computes_alone(
    tiny_folder: dict[str, Path], architecture: str
) -> None:
    model = open_tiny(tiny_folder[architecture]).eval()
    first, second = document(100, 2), document(80, 3)
    rows = batch(np.concatenate([first, second]), np.concatenate([second, first]))
    with torch.no_grad():
        packed = model(**rows, use_cache=False)
        alone = [
            model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits[0]
            for tokens in (first, second)
        ]
    options = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(packed.logits[0], torch.cat(alone), **options)
    torch.testing.assert_close(packed.logits[1], torch.cat(alone[::-1]), **options)
    # The loss is the mean over what the documents predict of themselves.
    losses = [
        torch.nn.functional.cross_entropy(
            logits[:-1], torch.from_numpy(tokens[1:].astype(np.int64)), reduction="sum"
        )
        for logits, tokens in zip(alone, (first, second))
    ]
    torch.testing.assert_close(packed.loss, sum(losses) / (99 + 79), rtol=1e-5, atol=0)
