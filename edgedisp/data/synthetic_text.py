"""Synthetic English-like documents, for runs that only prove a recipe whose data lie on a hub.

Each is a short encyclopedic article about an invented thing. Names are built from syllables and repeated
within an article, so that a tokenizer and the tasks made from text have something to learn. Document i
depends on (seed, i) alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgedisp.data.documents import Document, Documents

MIN_WORDS = 60
ONSETS = [*"bcdfghklmnprstvw", "br", "ch", "dr", "gr", "st", "th", "tr"]
VOWELS = [*"aeiou", "ai", "ea", "ie", "ou"]
# choices: slot -> values. endings: of names. articles: kind -> the opening sentence and the others, of which
# some are left out; {name} is what the article is about.
PARTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
NAMED_LIKE = {"place": "place", "river": "place", "person": "person", "animal": "thing", "work": "person"}


def synthetic_documents(count: int, seed: int) -> Documents:
    """`count` articles of 60 to 150 words each, ids `made-<seed>-<number>`."""
    return Documents(Document(f"made-{seed}-{number}", _article(seed, number)) for number in range(count))


def _article(seed: int, number: int) -> str:
    rng = np.random.default_rng([seed, number])
    kind = _choose(rng, sorted(PARTS["articles"]))
    opening, *others = PARTS["articles"][kind]
    slots = _slots(rng, NAMED_LIKE[kind])
    selected = sorted(rng.permutation(len(others))[: int(rng.integers(4, len(others) + 1))].tolist())
    rest = [index for index in range(len(others)) if index not in selected]
    text = " ".join([opening, *(others[index] for index in selected)]).format(**slots)
    while len(text.split()) < MIN_WORDS:
        text += " " + others[rest.pop(0)].format(**slots)
    return text[0].upper() + text[1:]


def _slots(rng: np.random.Generator, named_like: str) -> dict[str, str | int]:
    """One value for every slot of an article, so that its sentences agree. The order of draws is fixed."""
    years = np.sort(rng.choice(np.arange(1650, 2020), size=4, replace=False)).tolist()
    slots: dict[str, str | int] = {key: _choose(rng, choices) for key, choices in PARTS["choices"].items()}
    slots |= dict(zip(("year", "middle", "later", "latest"), years, strict=True))
    slots |= {name: _name(rng, "place") for name in ("town", "town2", "river")}
    slots |= {name: _name(rng, "person", "") + "ia" for name in ("region", "region2")}
    slots |= {"name": _name(rng, named_like), "surname": _name(rng, "person")}
    slots |= {
        "first2": _choose(rng, PARTS["choices"]["first"]),
        "adjective2": _choose(rng, PARTS["choices"]["adjective"]),
    }
    slots |= {"few": _choose(rng, ["two", "three", "four", "five", "six", "seven"])}
    slots |= {"title": "The " + _choose(rng, ["Winter", "Garden", "Letters", "Last Summer", "Silent House"])}
    slots |= {"small": int(rng.integers(8, 60)), "medium": int(rng.integers(60, 900))}
    slots["large"] = f"{int(rng.integers(1000, 90000)):,}"
    return slots


def _name(rng: np.random.Generator, kind: str, ending: str | None = None) -> str:
    parts = [_choose(rng, ONSETS) + _choose(rng, VOWELS) for _ in range(int(rng.integers(1, 3)))]
    last = _choose(rng, PARTS["endings"][kind] if ending is None else ["r", "n", "l", "s", "v", "d"])
    middle = _choose(rng, ["n", "r", "l", ""]) if ending is None else ""
    return ("".join(parts) + middle + last).capitalize()


def _choose(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
