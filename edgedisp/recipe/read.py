"""`load`: a recipe file and its overrides -> a checked `Recipe`, or one BadInput with every problem in it.

A check of two keys can only run on sound keys, and pydantic skips it as soon as one key fails. So the faulty
keys are cut out, what is required is filled with stand-ins, and the clashes are looked for in the rest: five
mistakes in one file give five lines, whatever their kind.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgedisp.core.errors import BadInput
from edgedisp.recipe.clashes import Key, clashes
from edgedisp.recipe.problems import Problem, describe, summary
from edgedisp.recipe.schema import Origin, Recipe
from edgedisp.recipe.shrink import smoke as shrink
from edgedisp.recipe.written import Written, parse, read_text

# Chosen so that they clash with nothing: a key that is missing hides no clash and makes none.
_STAND_INS: dict[str, dict[str, Any]] = {
    "model": {"base": "stand-in"},
    "data": {"train": [{"source": "stand-in"}], "context": 8},
    "train": {"tokens": 10**17, "lr": 0.1},
}


def load(path: Path, overrides: Sequence[str] = (), smoke: bool = False) -> Recipe:
    """Read and check a recipe.

    `overrides` are texts `key.path=value`, the value in YAML: `train.tokens=10k`, `arms=[baseline]`,
    `data.train.0.limit=10`. `smoke` returns the recipe cut down by `shrink.smoke`. Raises BadInput with all
    problems, each with its place (file:line, or the override), key, what was found and what would work.
    Opens no other file.
    """
    path = Path(path)
    written = parse(read_text(path), str(path))
    for override in overrides:
        written.put(override)
    recipe, problems = _check(written, path.parent)
    if recipe is None or problems:
        raise BadInput(summary(written.name, problems))
    recipe._origin = Origin(path)
    return shrink(recipe, where=written.place(("model", "architecture")).words) if smoke else recipe


def _check(written: Written, folder: Path) -> tuple[Recipe | None, list[Problem]]:
    """The recipe if its keys are sound, and every problem: of the writing, of keys, of combinations."""
    problems = list(written.problems)
    mute = [problem.key for problem in problems if problem.key]
    recipe, errors = _validate(written.data)
    for error in errors:
        # A key that is already reported (a tag, say) is not reported again for the value it then lacks.
        if not any(error["loc"][: len(key)] == key for key in mute):
            place = written.place(error["loc"])
            problems.append(Problem(place, error["loc"], describe(error, Recipe, written.data, place)))
    sound, faulty = (recipe, []) if recipe else _sound_part(written.data)
    for clash in clashes(sound, folder) if sound else []:
        if not any(_related(key, fault) for key in clash.keys for fault in [*faulty, *mute]):
            problems.append(Problem(written.place(clash.keys[0]), clash.keys[0], clash.words))
    return recipe, problems


def _validate(data: dict[str, Any]) -> tuple[Recipe | None, list[Any]]:
    try:
        return Recipe.model_validate(data, context="clashes apart"), []
    except ValidationError as problem:
        # A list with a faulty item counts as too short, which is noise beside the item's own error.
        errors = problem.errors(include_url=False)
        return None, [error for error in errors if error["type"] != "too_short" or not error["input"]]


def _sound_part(data: dict[str, Any]) -> tuple[Recipe | None, list[Key]]:
    """The data without their faulty keys, as a Recipe with stand-ins for what is required; and those keys."""
    data = copy.deepcopy(data)
    faulty: list[Key] = []
    for _ in range(5):  # a section that still lacks a key is cut on the next round; sections nest 4 deep
        _stand_in(data)
        recipe, errors = _validate(data)
        if recipe:
            return recipe, faulty
        faulty += [_cut(data, error["loc"]) for error in errors]
    return None, faulty


def _stand_in(data: dict[str, Any]) -> None:
    data.setdefault("name", "stand-in")
    for section, needed in _STAND_INS.items():
        there = data.setdefault(section, {})
        if isinstance(there, dict):
            there.update({key: value for key, value in needed.items() if key not in there})


def _cut(data: dict[str, Any], key: Key) -> Key:
    """Take a key out, or the section that lacks it. A list goes whole, as its items have no names."""
    names = tuple(takewhile(lambda part: isinstance(part, str), key))
    here: Any = data
    for depth, name in enumerate(names):
        inner = here.get(name)
        if depth == len(names) - 1 or not isinstance(inner, dict):
            if name in here:
                del here[name]
                return names[: depth + 1]
            return _cut(data, names[:depth])
        here = inner
    return names


def _related(one: Key, other: Key) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]
