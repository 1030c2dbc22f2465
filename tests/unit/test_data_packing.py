"""The held-out split, packing and the synthetic text, each against a plain second way."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedisp.core.errors import BadInput
from edgedisp.data import Document, pack, split, synthetic_documents, training_blocks

END = 0
WORDS = st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=12)


def encode(texts: Sequence[str]) -> list[list[int]]:
    """A byte is a token; 0 ends a text."""
    return [[*(byte + 1 for byte in text.encode()), END] for text in texts]


def documents_of(words: list[str]) -> list[Document]:
    return [Document(str(number), word) for number, word in enumerate(words)]


def stream(documents: list[Document]) -> list[int]:
    """The plain way: everything in one list."""
    return [token for ids in encode([document.text for document in documents]) for token in ids]


@given(
    words=st.lists(st.text(alphabet="ab ", max_size=4), min_size=2, max_size=30),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_the_split_takes_every_different_text_exactly_once(words: list[str], share: float, seed: int) -> None:
    different = {" ".join(word.split()) for word in words}
    documents = documents_of(words)
    if len(different) < 2:
        with pytest.raises(BadInput, match=r"1 different document\(s\), but 2 are needed"):
            split(documents, share, seed)
        return
    train, heldout = split(documents, share, seed)
    assert sorted(" ".join(d.text.split()) for d in [*train, *heldout]) == sorted(different)
    assert len(train) >= 1
    assert len(heldout) == min(max(1, round(len(different) * share)), len(different) - 1)
    assert train.dropped == {"duplicate": len(words) - len(different)}
    assert split(documents, share, seed) == (train, heldout)


def test_composed_and_decomposed_twins_are_one_text() -> None:
    train, heldout = split(documents_of(["caf\u00e9 a", "cafe\u0301  a", "caf\u00e8 a"]), 0.5, seed=0)
    assert {document.text for document in [*train, *heldout]} == {"caf\u00e9 a", "caf\u00e8 a"}
    assert train.dropped == {"duplicate": 1}


def test_the_split_depends_on_the_seed_and_makes_ids_unique() -> None:
    documents = [Document("same", str(number)) for number in range(50)]
    train, heldout = split(documents, 0.1, seed=0)
    assert len({document.id for document in [*train, *heldout]}) == 50
    assert split(documents, 0.1, seed=1)[1] != heldout


@given(words=WORDS, context=st.integers(1, 9), blocks=st.none() | st.integers(1, 6))
def test_packing_drops_nothing_but_the_last_partial_block(
    words: list[str], context: int, blocks: int | None
) -> None:
    whole = stream(documents_of(words))
    if len(whole) < context:
        with pytest.raises(
            BadInput, match=f"the held-out text is too short .*: {len(whole)} tokens found, {context}"
        ):
            pack(documents_of(words), encode, context, blocks)
        return
    packed = pack(documents_of(words), encode, context, blocks)
    rows = len(whole) // context if blocks is None else min(blocks, len(whole) // context)
    assert packed.dtype == np.uint32
    assert packed.shape == (rows, context)
    assert packed.reshape(-1).tolist() == whole[: rows * context]


@given(words=WORDS, context=st.integers(1, 6), blocks=st.integers(1, 40), seed=st.integers(0, 1000))
def test_training_blocks_run_through_newly_shuffled_epochs(
    words: list[str], context: int, blocks: int, seed: int
) -> None:
    documents = documents_of(words)
    encoded: list[str] = []

    def counting(texts: Sequence[str]) -> list[list[int]]:
        encoded.extend(texts)
        return encode(texts)

    if len(stream(documents)) < context:
        with pytest.raises(BadInput, match="the training text is too short for one block"):
            training_blocks(documents, encode, context, blocks, seed)
        return
    packed, epochs = training_blocks(documents, counting, context, blocks, seed)
    expected: list[int] = []
    epoch = 0
    while len(expected) < blocks * context:
        order = np.random.default_rng([seed, epoch]).permutation(len(documents))
        expected += stream([documents[index] for index in order])
        epoch += 1
    assert packed.shape == (blocks, context)
    assert packed.dtype == np.uint32
    assert packed.reshape(-1).tolist() == expected[: blocks * context]
    assert sorted(encoded) == sorted(words)  # each once, although read often (a batch holds them all)
    assert epoch - 1 < epochs <= epoch


def test_synthetic_documents_are_varied_of_the_promised_length_and_never_change() -> None:
    documents = synthetic_documents(500, seed=1)
    for document in documents:
        assert 60 <= len(document.text.split()) <= 150
        assert document.text.count(". ") >= 3
        assert "{" not in document.text and document.text.isascii()
    assert len({document.text for document in documents}) == 500
    assert synthetic_documents(20, seed=1) == documents[:20]
    # Trained twins depend on every byte.
    text = "\n".join(f"{document.id}\n{document.text}" for document in documents)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("4f33105c9e01fb91")
