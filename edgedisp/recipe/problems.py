"""From a failed check to words: what was found, what would work, and "did you mean".

pydantic says which check failed and where. The words for what would work come from the model itself (its
types, bounds, choices and examples), so a new key brings its own message, and docs/recipe.md says the same.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edgedisp.recipe.clashes import Key
from edgedisp.recipe.removed import REMOVED


@dataclass(frozen=True)
class Place:
    """`recipes/x.yaml:12`, or `--set train.lr=x`, which has no line."""

    words: str
    line: int | None


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a recipe."""

    place: Place
    key: Key
    words: str

    def __str__(self) -> str:
        parts = [self.place.words, dotted(self.key), self.words]
        line = ": ".join(part for part in parts if part)
        # A key or tag can hold line breaks and terminal codes; a problem is one line of visible text.
        return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)


def summary(name: str, problems: Sequence[Problem]) -> str:
    """One problem as one line; several as a numbered list in the order of the file."""
    ordered = sorted(problems, key=lambda problem: problem.place.line or math.inf)
    if len(ordered) == 1:
        return str(ordered[0])
    lines = [f"  {number}. {problem}" for number, problem in enumerate(ordered, 1)]
    return "\n".join([f"{name}: {len(ordered)} problems", *lines])


def describe(error: Any, root: type[BaseModel], data: Any, place: Place) -> str:
    """The words for one item of `ValidationError.errors()`, given the data it is about."""
    key: Key = error["loc"]
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(key, root)
    annotation, field = kind_at(root, key)
    if kind == "missing":
        return f"missing; needs {_needs(annotation, field, required_only=True)}"
    value = value_at(data, key)
    if kind == "duplicate":
        return f"found '{context['twice']}' twice; name each once"
    if choices := context.get("choices") or choices_of(annotation):
        return f"found {show(value)}; {_choose(value, choices, context.get('also', ''))}"
    if kind == "string_type" and isinstance(value, int | float) and not isinstance(value, bool):
        quoted = f"'{value}'" if place.line else f"--set {dotted(key)}='\"{value}\"'"
        return f"found the number {value}; needs text: put it in quotes, {quoted}"
    hint = f" ({context['hint']})" if context.get("hint") else ""
    return f"found {show(value)}{hint}; needs {_needs(annotation, field)}"


def near(word: str, words: Sequence[str]) -> str | None:
    """The word that was probably meant, whatever its case; None if none is close."""
    by_case = {candidate.lower().replace("-", "_"): candidate for candidate in words}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), by_case, n=1, cutoff=0.6)
    return by_case[close[0]] if close else None


def dotted(key: Key) -> str:
    """`data.train.0.source`, as `--set` takes it."""
    return ".".join(map(str, key))


def show(value: object) -> str:
    """A value as the user would recognise it, in at most 70 characters."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return f"a mapping of {', '.join(map(str, list(value)[:4]))}" if value else "an empty mapping"
    if isinstance(value, list):
        flat = not any(isinstance(item, dict | list) for item in value)
        text = f"[{', '.join(map(str, value))}]" if flat else ""
        return text if 2 < len(text) <= 40 else f"a list of {len(value)}" if value else "an empty list"
    text = str(value)
    if isinstance(value, str):
        text = f"'{value}'" if value.isprintable() else repr(value)
    return text if len(text) <= 70 else f"{text[:66]}...'"


def words_of(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a type accepts: `a whole number of at least 1`, `one of a, b`, `a list of text`, `x or null`."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *outer = typing.get_args(annotation)
        return words_of(inner, [*outer, *metadata])
    named = [item.words for item in metadata if hasattr(item, "words")]
    if named:
        return named[-1] + _bounds(metadata)
    if choices := choices_of(annotation):
        return "one of " + ", ".join(map(str, choices)) if len(choices) > 1 else str(choices[0])
    arguments = typing.get_args(annotation)
    if _is_union(annotation):
        words = " or ".join(words_of(part) for part in arguments if part is not type(None))
        return f"{words}, or null" if type(None) in arguments else words
    if typing.get_origin(annotation) is tuple:
        each = choices_of(arguments[0])
        return f"a list with any of {', '.join(each)}" if each else f"a list, each {words_of(arguments[0])}"
    return f"a mapping with {', '.join(annotation.model_fields)}"


def choices_of(annotation: Any) -> list[Any]:
    """The choices of a Literal, also inside Annotated and `| None`; empty for other types."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated or _is_union(annotation):
        parts = typing.get_args(annotation)
        return choices_of(parts[0]) if not _is_union(annotation) or type(None) in parts else []
    return []


def kind_at(root: type[BaseModel], key: Key) -> tuple[Any, FieldInfo | None]:
    """The type behind a key, and its field where the key names one (an item of a list has none)."""
    annotation: Any = root
    field: FieldInfo | None = None
    for part in key:
        annotation, field = bare(annotation), None
        if isinstance(part, int):
            annotation = typing.get_args(annotation)[0]
        else:
            field = annotation.model_fields[part]
            annotation = (
                typing.Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
            )
    return annotation, field


def bare(annotation: Any) -> Any:
    """Without Annotated and `| None`."""
    while typing.get_origin(annotation) is typing.Annotated or _is_union(annotation):
        annotation = typing.get_args(annotation)[0]
    return annotation


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _bounds(metadata: Sequence[Any]) -> str:
    words = []
    for item in metadata:
        match item:
            case Gt(gt=bound):
                words.append(f"above {bound}")
            case Ge(ge=bound):
                words.append(f"of at least {bound}")
            case Lt(lt=bound):
                words.append(f"below {bound}")
            case Le(le=bound):
                words.append(f"at most {bound}")
    return " " + " and ".join(words) if words else ""


def _needs(annotation: Any, field: FieldInfo | None, required_only: bool = False) -> str:
    inner = bare(annotation)
    if required_only and isinstance(inner, type) and issubclass(inner, BaseModel):
        required = [key for key, part in inner.model_fields.items() if part.is_required()]
        return f"a mapping with {', '.join(required)}"
    examples = f", such as {field.examples[0]}" if field and field.examples else ""
    return words_of(annotation) + examples


def _choose(found: object, choices: Sequence[Any], also: str = "") -> str:
    listed = ", ".join(map(str, choices)) + (f", {also}" if also else "")
    listed = f"choices: {listed}" if len(choices) > 1 or also else f"the only choice is {listed}"
    guess = near(found, [str(choice) for choice in choices]) if isinstance(found, str) else None
    return f"did you mean '{guess}'? ({listed})" if guess else listed


def _unknown(key: Key, root: type[BaseModel]) -> str:
    if words := REMOVED.get(dotted(key)):
        return words
    section, _ = kind_at(root, key[:-1])
    keys = list(bare(section).model_fields)
    name = str(key[-1])
    guess = near(name, keys)
    elsewhere = [path for path in _all_keys(root) if path.rsplit(".", 1)[-1] == name]
    if elsewhere and name not in keys:
        guess = elsewhere[0]
    advice = f"did you mean '{guess}'?" if guess else f"the keys here are {', '.join(keys)}"
    return f"unknown key; {advice}"


def _all_keys(root: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in root.model_fields.items():
        yield prefix + name
        inner = bare(field.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _all_keys(inner, f"{prefix}{name}.")


def value_at(data: Any, key: Key) -> Any:
    """The value behind a key as it was written, or None if there is none."""
    for part in key:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data
