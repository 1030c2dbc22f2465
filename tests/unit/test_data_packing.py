"""The held-out split, packing and the synthetic text, each against a plain second way."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedisp.core.errors import BadInput
from edgedisp.data import Document, pack, split, synthetic_documents, training_blocks

END = 0


def encode(text: str) -> list[int]:
    """A byte is a token; 0 is free for the end of a text."""
    return [byte + 1 for byte in text.encode()]


class InBatches:
    """The same encoding, but only through `batch`."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def __call__(self, text: str) -> list[int]:
        raise RuntimeError("the batch road should be taken")

    def batch(self, texts: list[str]) -> list[list[int]]:
        self.encoded += texts
        return [encode(text) for text in texts]


def texts(*words: str) -> list[Document]:
    return [Document(str(number), word) for number, word in enumerate(words)]


# --- the held-out split ----------------------------------------------------------------------------------


@given(
    words=st.lists(st.text(alphabet="ab ", max_size=4), min_size=2, max_size=30),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_the_split_takes_every_different_text_exactly_once(words: list[str], share: float, seed: int) -> None:
    different = {" ".join(word.split()) for word in words}
    if len(different) < 2:
        with pytest.raises(BadInput, match=r"1 different document\(s\), but 2 are needed"):
            split(texts(*words), share, seed)
        return
    train, heldout = split(texts(*words), share, seed)
    kept = [" ".join(document.text.split()) for document in [*train, *heldout]]
    assert sorted(kept) == sorted(different)
    assert len(train) >= 1
    assert len(heldout) == min(max(1, round(len(different) * share)), len(different) - 1)
    assert train.dropped == {"duplicate": len(words) - len(different)}
    assert split(texts(*words), share, seed) == (train, heldout)


def test_the_split_depends_on_the_seed_and_gives_every_document_its_own_id() -> None:
    documents = [Document("same", str(number)) for number in range(50)]
    train, heldout = split(documents, 0.1, seed=0)
    assert len({document.id for document in [*train, *heldout]}) == 50
    assert split(documents, 0.1, seed=1)[1] != heldout


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 5.0, float("nan")])
def test_a_share_outside_zero_to_one_is_bad_input(share: float) -> None:
    with pytest.raises(BadInput, match="between 0 and 1"):
        split(texts("a", "b"), share, 0)


# --- packing ---------------------------------------------------------------------------------------------


def stream(documents: list[Document]) -> list[int]:
    """The plain way: everything in one list, end-of-text behind each document."""
    return [token for document in documents for token in [*encode(document.text), END]]


@given(
    words=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=12),
    context=st.integers(1, 9),
    blocks=st.none() | st.integers(1, 6),
)
def test_packing_drops_nothing_but_the_last_partial_block(
    words: list[str], context: int, blocks: int | None
) -> None:
    documents = texts(*words)
    whole = stream(documents)
    if len(whole) < context:
        with pytest.raises(BadInput, match=f"{len(whole)} tokens found, {context} needed"):
            pack(documents, encode, END, context, blocks)
        return
    packed = pack(documents, encode, END, context, blocks)
    rows = len(whole) // context if blocks is None else min(blocks, len(whole) // context)
    assert packed.dtype == np.uint32
    assert packed.shape == (rows, context)
    assert packed.reshape(-1).tolist() == whole[: rows * context]
    assert np.array_equal(packed, pack(documents, InBatches(), END, context, blocks))


def test_too_little_text_names_what_was_packed_and_both_numbers() -> None:
    with pytest.raises(
        BadInput, match="the held-out text is too short for one block: 4 tokens found, 9 needed"
    ):
        pack(texts("abc"), encode, END, 9, name="the held-out text")
    with pytest.raises(
        BadInput, match="the training text is too short for one block: 4 tokens found, 9 needed"
    ):
        training_blocks(texts("abc"), encode, END, context=9, blocks=100, seed=0)
    with pytest.raises(BadInput, match="0 tokens found"):
        training_blocks([], encode, END, context=9, blocks=100, seed=0)
    with pytest.raises(BadInput, match="must be positive"):
        training_blocks(texts("abc"), encode, END, context=2, blocks=0, seed=0)


@given(
    words=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=9),
    context=st.integers(1, 6),
    blocks=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_blocks_for_runs_through_newly_shuffled_epochs(
    words: list[str], context: int, blocks: int, seed: int
) -> None:
    documents = texts(*words)
    if len(stream(documents)) < context:
        return
    encoder = InBatches()
    packed, facts = training_blocks(documents, encoder, END, context, blocks, seed)
    expected: list[int] = []
    epoch = 0
    while len(expected) < blocks * context:
        order = np.random.default_rng([seed, epoch]).permutation(len(documents))
        expected += stream([documents[place] for place in order])
        epoch += 1
    assert packed.shape == (blocks, context)
    assert packed.dtype == np.uint32
    assert packed.reshape(-1).tolist() == expected[: blocks * context]
    assert sorted(encoder.encoded) == sorted(
        set(range(len(words))) and words
    )  # each once, although read often
    assert facts["tokens"] == blocks * context
    assert epoch - 1 < facts["epochs"] <= epoch
    assert facts["documents"] == round(min(facts["epochs"], 1.0) * len(words))


def test_blocks_for_encodes_only_what_it_reaches() -> None:
    documents = texts(*(f"document {number}" for number in range(2000)))
    encoder = InBatches()
    _, facts = training_blocks(documents, encoder, END, context=10, blocks=3, seed=0)
    assert len(encoder.encoded) < 500
    assert facts["text_tokens"] is None
    _, facts = training_blocks(documents, encoder, END, context=10, blocks=6000, seed=0)
    assert facts["text_tokens"] == len(stream(documents))


def test_two_arms_get_the_same_blocks_and_another_seed_gets_others() -> None:
    documents = synthetic_documents(30, seed=0)
    first, _ = training_blocks(documents, encode, END, 64, 50, seed=7)
    second, _ = training_blocks(documents, encode, END, 64, 50, seed=7)
    other, _ = training_blocks(documents, encode, END, 64, 50, seed=8)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


# --- synthetic text --------------------------------------------------------------------------------------


def test_synthetic_documents_are_varied_of_the_promised_length_and_never_change() -> None:
    documents = synthetic_documents(500, seed=1)
    for document in documents:
        assert 60 <= len(document.text.split()) <= 150
        assert document.text.count(". ") >= 3
        assert "{" not in document.text and document.text.isascii()
    assert len({document.text for document in documents}) == 500
    assert len({word for document in documents for word in document.text.split()}) > 3000
    assert synthetic_documents(20, seed=1) == documents[:20]
    # Trained twins depend on every byte.
    text = "\n".join(f"{document.id}\n{document.text}" for document in documents)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("4f33105c9e01fb91")
