"""Scores kept from before: exact, by model and by what was asked, and there after an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_evaluate_score import Bigram, some_requests

from edgedisp.core.errors import BadInput
from edgedisp.evaluate import answers
from edgedisp.evaluate.kept import Kept, name_of
from edgedisp.evaluate.score import loglikelihoods


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Kept]:
    with closing(Kept(tmp_path / "scores.sqlite", "a model")) as kept:
        yield kept


def test_what_is_kept_is_given_back_to_the_bit(store: Kept) -> None:
    value = [0.1 + 0.2, -1e-300, 3.0000000000000004]
    store.keep({"item": value})
    assert store.find(["item", "other"]) == {"item": value}


def test_another_model_finds_nothing(store: Kept) -> None:
    store.keep({"item": 1})
    with closing(Kept(store.path, "another model")) as other:
        assert other.find(["item"]) == {}
        other.keep({"item": 2})
    assert store.find(["item"]) == {"item": 1}


def test_thousands_of_items_are_found_at_once(store: Kept) -> None:
    values = {str(number): number for number in range(2500)}
    store.keep(values)
    assert store.find([*values]) == values


def test_a_file_that_is_no_store_is_named(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    path.write_text("hello " * 400)
    with pytest.raises(BadInput, match=r"scores\.sqlite: cannot be used .*delete it"):
        Kept(path, "a model")


def test_items_are_named_by_their_tokens() -> None:
    assert name_of([((1, 2), (3,))]) == name_of([((1, 2), (3,))]) != name_of([((1,), (2, 3))])


def test_only_new_items_are_computed(store: Kept) -> None:
    model, requests = Bigram(), some_requests(11)
    first = loglikelihoods(model, requests[:30], kept=store)
    asked = len(model.rows)
    both = loglikelihoods(model, requests, kept=store)
    assert both[:30] == first and both == loglikelihoods(Bigram(), requests)
    assert len(model.rows) - asked == len({(*context, *target[:-1]) for context, target in requests[30:]})


def test_an_item_of_which_a_part_is_missing_is_asked_whole(store: Kept) -> None:
    model, requests = Bigram(), some_requests(11, n=4)
    loglikelihoods(model, requests[:3], items=["q", "q", "r"], kept=store)
    model.rows.clear()
    loglikelihoods(model, requests, items=["q", "q", "r", "q"], kept=store)
    assert len(model.rows) == 3  # "r" is known; "q" has one choice more


def test_what_was_scored_before_an_interruption_is_there(
    store: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Bigram):
        def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
            if len(self.shapes) == 3:
                raise KeyboardInterrupt
            return super().__call__(ids, mask)

    requests = some_requests(11)
    with pytest.raises(KeyboardInterrupt):
        loglikelihoods(Interrupted(), requests, batch_tokens=64, kept=store)
    model = Bigram()
    assert loglikelihoods(model, requests, batch_tokens=64, kept=store) == loglikelihoods(Bigram(), requests)
    assert 0 < len(model.rows) < len(requests)


def test_scores_are_written_down_while_others_are_computed(
    store: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "_WRITTEN_EVERY_S", 0.0)
    seen: list[int] = []

    class Looking(Bigram):
        def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
            names = [name_of([tuple(map(tuple, one))]) for one in requests]
            seen.append(len(store.find(names)))
            return super().__call__(ids, mask)

    requests = some_requests(11)
    loglikelihoods(Looking(), requests, batch_tokens=64, kept=store)
    assert seen[0] == 0 and seen == sorted(seen) and seen[-1] > len(requests) / 2
