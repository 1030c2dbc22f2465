"""A torch model as the callable ids -> logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgedisp.core.errors import BadInput
from edgedisp.data import synthetic_documents
from edgedisp.models import TorchModel, encode, load, tiny_model

TEXTS = [document.text for document in synthetic_documents(120, seed=0)]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_neox"]


@pytest.mark.parametrize("family", [*FAMILIES, "bloom"])
def test_a_padded_row_has_the_logits_of_the_row_alone(family: str) -> None:
    model, tokenizer = tiny_model(family, TEXTS[:40], context=128)
    scored = TorchModel(model)
    rows = [encode(tokenizer, TEXTS[number])[:length] for number, length in enumerate((100, 1, 37))]
    ids = np.full((3, 100), 7, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    mask = (np.arange(100) < np.array([[len(row)] for row in rows])).astype(np.int64)
    together = scored(ids, mask)
    assert (together.dtype, together.shape) == (np.float32, (3, 100, scored.vocab_size))
    for number, row in enumerate(rows):
        alone = scored.logits(np.array(row), len(row))
        np.testing.assert_allclose(together[number, : len(row)], alone, atol=2e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "mamba"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_greedy_with_the_cache_equals_greedy_without(family: str) -> None:
    model, tokenizer = tiny_model(family, TEXTS, context=128)
    scored = TorchModel(model)
    for length in (1, 80):  # 80 is beyond Gemma's sliding window of 64
        prompt = encode(tokenizer, TEXTS[length])[:length]
        plain = list(prompt)
        for _ in range(6):
            plain.append(int(scored.logits(np.array(plain), 1).argmax()))
        new = plain[length:]
        assert scored.greedy(prompt, 6, frozenset()) == new
        stop = new[3]
        assert scored.greedy(prompt, 6, frozenset({stop})) == new[: new.index(stop) + 1]


def test_greedy_ends_with_the_context_and_refuses_what_does_not_fit(tiny_folder: dict[str, Path]) -> None:
    scored = TorchModel(load(tiny_folder["gpt2"]))
    assert scored.context == 256
    assert len(scored.greedy([5] * 248, 50, frozenset())) == 8
    assert scored.greedy([5] * 256, 50, frozenset()) == []
    assert scored.greedy([5], 0, frozenset()) == []
    for prompt in ([], [5] * 257):
        with pytest.raises(BadInput, match=f"1 to 256 tokens.*found {len(prompt)}"):
            scored.greedy(prompt, 1, frozenset())


def test_the_thread_count_holds_during_a_call_only(tiny_folder: dict[str, Path]) -> None:
    model = load(tiny_folder["llama"])
    before = torch.get_num_threads()
    threads = 1 if before > 1 else 2
    during: list[int] = []
    model.register_forward_hook(lambda *_: during.append(torch.get_num_threads()))
    ids = np.ones((1, 4), dtype=np.int64)
    TorchModel(model, threads=threads)(ids, ids)
    TorchModel(model)(ids, ids)
    assert during == [threads, before]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "mamba"])
def test_many_prompts_side_by_side_get_the_answer_of_each_alone(family: str) -> None:
    model, tokenizer = tiny_model(family, TEXTS, context=128)
    scored, random = TorchModel(model), np.random.default_rng(1)
    system = encode(tokenizer, TEXTS[0])[:30]
    for shared in (0, 30):
        # Beyond Gemma's sliding window, and up to the context's end.
        lengths = [*random.integers(1, 12, 6), *random.integers(80, 92, 6), 120]
        prompts = [system[:shared] + random.integers(3, 200, n - n * shared // 128).tolist() for n in lengths]
        alone = [scored.greedy(prompt, 12, frozenset()) for prompt in prompts]
        assert scored.greedy_batch(prompts, 12, frozenset()) == alone
        stop = alone[4][5]
        ended = [scored.greedy(prompt, 12, frozenset({stop})) for prompt in prompts]
        assert {len(answer) for answer in ended} > {12}
        assert scored.greedy_batch(prompts, 12, frozenset({stop})) == ended
    assert scored.greedy_batch([], 12, frozenset()) == []
