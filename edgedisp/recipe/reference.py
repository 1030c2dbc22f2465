"""`reference`: every key of a recipe as a markdown table, from the models' JSON schemas (docs/recipe.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from edgedisp.recipe.load import section_in
from edgedisp.recipe.recipe import Recipe

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_WORDS = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
_WORDS |= {"null": "null", "object": "a mapping"}


def reference(root: type[BaseModel] = Recipe) -> str:
    """A markdown table of all keys of `root`: key, what it accepts, default, meaning. Ends with a newline."""
    lines = ["| key | accepts | default | meaning |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in _rows(root)]
    return "\n".join(lines) + "\n"


def _rows(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    properties = section.model_json_schema()["properties"]
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        words = "required" if field.is_required() else _default(default)
        meaning = " ".join((field.description or "").split())
        yield f"`{prefix}{name}`", _accepts(properties[name]), words, meaning
        inner = section_in(field.annotation)
        if inner is not None and prefix + name != "arms[].dispersion":
            is_list = "tuple[" in str(field.annotation)
            yield from _rows(inner, f"{prefix}{name}{'[]' if is_list else ''}.")


def _accepts(schema: dict[str, Any]) -> str:
    if "accepts" in schema:
        return str(schema["accepts"])
    if "anyOf" in schema:
        return ", or ".join(map(_accepts, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        choices = list(map(str, schema.get("enum", [schema.get("const")])))
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if schema.get("type") == "array":
        return f"a list, each {_accepts(schema['items'])}"
    bounds = [f"{sign} {_figure(schema[key])}" for key, sign in _BOUNDS.items() if key in schema]
    return f"{_WORDS[schema.get('type', 'object')]} {' and '.join(bounds)}".rstrip()


def _figure(bound: float) -> str:
    return f"{int(bound):,}" if bound == int(bound) else f"{bound:g}"


def _default(value: object) -> str:
    """A default as it would be written in a recipe."""
    if value is None or isinstance(value, BaseModel):
        return "null" if value is None else "see below"
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, tuple) else f"`{value}`"
