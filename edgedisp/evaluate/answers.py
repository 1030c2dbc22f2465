"""Likelihoods as they are found: what is known from before, and what is new and written down for later."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from edgedisp.evaluate.kept import Kept, name_of

_WRITTEN_EVERY_S = 2.0  # what an interruption can lose

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation."""


@dataclass(frozen=True)
class Likelihood:
    """The score of one request.

    logprobs: natural log-probability of each continuation token. greedy: every one of them was the most
    likely token at its place. dropped: context tokens cut off on the left to fit the model's context.
    """

    logprobs: tuple[float, ...]
    greedy: bool
    dropped: int = 0

    @property
    def sum_logprob(self) -> float:
        return float(np.sum(self.logprobs))

    @property
    def tokens(self) -> int:
        return len(self.logprobs)


class Answers:
    """The likelihoods found so far, by the request's number; `owners`: the item of each.

    An item is kept when all of its requests are scored, as int8 arithmetic scores them together.
    """

    def __init__(self, requests: Sequence[Request], owners: Sequence[Hashable], kept: Kept | None) -> None:
        self.owners, self.found = owners, dict[int, Likelihood]()
        self._numbers: dict[Hashable, list[int]] = {}
        for number, owner in enumerate(owners):
            self._numbers.setdefault(owner, []).append(number)
        self._kept, self._names = kept, dict[Hashable, str]()
        self._unwritten: dict[Hashable, None] = {}
        self._written = time.monotonic()
        if kept is not None:
            for owner, numbers in self._numbers.items():
                self._names[owner] = name_of([tuple(map(tuple, requests[number])) for number in numbers])
            known = kept.find([*self._names.values()])
            for owner, numbers in self._numbers.items():
                for number, one in zip(numbers, known.get(self._names[owner], ())):
                    self.found[number] = Likelihood(tuple(one["logprobs"]), one["greedy"], one["dropped"])

    def missing(self) -> list[int]:
        return [number for number in range(len(self.owners)) if number not in self.found]

    def add(self, number: int, likelihood: Likelihood) -> None:
        self.found[number] = likelihood
        owner = self.owners[number]
        if self._kept is not None and all(one in self.found for one in self._numbers[owner]):
            self._unwritten[owner] = None
            if time.monotonic() - self._written > _WRITTEN_EVERY_S:
                self.write()

    def write(self) -> None:
        if self._kept is not None and self._unwritten:
            self._kept.keep(
                {
                    self._names[owner]: [asdict(self.found[number]) for number in self._numbers[owner]]
                    for owner in self._unwritten
                }
            )
        self._unwritten, self._written = {}, time.monotonic()
