"""The tables of keys in docs/recipe.md and docs/bundles.md, made from the schema: `make docs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from edgedisp.recipe import Recipe, Target
from edgedisp.recipe.load import all_keys

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_WORDS = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
_WORDS |= {"null": "null", "object": "a mapping"}


def reference(root: type[BaseModel] = Recipe) -> str:
    """A markdown table of all keys of `root`: key, what it accepts, default, meaning. Ends with a newline."""
    lines = ["| key | accepts | default | meaning |", "|---|---|---|---|"]
    for key, info, schema in all_keys(root):
        if key.startswith("arms[].dispersion."):
            continue  # those of train.dispersion
        default = "required" if info.is_required() else _default(info)
        cells = [f"`{key}`", _accepts(schema), default, " ".join((info.description or "").split())]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


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
    bounds = [f"{sign} {schema[key]:,.15g}" for key, sign in _BOUNDS.items() if key in schema]
    return f"{_WORDS[schema.get('type', 'object')]} {' and '.join(bounds)}".rstrip()


def _default(info: FieldInfo) -> str:
    """A default as it would be written in a recipe."""
    value = info.get_default(call_default_factory=True, validated_data={})
    if value is None or isinstance(value, BaseModel):
        return "null" if value is None else "see below"
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, tuple) else f"`{value}`"


def main() -> None:
    folder = Path(__file__).parent
    (folder / "recipe.md").write_text(f"# Every key of a recipe\n\n{reference()}\n", encoding="utf-8")
    bundles = (folder / "bundles.md").read_text(encoding="utf-8").partition("| key |")[0]
    (folder / "bundles.md").write_text(bundles + reference(Target), encoding="utf-8")


if __name__ == "__main__":
    main()
