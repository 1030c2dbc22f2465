"""Rows of conversations in blocks: each is trained on as if it stood alone, and only its answers are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from training import fit_tiny, open_tiny

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import silent
from edgedisp.data import Conversation, epoch_order, pack_rows
from edgedisp.data.packing import PADDING, START, TARGET
from edgedisp.dispersion.hooks import DispersionLoss
from edgedisp.dispersion.losses import DispersionConfig
from edgedisp.pipeline.chat_corpus import pack
from edgedisp.pipeline.options import CorpusOptions
from edgedisp.recipe import Data
from edgedisp.train.chunked_cross_entropy import IGNORED, chunked_head
from edgedisp.train.trainer import PackedDataset

CONTEXT = 160


def row(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids, of which the last third is an answer."""
    ids = np.random.default_rng(length).integers(3, 400, length).astype(np.uint32)
    return ids, np.arange(length) >= max(1, length - length // 3 - 1)


@settings(max_examples=25)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=40), st.integers(0, 9))
def test_packing_places_every_row_whole_and_once(lengths: list[int], seed: int) -> None:
    rows = [row(length) for length in lengths]
    tokens, marks = pack_rows(rows, epoch_order([1.0] * len(rows), seed, 0), 20, padding=1)
    is_padding = marks & PADDING != 0
    assert is_padding.sum() == tokens.size - sum(lengths) and (tokens[is_padding] == 1).all()
    starts = np.flatnonzero(marks & START)
    assert {*range(0, tokens.size, 20)} <= {*starts.tolist()}  # each block begins with one
    pieces = [tuple(piece) for piece in np.split(tokens.ravel(), starts[1:]) if piece[0] != 1]
    assert sorted(pieces) == sorted(tuple(ids) for ids, _ in rows)
    assert (marks & TARGET != 0).sum() == sum(int(targets.sum()) for _, targets in rows)


# Gemma's twin has a sliding window of 64 in its first layer: a row of 100 reaches over it.
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_packed_rows_have_the_loss_and_gradient_of_padded_ones(
    tiny_folder: dict[str, Path], architecture: str
) -> None:
    rows = [row(length) for length in (100, 30, 20, 80, 60)]
    tokens, marks = pack_rows(rows, range(5), CONTEXT, padding=1)
    items = [PackedDataset(tokens, marks=marks)[index] for index in range(len(tokens))]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    assert len(tokens) == 2 and (batch["position_ids"] == 0).sum() == 5 + 2  # both have padding
    del batch["dispersion_mask"]
    model = open_tiny(tiny_folder[architecture]).train()
    if architecture == "gpt2":  # its dropout would draw other numbers for another shape
        model.eval().lm_head.train()
    with chunked_head(model, targets_alone=True) as is_chunked:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    assert is_chunked
    packed = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    labels = torch.full((5, 100), IGNORED)
    ids, mask = torch.ones_like(labels), torch.zeros_like(labels)
    for index, (tokens_of_row, targets) in enumerate(rows):
        part = slice(0, len(targets))
        ids[index, part], mask[index, part] = torch.from_numpy(tokens_of_row.astype(np.int64)), 1
        labels[index, part] = ids[index, part].where(torch.from_numpy(targets), IGNORED)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].flatten(0, 1)
    padded = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED)
    padded.backward()
    torch.testing.assert_close(loss, padded, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_padding_and_other_tokens_than_answers_are_left_out_of_dispersion(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    tokens, marks = pack_rows([row(40), row(30)], range(2), 96, padding=1)
    config, values = DispersionConfig(tokens=None), {}
    for disperse_answers in (False, True):
        model, expected = open_tiny(tiny_folder["llama"]), DispersionLoss(config)
        block = PackedDataset(tokens, marks=marks, disperse_answers=disperse_answers)[0]
        mask = marks[0] & TARGET != 0 if disperse_answers else marks[0] & PADDING == 0
        assert block["dispersion_mask"].tolist() == mask.tolist()
        with expected.watch(model):
            inputs = {name: block[name][None] for name in ("input_ids", "position_ids")}
            expected.mask = torch.from_numpy(mask)[None]
            model(**inputs, use_cache=False)
            values[disperse_answers] = expected.loss().item()
        trained = fit_tiny(
            model, tmp_path / str(disperse_answers),
            blocks=np.tile(tokens, (4, 1)), marks=np.tile(marks, (4, 1)),
            disperse_answers=disperse_answers, steps=2, batch=2, precision="fp32", dispersion=config,
        )  # fmt: skip
        assert trained.log[0]["dispersion"] == pytest.approx(values[disperse_answers], rel=1e-5)
    assert values[False] != pytest.approx(values[True], rel=1e-3)


def test_a_corpus_needs_no_whole_block_of_held_out_rows_and_counts_what_is_too_long(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    def chat(number: int, words: int, turns: int = 1) -> Conversation:
        texts = {"user": f"{number} " + "light " * words, "assistant": f"on {number}"}
        messages = [{"role": role, "content": content} for role, content in texts.items()]
        return Conversation.of(str(number), messages * turns)

    tokenizer = models.load_tokenizer(tiny_folder["llama"])
    training = [*(chat(number, 4) for number in range(20)), chat(30, 900), chat(31, 60, turns=9)]
    heldout = [chat(number, 3) for number in range(40, 46)]
    source = {"source": "rows.jsonl", "messages": "messages"}
    tokens = sum(len(parts[0].ids) for parts, _ in models.examples(tokenizer, heldout))
    for rule, counts in (("drop", {"dropped": 2, "cut": 0}), ("cut", {"dropped": 1, "cut": 1})):
        data = Data.model_validate({"train": [source], "context": 512, "too_long": rule})
        options = CorpusOptions(data, seed=0, blocks=None, smoke=False, epochs=2)
        packed = pack(tokenizer, (training, heldout), options, tmp_path, silent)
        assert packed.chat is not None and packed.chat["too_long"] == counts
        assert packed.heldout_blocks.shape == (1, tokens)
    with pytest.raises(BadInput, match=r"held-out conversations have \d\d tokens, .*\(64 are needed\)"):
        pack(tokenizer, (training, [chat(50, 0)]), options, tmp_path, silent)
