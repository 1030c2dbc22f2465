"""Log-likelihoods against closed forms: a bigram table is a language model whose every score is known."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgedisp.core.errors import BuildFailed
from edgedisp.evaluate import score
from edgedisp.evaluate.score import encode_pair, loglikelihoods, rolling_windows


class Bigram:
    """P(next | previous) from a table of logits; padding positions give rubbish on purpose."""

    tree_nodes, packs, lanes = 0, True, 1

    def __init__(self, vocab_size: int = 11, context: int = 64, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.table = rng.normal(0, 2, (vocab_size, vocab_size)).astype(np.float32)
        self.vocab_size, self.context = vocab_size, context
        self.shapes: list[tuple[int, ...]] = []
        self.rows: list[tuple[int, ...]] = []

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        self.shapes.append(ids.shape)
        self.rows += [tuple(row[seen == 1].tolist()) for row, seen in zip(ids, mask)]
        logits = self.table[ids]
        logits[mask == 0] = 1e9
        return logits

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        raise NotImplementedError

    def logprob(self, previous: int, following: int) -> float:
        row = self.table[previous].astype(np.float64)
        return float(row[following] - math.log(np.exp(row).sum()))


def by_hand(model: Bigram, context: Sequence[int], continuation: Sequence[int]) -> list[float]:
    whole = [*context, *continuation]
    return [model.logprob(whole[k - 1], whole[k]) for k in range(len(context), len(whole))]


def some_requests(vocab_size: int, n: int = 40, seed: int = 1) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(0, vocab_size, rng.integers(1, 20)).tolist(),
            rng.integers(0, vocab_size, rng.integers(1, 9)).tolist(),
        )
        for _ in range(n)
    ]


def test_scores_equal_the_closed_form_and_come_in_request_order() -> None:
    model = Bigram()
    requests = some_requests(model.vocab_size)
    for request, found in zip(requests, loglikelihoods(model, requests, batch_tokens=50), strict=True):
        expected = by_hand(model, *request)
        assert found.logprobs == pytest.approx(expected, abs=1e-6)
        assert found.sum_logprob == pytest.approx(sum(expected), abs=1e-5)
        assert found.tokens == len(request[1])


def test_greedy_means_that_every_token_was_the_most_likely_one() -> None:
    model = Bigram()
    chain = [3]
    for _ in range(4):
        chain.append(int(model.table[chain[-1]].argmax()))
    wrong = [*chain[:-1], (chain[-1] + 1) % model.vocab_size]
    right, missed = loglikelihoods(model, [(chain[:1], chain[1:]), (wrong[:1], wrong[1:])])
    assert right.greedy
    assert not missed.greedy


@pytest.mark.parametrize("batch_tokens", [1, 17, 64, 10_000])
def test_scores_do_not_depend_on_batch_size_or_order(batch_tokens: int) -> None:
    model = Bigram()
    requests = some_requests(model.vocab_size)
    alone = [loglikelihoods(model, [request])[0].sum_logprob for request in requests]
    order = np.random.default_rng(2).permutation(len(requests))
    found = loglikelihoods(model, [requests[k] for k in order], batch_tokens=batch_tokens)
    assert [likelihood.sum_logprob for likelihood in found] == pytest.approx(
        [alone[k] for k in order], abs=1e-4
    )


def test_batches_keep_within_the_token_budget() -> None:
    model = Bigram()
    loglikelihoods(model, some_requests(model.vocab_size), batch_tokens=60)
    assert len(model.shapes) > 2
    assert all(rows * tokens <= 60 or rows == 1 for rows, tokens in model.shapes)


def test_batches_keep_within_the_memory_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Bigram()
    monkeypatch.setattr(score, "LOGITS_BYTES", 45 * 4 * model.vocab_size)
    loglikelihoods(model, some_requests(model.vocab_size), batch_tokens=10_000)
    assert max(rows * tokens for rows, tokens in model.shapes) <= 45


def test_requests_with_the_same_input_share_one_row() -> None:
    model = Bigram()
    same = ([1, 2, 3], [4, 5])
    choices = [([1, 2], [last]) for last in range(4)]
    found = loglikelihoods(model, [same, *choices, same, ([1, 2, 3, 4], [5])])
    assert sorted(model.rows) == [(1, 2), (1, 2, 3, 4)]
    assert found[0] == found[5]
    assert [likelihood.sum_logprob for likelihood in found[1:5]] == pytest.approx(
        [model.logprob(2, last) for last in range(4)], abs=1e-6
    )
    assert found[6].sum_logprob == pytest.approx(model.logprob(4, 5), abs=1e-6)


def test_too_long_a_context_is_cut_on_the_left_and_the_continuation_kept() -> None:
    model = Bigram(context=8)
    context, continuation = [1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 4, 6]
    found = loglikelihoods(model, [(context, continuation)])[0]
    assert model.rows == [(4, 5, 6, 7, 8, 9, 2, 4)]
    assert found.dropped == 3
    assert found.logprobs == pytest.approx(by_hand(model, context, continuation), abs=1e-6)


def test_a_model_that_does_not_pack_gets_the_rows_of_one_item_at_a_time() -> None:
    model = Bigram()
    model.packs = False
    requests = [([1, 2], [3]), ([1, 2, 4], [5]), ([1, 3], [4])]
    loglikelihoods(model, requests, items=["a", "a", "b"])
    assert [rows for rows, _ in model.shapes] == [2, 1]


def test_a_context_that_is_cut_keeps_the_token_that_begins_every_text() -> None:
    model = Bigram(context=8)
    found = loglikelihoods(model, [([1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 4, 6]), ([], [5])], lead=1)
    assert sorted(model.rows) == [(1,), (1, 5, 6, 7, 8, 9, 2, 4)]
    assert found[0].dropped == 3


def test_a_continuation_that_alone_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="continuation of 9 tokens does not fit the model's context of 8"):
        loglikelihoods(Bigram(context=8), [([1], [2] * 9)])


def test_an_empty_context_starts_after_end_of_text() -> None:
    model = Bigram()
    assert loglikelihoods(model, [([], [5, 6])], end_of_text=0)[0].logprobs == pytest.approx(
        by_hand(model, [0], [5, 6]), abs=1e-6
    )
    with pytest.raises(ValueError, match="needs end_of_text"):
        loglikelihoods(model, [([], [5])])


def test_an_empty_continuation_is_certain_and_costs_nothing() -> None:
    model = Bigram()
    found = loglikelihoods(model, [([1, 2], []), ([1], [2])])
    assert (found[0].sum_logprob, found[0].tokens, found[0].greedy) == (0.0, 0, True)
    assert model.rows == [(1,)]


def test_a_token_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(ValueError, match="token 99 is outside"):
        loglikelihoods(Bigram(), [([1], [99])])


def test_logits_that_are_not_finite_fail_the_build() -> None:
    model = Bigram()
    model.table[4, 7] = np.nan
    assert loglikelihoods(model, [([1], [2])])
    with pytest.raises(BuildFailed, match="not finite"):
        loglikelihoods(model, [([4], [2])])


def test_very_large_logits_do_not_overflow() -> None:
    model = Bigram()
    model.table[3] = -3e4
    model.table[3, 5] = 3e4
    assert loglikelihoods(model, [([3], [5])])[0].sum_logprob == 0.0
    assert loglikelihoods(model, [([3], [6])])[0].sum_logprob == pytest.approx(-6e4)


def test_progress_ends_at_the_number_of_requests() -> None:
    calls: list[tuple[int, int, str]] = []
    requests = some_requests(11, n=9)
    loglikelihoods(
        Bigram(),
        requests,
        batch_tokens=30,
        progress=lambda done, total, note: calls.append((done, total, note)),
    )
    assert calls[-1][:2] == (9, 9)
    assert [done for done, _, _ in calls] == sorted({done for done, _, _ in calls})


@given(length=st.integers(0, 60), context=st.integers(1, 20))
def test_rolling_windows_predict_each_token_once_with_the_text_before_it(length: int, context: int) -> None:
    ids = list(range(100, 100 + length))
    predicted: list[int] = []
    for before, after in rolling_windows(ids, context, prefix=7):
        assert len(before) + len(after) - 1 <= context
        text = [7, *ids]
        start = text.index(after[0])
        assert list(before) == text[start - len(before) : start]
        predicted += after
    assert predicted == ids


@given(length=st.integers(0, 60), context=st.integers(2, 20))
def test_every_rolling_window_may_begin_with_the_prefix(length: int, context: int) -> None:
    ids = list(range(100, 100 + length))
    predicted: list[int] = []
    for before, after in rolling_windows(ids, context, prefix=7, each=True):
        assert before[0] == 7
        assert len(before) + len(after) - 1 <= context
        start = ids.index(after[0])
        assert list(before[1:]) == ids[start - len(before) + 1 : start]
        assert len(before) > 1 or start == 0
        predicted += after
    assert predicted == ids


def test_the_last_rolling_window_is_filled_up_with_earlier_text() -> None:
    windows = list(rolling_windows(range(10), context=4, prefix=99))
    assert windows == [((99,), (0, 1, 2, 3)), ((3,), (4, 5, 6, 7)), ((5, 6, 7), (8, 9))]


def pieces(text: str) -> list[int]:
    """A toy tokenizer with the habit that matters: a space goes with the letter after it; 'ab' is a token."""
    ids, k = [], 0
    while k < len(text):
        step = next((n for n in (3, 2, 1) if text[k : k + n] in (" ab", "ab", " a", " b")), 1)
        ids.append(int.from_bytes(text[k : k + step].encode(), "big"))
        k += step
    return ids


@given(context=st.text("ab ", max_size=12), continuation=st.text("ab ", min_size=1, max_size=6))
@settings(max_examples=300)
def test_joined_texts_keep_the_tokens_of_the_whole(context: str, continuation: str) -> None:
    before, after = encode_pair(pieces, context, continuation)
    assert before + after == pieces(context + continuation)
    assert after


def test_the_space_before_a_word_belongs_to_the_continuation() -> None:
    assert encode_pair(pieces, "b ", "ab") == encode_pair(pieces, "b", " ab") == (pieces("b"), pieces(" ab"))


def test_a_token_across_the_join_belongs_to_the_continuation() -> None:
    assert encode_pair(pieces, "ba", "b") == (pieces("b"), pieces("ab"))


def test_a_torch_model_scores_as_its_own_log_softmax_whatever_the_batch() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=97,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                initializer_range=0.3,
            )
        ).eval()

    class Llama:
        vocab_size, context = 97, 64
        tree_nodes, packs = 0, True

        def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
            with torch.inference_mode():
                tensors = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
                return np.asarray(llama(**tensors).logits)

        def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
            raise NotImplementedError

    requests = some_requests(97, n=24, seed=5)
    expected = []
    for context, continuation in requests:
        with torch.inference_mode():
            logits = (
                llama(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1].double()
            )
        picked = torch.log_softmax(logits, -1)[torch.arange(len(continuation)), torch.tensor(continuation)]
        expected.append(float(picked.sum()))
    for batch_tokens in (1, 64, 4096):
        found = loglikelihoods(Llama(), requests, batch_tokens=batch_tokens)
        assert [likelihood.sum_logprob for likelihood in found] == pytest.approx(expected, abs=1e-4)


def test_scoring_loads_neither_torch_nor_lm_eval() -> None:
    code = "import sys, edgedisp.evaluate.tasks; print({'torch', 'lm_eval', 'datasets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
