"""Made English-like documents, for runs that only prove a recipe whose data lie on a hub.

Each document is a short encyclopedic article about one made thing (a town, a river, a scientist ...): a
first sentence that says what it is, then some of the others in a fixed order. Names are built from syllables
and come back within an article, so that a tokenizer has something to learn and the tasks made from text (the
last word, the next sentence) have answers. The text says nothing true.

Document i depends on (seed, i) alone: asking for more documents leaves the earlier ones as they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgedisp.data.document import Document, Documents

MIN_WORDS, MAX_WORDS = 60, 150

ONSETS = (*"bcdfghklmnprstvw", "br", "ch", "dr", "gr", "st", "th", "tr")
VOWELS = (*"aeiou", "ai", "ea", "ie", "ou")
ENDINGS = {
    "place": ["ford", "ton", "burgh", "haven", "mouth", "stead", "vale", "wick", "field", "dale"],
    "person": ["er", "son", "ley", "mann", "sen", "well", "in", "ard", "ov", "ett"],
    "thing": ["ite", "ium", "ara", "ella", "ora", "wing", "bill", "wort", "leaf", "fin"],
}
CHOICES: dict[str, list[str]] = {
    "first": ["Anna", "Clara", "David", "Edith", "Henry", "Ines", "Jonas", "Maria", "Oscar", "Ruth"],
    "side": ["north", "south", "east", "west", "north-east", "south-west"],
    "goods": ["wool", "salt", "timber", "glass", "copper", "grain", "paper", "cheese", "silk", "tin"],
    "colour": ["green", "grey", "dark red", "pale blue", "yellow", "black", "white", "brown"],
    "field": ["botany", "chemistry", "geology", "astronomy", "medicine", "optics", "mechanics"],
    "season": ["spring", "summer", "autumn", "winter"],
    "building": ["a stone church", "an old market hall", "a small castle", "a railway station", "a library"],
    "landscape": ["rolling hills", "wide marshes", "dense forests", "steep cliffs", "open fields"],
    "event": ["a great fire", "a long flood", "a short war", "a hard winter", "a trade crisis"],
    "animal": ["herons", "otters", "wild goats", "deer", "foxes", "owls", "beavers"],
    "instrument": ["violin", "piano", "cello", "flute", "organ", "harp"],
    "adjective": ["famous", "little known", "widely read", "often discussed", "much admired", "disputed"],
    "food": ["seeds and berries", "small fish", "insects", "roots and grass", "snails", "fallen fruit"],
}

# The first sentence opens the article; of the others some are left out. {name} is what it is about.
ARTICLES: dict[str, tuple[str, list[str]]] = {
    "place": (
        "{name} is a town in the {side} of {region}, on the river {river}.",
        [
            "It lies between {landscape} and the border of {region2}, about {small} kilometres from {town}.",
            "The town was founded in {year} by merchants from {town} who traded in {goods}.",
            "In {later} the population of {name} was {large}, most of whom worked in the {goods} trade.",
            "After {event} in {middle}, much of {name} had to be built again in {colour} stone.",
            "The best known building is {building} from {middle}, designed by {first} {surname}.",
            "A railway between {name} and {town} was opened in {later} and closed {small} years afterwards.",
            "Every {season} a market for {goods} is held on the banks of the {river}.",
            "The painter {first2} {surname} was born in {name} and later moved to {town}.",
            "Today {name} is visited for its {landscape}, where {animal} can be seen in {season}.",
        ],
    ),
    "river": (
        "The {name} is a river in {region} that rises in the hills {side} of {town}.",
        [
            "It is {medium} kilometres long and joins the {river} near the town of {town2}.",
            "For most of its length the {name} flows through {landscape}.",
            "Boats carried {goods} down the {name} until the canal to {town} was finished in {year}.",
            "In {later} {event} changed the course of the river {side} of {town2}.",
            "The water is {colour} in {season}, when melting snow brings clay from the hills.",
            "{first} {surname} measured its depth in {middle} and found {small} metres at the deepest place.",
            "Along the banks live {animal}, which feed on {food}.",
            "A bridge with {few} arches crosses the {name} at {town}; it was built in {middle}.",
            "Since {latest} a part of the valley has been protected as the {region} reserve.",
        ],
    ),
    "person": (
        "{first} {name} was a scientist from {town} who worked in {field}.",
        [
            "{name} was born in {year} as the youngest of {few} children of a dealer in {goods}.",
            "After school in {town2}, {name} studied {field} with {first2} {surname}.",
            "In {middle} {name} described a {colour} mineral that was found {side} of {region}.",
            "The {adjective} book on {field} appeared in {later} and was translated into {few} languages.",
            "{name} played the {instrument} and gave concerts in {town} every {season}.",
            "Together with {surname}, {name} founded the society for {field} in {region}.",
            "A journey to {region2} in {later} ended early because of {event}.",
            "{name} left a collection of {large} letters, now kept in {building} in {town2}.",
            "A street in {town} and a school in {town2} are named after {first} {name}.",
        ],
    ),
    "animal": (
        "The {name} is a small {colour} bird that lives in the {landscape} of {region}.",
        [
            "Adults weigh about {medium} grams and are {small} centimetres long.",
            "It was first described in {year} by {first} {surname}, who had seen it near {town}.",
            "The {name} feeds on {food}, which it finds at the {side} side of trees.",
            "In {season} the birds build a nest of grass and lay {few} {colour} eggs.",
            "Unlike its relatives in {region2}, the {name} stays in one place in {season}.",
            "A count in {later} found {large} birds, fewer than before {event} of {middle}.",
            "Its song sounds like a {instrument} and can be heard from {small} metres away.",
            "Farmers around {town} call it the {goods} bird because it comes when {goods} is sold.",
            "The {name} shares its nesting places with {animal} and is not considered rare.",
        ],
    ),
    "work": (
        "{title} of {region}, a novel by {first} {name}, was published in {year} and is {adjective} today.",
        [
            "The story takes place in {town} during {event} and follows a seller of {goods}.",
            "{name} wrote the first part in {season}, in a house {side} of {town2}.",
            "The main character, {first2} {surname}, learns to play the {instrument} in {few} years.",
            "About {large} copies were sold before {later}, most of them in {region2}.",
            "Critics praised how {name} wrote about the {landscape} of {region}.",
            "A film with the music of {surname} was made in {latest} and shown in {town}.",
            "In the last chapter the {colour} house is sold and {first2} returns to {town2}.",
            "The book has been {adjective2} since a second edition of {medium} pages appeared in {later}.",
            "{name} never wrote another novel, and worked as a teacher of {field} in {town}.",
        ],
    ),
}

NAMED_LIKE = {"place": "place", "river": "place", "person": "person", "animal": "thing", "work": "person"}


def synthetic_documents(count: int, seed: int) -> Documents:
    """`count` made articles of 60 to 150 words each, ids `made-<seed>-<number>`."""
    return Documents(Document(f"made-{seed}-{number}", _article(seed, number)) for number in range(count))


def _article(seed: int, number: int) -> str:
    rng = np.random.default_rng([seed, number])
    kind = _one(rng, sorted(ARTICLES))
    opening, others = ARTICLES[kind]
    slots = _slots(rng, NAMED_LIKE[kind])
    kept = sorted(rng.permutation(len(others))[: int(rng.integers(4, len(others) + 1))].tolist())
    missing = [place for place in range(len(others)) if place not in kept]
    text = " ".join([opening, *(others[place] for place in kept)]).format(**slots)
    while len(text.split()) < MIN_WORDS:
        text += " " + others[missing.pop(0)].format(**slots)
    return text[0].upper() + text[1:]


def _slots(rng: np.random.Generator, named_like: str) -> dict[str, str | int]:
    """One value for every slot of an article, so that what is said twice is the same."""
    years = np.sort(rng.choice(np.arange(1650, 2020), size=4, replace=False)).tolist()
    slots: dict[str, str | int] = {key: _one(rng, choices) for key, choices in CHOICES.items()}
    slots |= dict(zip(("year", "middle", "later", "latest"), years, strict=True))
    slots |= {name: _name(rng, "place") for name in ("town", "town2", "river")}
    slots |= {name: _name(rng, "person", "") + "ia" for name in ("region", "region2")}
    slots |= {"name": _name(rng, named_like), "surname": _name(rng, "person")}
    slots |= {"first2": _one(rng, CHOICES["first"]), "adjective2": _one(rng, CHOICES["adjective"])}
    slots |= {"few": _one(rng, ["two", "three", "four", "five", "six", "seven"])}
    slots |= {"title": "The " + _one(rng, ["Winter", "Garden", "Letters", "Last Summer", "Silent House"])}
    slots |= {"small": int(rng.integers(8, 60)), "medium": int(rng.integers(60, 900))}
    slots["large"] = f"{int(rng.integers(1000, 90000)):,}"
    return slots


def _name(rng: np.random.Generator, kind: str, ending: str | None = None) -> str:
    parts = [_one(rng, ONSETS) + _one(rng, VOWELS) for _ in range(int(rng.integers(1, 3)))]
    last = _one(rng, ENDINGS[kind]) if ending is None else _one(rng, ["r", "n", "l", "s", "v", "d"])
    return ("".join(parts) + (_one(rng, ["n", "r", "l", ""]) if ending is None else "") + last).capitalize()


def _one(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
