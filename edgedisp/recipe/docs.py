"""`reference`: every key of a recipe as a markdown table, made from the models, for docs/recipe.md."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from edgedisp.recipe.problems import bare, kind_at, words_of
from edgedisp.recipe.schema import Recipe


def reference(root: type[BaseModel] = Recipe) -> str:
    """A markdown table of all keys of `root`: key, what it accepts, default, meaning. Ends with a newline."""
    lines = ["| key | accepts | default | meaning |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in _rows(root)]
    return "\n".join(lines) + "\n"


def _rows(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        annotation, _ = kind_at(section, (name,))
        item = typing.get_args(field.annotation)[0] if typing.get_origin(field.annotation) is tuple else None
        inner = _section_in(annotation) if item is None else _section_in(bare(item))
        key, meaning = prefix + name, field.description or ""
        default = (
            "required" if field.is_required() else _written(field.get_default(call_default_factory=True))
        )
        if inner is None:
            yield f"`{key}`", words_of(annotation), default, meaning
            continue
        many = words_of(annotation) if _has_words(item) else "a list of mappings"
        yield f"`{key}`", "a mapping" if item is None else many, default, meaning
        yield from _rows(inner, f"{key}{'' if item is None else '[]'}.")


def _has_words(annotation: Any) -> bool:
    """Whether a type was given words of its own (`kinds.Works`)."""
    return any(hasattr(part, "words") for part in typing.get_args(annotation))


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `Section`, `Section | None` or `tuple[Section, ...]`, or None.

    A `Section` that carries words of its own is told in those words instead of key by key.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if _has_words(annotation):
        return None
    inner = (_section_in(part) for part in typing.get_args(annotation))
    return next((section for section in inner if section), None)


def _written(value: object) -> str:
    """A default as it would be written in a recipe."""
    if value is None or isinstance(value, BaseModel):
        return "null" if value is None else "see below"
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, tuple) else f"`{value}`"
