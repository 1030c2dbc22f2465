"""Log-likelihoods against closed forms, and scores that are read back from the cache."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from score_models import Bigram, some_requests

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.evaluate import loglikelihood
from edgedisp.evaluate.loglikelihood import (
    ScoreCache,
    ScoreOptions,
    TextTokenizer,
    fitted,
    loglikelihoods,
    name_of,
)


@pytest.mark.parametrize("parallel", [1, 3])
def test_scores_equal_the_closed_form_and_come_in_request_order(parallel: int) -> None:
    model = Bigram(parallel=parallel)
    requests = some_requests(model.vocab_size)
    progress: list[int] = []
    options = ScoreOptions(progress=lambda done, total, note: progress.append(done))
    for request, result in zip(requests, loglikelihoods(model, requests, options=options), strict=True):
        assert result.logprobs == pytest.approx(model.logprobs(*request), abs=1e-6)
    assert progress == sorted(progress) and progress[-1] == len(requests)
    chain = [3, *model.greedy([3], 4, frozenset())]
    wrong = [*chain[1:-1], (chain[-1] + 1) % model.vocab_size]
    right, missed = loglikelihoods(model, [(chain[:1], chain[1:]), (chain[:1], wrong)])
    assert right.greedy and not missed.greedy  # greedy: every token was the most likely of all


def test_requests_with_the_same_input_are_computed_once() -> None:
    model = Bigram()
    same, choices = ([1, 2, 3], [4, 5]), [([1, 2], [last]) for last in range(4)]
    results = loglikelihoods(model, [same, *choices, same, ([1, 2, 3, 4], [5])])
    assert sorted(model.rows) == [(1, 2), (1, 2, 3, 4)] and results[0] == results[5]
    expected = [model.logprobs(*request)[0] for request in (*choices, ([4], [5]))]
    sums = [result.sum_logprob for result in (*results[1:5], results[6])]
    assert sums == pytest.approx(expected, abs=1e-6)


def test_too_long_a_context_is_cut_on_the_left_and_keeps_its_bos_token() -> None:
    model, request = Bigram(context=8), ([1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 4, 6])
    for bos_token, first in ((None, 4), (1, 1)):
        (result,) = loglikelihoods(model, [request], ScoreOptions(bos_token=bos_token))
        assert model.rows == [(first, 5, 6, 7, 8, 9, 2, 4)] and result.dropped == 3
        assert result.logprobs == pytest.approx(model.logprobs(*request), abs=1e-6)
        model.rows.clear()
    (empty,) = loglikelihoods(model, [([1, 2], [])])  # an empty continuation is certain
    assert (empty.logprobs, empty.sum_logprob, empty.greedy) == ((), 0.0, True) and not model.rows
    with pytest.raises(BadInput, match="answer of 9 tokens exceeds the model's context of 8"):
        loglikelihoods(model, [([1], [2] * 9)])


@pytest.mark.parametrize("parallel", [1, 3])
def test_logits_that_are_not_finite_fail_the_build_and_large_ones_do_not_overflow(parallel: int) -> None:
    model = Bigram(parallel=parallel)
    model.table[4, 7] = np.nan
    model.table[3] = -3e4
    model.table[3, 5] = 3e4
    assert loglikelihoods(model, [([3], [5])])[0].sum_logprob == 0.0
    assert loglikelihoods(model, [([3], [6])])[0].sum_logprob == pytest.approx(-6e4)
    with pytest.raises(BuildFailed, match="not finite"):
        loglikelihoods(model, [([1], [2]), ([4], [2]), ([5], [2])])


class Pieces:
    """A toy tokenizer with the habit that matters: a space goes with the letter after it; 'ab' is a token.
    bos: the token that it puts before every text, or none."""

    eos_token_id = 0
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __init__(self, bos: int | None = None) -> None:
        self.bos = bos

    def get_vocab(self) -> dict[str, int]:
        return {}

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        ids = [self.bos] if self.bos is not None and add_special_tokens else []
        k = 0
        while k < len(text):
            step = next((n for n in (3, 2, 1) if text[k : k + n] in (" ab", "ab", " a", " b")), 1)
            ids.append(int.from_bytes(text[k : k + step].encode(), "big"))
            k += step
        return {"input_ids": ids}


@given(length=st.integers(0, 60), context=st.integers(2, 20), bos=st.sampled_from([None, 7]))
def test_windows_predict_each_token_once(length: int, context: int, bos: int | None) -> None:
    tokenizer, ids, predicted = TextTokenizer(Pieces(bos)), list(range(100, 100 + length)), list[int]()
    for before, after in tokenizer.windows(ids, context, 7):
        assert len(before) + len(after) - 1 <= context
        text = [7, *ids]
        start = text.index(after[0])
        assert before[0] == 7 or bos is None
        earlier = before[1:] if bos is not None and start > 1 else before
        assert list(earlier) == text[start - len(earlier) : start]
        predicted += after
    assert predicted == ids
    windows = list(TextTokenizer(Pieces()).windows(range(10), 4, 99))  # the last is filled up
    assert windows == [((99,), (0, 1, 2, 3)), ((3,), (4, 5, 6, 7)), ((5, 6, 7), (8, 9))]


@given(context=st.text("ab ", max_size=12), continuation=st.text("ab ", min_size=1, max_size=6))
@settings(max_examples=200)
def test_joined_texts_keep_the_tokens_of_the_whole(context: str, continuation: str) -> None:
    tokenizer = TextTokenizer(Pieces())
    encode, pair = tokenizer.encode, tokenizer.encode_pair
    before, after = pair(context, continuation)
    assert before + after == encode(context + continuation) and after
    # What crosses the join belongs to the continuation.
    assert pair("b ", "ab") == pair("b", " ab") == (encode("b"), encode(" ab"))
    assert pair("ba", "b") == (encode("b"), encode("ab"))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ScoreCache]:
    with closing(ScoreCache(tmp_path / "scores.sqlite", "a model")) as cache:
        yield cache


def test_values_are_read_back_to_the_bit_by_their_model_alone(cache: ScoreCache, tmp_path: Path) -> None:
    values = {str(number): [number + 0.1 + 0.2, -1e-300] for number in range(1200)}
    cache.write(values)
    assert cache.read([*values, "other"]) == values
    with closing(ScoreCache(tmp_path / "scores.sqlite", "another model")) as other:
        assert other.read(["0"]) == {}
    with closing(sqlite3.connect(tmp_path / "scores.sqlite")) as changed, changed:
        changed.execute("UPDATE scores SET found = replace(found, '7.3', '7.4') WHERE item = '7'")
        changed.execute("UPDATE scores SET found = CAST(x'FF' || found AS TEXT) WHERE item = '8'")
        changed.execute("UPDATE scores SET found = CAST(found AS BLOB) WHERE item = '9'")
    assert cache.read(["6", "7", "8", "9"]) == {"6": values["6"]}
    (tmp_path / "text.sqlite").write_text("hello " * 400)
    with pytest.raises(BadInput, match=r"text\.sqlite: cannot be used .*delete it"):
        ScoreCache(tmp_path / "text.sqlite", "a model")


def test_scores_survive_an_interruption(cache: ScoreCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loglikelihood, "_BATCH", 4)
    requests, options = some_requests(11), ScoreOptions(cache=cache)

    class Interrupted(Bigram):
        def logits(self, ids: NDArray[np.int64], last: int) -> NDArray[np.float32]:
            if len(self.rows) == 13:
                raise KeyboardInterrupt
            return super().logits(ids, last)

    with pytest.raises(KeyboardInterrupt):
        loglikelihoods(Interrupted(), requests, options=options)
    assert len(cache.read([name_of(fitted(Bigram(), request)[0]) for request in requests])) >= 12
    model = Bigram()
    assert loglikelihoods(model, requests, options=options) == loglikelihoods(Bigram(), requests)
    assert 0 < len(model.rows) <= len(requests) - 12
