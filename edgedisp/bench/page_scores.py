"""Items that the phone page scores after it has timed: what it is sent, and what it may send back.

A bundle's items are a file of token ids, `requests/<place>.json`, which the plan names: a list of items, an
item a list of (context ids, continuation ids). Answers come in pieces, each with the place of its first item,
one piece after the other. A page that is lost leaves the items that it had answered, which are a random
sample as much as all of them, since they are asked in the order of the draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgedisp.bench.page_resources import Resource, json_resource
from edgedisp.bench.scoring import Item
from edgedisp.bench.uploads import Scores

Requests = Mapping[str, Sequence[Item]]
"""Bundle -> its items."""


def resources(labels: Sequence[str], requests: Requests) -> dict[str, Resource]:
    """The files of items, by address; `labels` in the plan's order."""
    asked = {place: requests[label] for place, label in enumerate(labels) if requests.get(label)}
    return {f"requests/{place}.json": json_resource(items) for place, items in asked.items()}


def announced(place: int, label: str, requests: Requests) -> dict[str, Any] | None:
    """What the plan tells of a bundle's items; None where there are none."""
    items = requests.get(label)
    return {"url": f"requests/{place}.json", "items": len(items)} if items else None


def wrong(upload: Scores, requests: Requests) -> str | None:
    """What is wrong with answers that fit the schema; None if nothing is."""
    items = requests.get(upload.label, ())
    if upload.first + len(upload.answers) > len(items):
        return "scores of items that were not asked for"
    if any(len(one) != len(items[upload.first + at]) for at, one in enumerate(upload.answers)):
        return "an item has more or fewer scores than it has requests"
    return None


class Collected:
    """The answers of one page so far."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self.answers: dict[str, list[list[tuple[float, bool]]]] = {label: [] for label in requests}

    def take(self, upload: Scores) -> None:
        """Keep what continues what is known: a piece may be sent again, and one after a gap is left."""
        known = self.answers.get(upload.label)
        if known is not None and upload.first <= len(known):
            known += upload.answers[len(known) - upload.first :]

    @property
    def complete(self) -> bool:
        """Whether every item of every bundle is answered."""
        return all(len(self.answers[label]) == len(items) for label, items in self._requests.items())

    def result(self) -> dict[str, Any]:
        """What goes into a device's result: {answers}, or nothing where nothing was asked."""
        return {"answers": self.answers} if self._requests else {}
