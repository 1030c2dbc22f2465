"""`load`: a recipe file and its `--set` overrides -> a checked `Recipe`, or one BadInput with every problem.

ruamel's safe loader gives the values, so no tag runs code, and its nodes say on which line each key is. A
problem is one line: place, key, pydantic's message, the value and a hint. `--set train.tokens=10k` puts a
value into the same data and becomes that key's place.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.reader import ReaderError

from edgedisp.core.errors import BadInput
from edgedisp.recipe.recipe import Origin, Recipe
from edgedisp.recipe.recipe import smoke as shrink
from edgedisp.recipe.values import Key, near

MOST_BYTES, MOST_PROBLEMS, DEEPEST = 50_000, 30, 10

REMOVED = {
    "rescale": "method gptq loses less in less time",
    "max_flips": "accuracy_level 0 computes in fp32, 4 in int8",
    "damping": "method gptq always uses 0.01",
    "act_order": "method gptq always takes the most important columns first",
    "correction": "method gptq always uses 0.5",
    "head_group": "the head has the groups of `group`",
    "learn_scales": "method gptq finds the scales when rounding begins",
    "ramp": "rounding begins at once, at `start`",
    "batch_tokens": "every sequence is scored alone, so that batches change no score",
}
"""Key of recipes and device profiles of earlier versions -> what replaced it."""

_Model = TypeVar("_Model", bound=BaseModel)
_shorten = reprlib.Repr()  # bounded, also for a list that holds itself
_shorten.maxlevel, _shorten.maxstring, _shorten.maxother = 2, 60, 60


def load(path: Path, overrides: Sequence[str] = (), smoke: bool = False) -> Recipe:
    """Read and check a recipe.

    `overrides` are texts `key.path=value`, the value in YAML: `train.tokens=10k`, `arms=[baseline]`,
    `data.train.0.limit=10`. `smoke` returns the recipe cut down by `recipe.smoke`. Raises BadInput with all
    problems, one a line: place (file:line, or the override), key, what is wrong and what would work.
    """
    document = read_yaml(Path(path), "a recipe", "name, model, data and train")
    for override in overrides:
        document.put(override)
    recipe = document.validate(Recipe)
    recipe._origin = Origin(Path(path), lambda key: document.place(key)[1])
    return shrink(recipe) if smoke else recipe


def read_yaml(path: Path, what: str, keys: str) -> Document:
    """The YAML file of `what`, which needs `keys` (both for messages).

    Raises BadInput if it cannot be read, is too large, not UTF-8, not YAML, or not a mapping.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise BadInput(f"{path}: too large; {what} is a small YAML file")
        node, data = _parse(raw.decode("utf-8-sig"), str(path))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as problem:
        raise BadInput(f"{path}: cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        line = 1 + problem.object.count(b"\n", 0, problem.start)
        raise BadInput(f"{path}:{line}: is not UTF-8 ({problem.reason}); save the file as UTF-8") from None
    if not isinstance(data, dict):
        raise BadInput(f"{path}:1: {what} is a mapping with {keys}")
    return Document(str(path), data, {key: (line, f"{path}:{line}") for key, line in _lines(node, (), set())})


def _parse(text: str, place: str) -> tuple[Any, Any]:
    """(root node, plain data) of a YAML text."""
    yaml, node = YAML(typ="safe", pure=True), None
    try:
        node = yaml.compose(text)
        return node, yaml.load(text)
    except RecursionError:
        raise BadInput(f"{place}: nested too deeply") from None
    except Exception as problem:  # besides YAMLError what its constructors of numbers and dates raise
        mark = getattr(problem, "problem_mark", None) or _faulty_scalar(yaml, node, str(problem), set())
        position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        if isinstance(problem, ReaderError):
            position = f":{1 + text.count(chr(10), 0, problem.position)}"
        reason = getattr(problem, "problem", None) or problem
        position = "" if place.startswith("--set") else position
        raise BadInput(_one_line(f"{place}{position}: not YAML: {reason}")) from None


def _faulty_scalar(yaml: YAML, node: Any, words: str, seen: set[int]) -> Any:
    """The mark of the value that cannot be what its text looks like, such as a date of month 13: `words`."""
    if node is None or id(node) in seen:
        return None
    seen.add(id(node))
    if isinstance(node, ScalarNode):
        try:
            yaml.constructor.construct_object(node)
        except Exception as problem:
            return node.start_mark if str(problem) == words else None
        return None
    parts = chain.from_iterable(node.value) if isinstance(node, MappingNode) else node.value
    return next(filter(None, (_faulty_scalar(yaml, part, words, seen) for part in parts)), None)


def _lines(node: Node, key: Key, seen: set[int]) -> Iterator[tuple[Key, int]]:
    """Every key with its line; the keys inside an alias are only where they were first written."""
    if isinstance(node, ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, MappingNode):
        entries: Any = [(str(name.value), name, value) for name, value in node.value]
    else:
        entries = [(index, item, item) for index, item in enumerate(node.value)]
    for part, start, value in entries:
        yield (*key, part), start.start_mark.line + 1
        yield from _lines(value, (*key, part), seen)


@dataclass
class Document:
    """A YAML file as plain data, with the place of every key: its line, and `file:line` or `--set ...`."""

    name: str
    data: Any
    places: dict[Key, tuple[float, str]]

    def place(self, key: Key) -> tuple[float, str]:
        """The place of a key; of its section, for a key that is not there."""
        sections = (key[:length] for length in range(len(key), 0, -1))
        return next((self.places[part] for part in sections if part in self.places), (1, f"{self.name}:1"))

    def put(self, override: str) -> None:
        """Apply one `key.path=value`, the value read as YAML. Raises BadInput where it cannot be applied."""
        place = _one_line(f"--set {override if len(override) <= 80 else override[:77] + '...'}")
        path, equals, text = override.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts) or len(parts) > DEEPEST:
            raise BadInput(f"{place}: needs key=value, such as train.tokens=10k")
        place_of_value = f"{place}: {_one_line(path.strip())}"
        value = _parse(text, place_of_value)[1]
        try:
            self.data = _with_value(self.data, parts, value)
        except ValueError as problem:
            raise BadInput(f"{place_of_value}: {problem}") from None
        key = tuple(int(part) if part.isdecimal() else part for part in parts)
        self.places = {old: at for old, at in self.places.items() if old[: len(key)] != key}
        for length in range(1, len(key) + 1):  # a section that was absent is there now
            self.places.setdefault(key[:length], (math.inf, place))

    def validate(self, model: type[_Model]) -> _Model:
        """The data as a `model`. Raises BadInput with all problems in the order of the file."""
        try:
            return model.model_validate(self.data)
        except ValidationError as invalid:
            errors = invalid.errors(include_url=False)
        problems = [
            (*self.place(error["loc"]), ".".join(map(str, error["loc"])), _words(error, model))
            for error in errors
            # A list with a faulty item counts as too short, which is noise beside the item's own error.
            if error["type"] != "default_factory_not_called"
            and not (error["type"] == "too_short" and error["input"])
        ]
        problems.sort(key=lambda problem: problem[0])
        lines = [_one_line(f"{place}: {key}: {words}") for _, place, key, words in problems]
        if len(lines) == 1:
            raise BadInput(lines[0])
        numbered = [f"  {number}. {line}" for number, line in enumerate(lines[:MOST_PROBLEMS], 1)]
        more = [f"  and {len(lines) - MOST_PROBLEMS:,} more"] if len(lines) > MOST_PROBLEMS else []
        raise BadInput("\n".join([f"{self.name}: {len(lines):,} problems", *numbered, *more]))


def _with_value(section: Any, path: Sequence[str], value: object) -> Any:
    """A copy of a section with a value at a path in it; absent sections on the way are created."""
    if not path:
        return value
    part, *rest = path
    if isinstance(section, list):
        if not part.isdecimal() or int(part) >= len(section):
            raise ValueError(f"the list has no item '{part}': it has {len(section)}, counted from 0")
        index = int(part)
        return [*section[:index], _with_value(section[index], rest, value), *section[index + 1 :]]
    if not isinstance(section, dict | None):
        raise ValueError(f"{_show(section)} has no keys")
    section = section or {}
    return section | {part: _with_value(section.get(part), rest, value)}


def _words(error: Any, root: type[BaseModel]) -> str:
    """One item of `ValidationError.errors()` in words: the message, the value and a hint."""
    key, kind, value, message = error["loc"], error["type"], error["input"], error["msg"]
    if kind in ("missing", "rule"):
        return "missing" if kind == "missing" else str(message)
    if kind == "extra_forbidden":
        return _unknown(key, root)
    hint = ""
    if kind == "value_error":
        message = error["ctx"]["error"]
    elif kind == "model_type":
        message = f"needs a mapping with {', '.join(_keys_of(key, root))}"
    elif kind == "literal_error" and isinstance(value, str):
        guess = near(value, re.findall(r"'([^']*)'", message))
        hint = f"; did you mean '{guess}'?" if guess else ""
    elif kind == "string_type" and isinstance(value, int | float):
        hint = "; put it in quotes"
    return f"{message} (found {_show(value)}){hint}"


def _show(value: object) -> str:
    try:
        return json.dumps(value) if value is None or isinstance(value, bool) else _shorten.repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def _unknown(key: Key, root: type[BaseModel]) -> str:
    name, keys = str(key[-1]), _keys_of(key[:-1], root)
    if name in REMOVED:
        return f"removed; {REMOVED[name]}"
    elsewhere = [other for other in _key_names(root) if other.endswith(f".{name}")]
    elsewhere.sort(key=lambda other: not other.startswith(f"{key[0]}."))  # of the same section first
    guess = next(iter(elsewhere), None) or near(name, keys)
    return (
        f"unknown key; did you mean '{guess}'?" if guess else f"unknown key; the keys are {', '.join(keys)}"
    )


def _keys_of(section: Key, root: type[BaseModel]) -> list[str]:
    """The names of the keys of a section."""
    prefix = "".join("[]" if isinstance(part, int) else f".{part}" for part in section).removeprefix(".")
    keys = (key.rpartition(".") for key in _key_names(root))
    return [name for parent, _, name in keys if parent == prefix]


@cache
def _key_names(root: type[BaseModel]) -> list[str]:
    return [key for key, *_ in all_keys(root)]


def _one_line(text: str) -> str:
    # A key or tag can hold line breaks and terminal codes; a problem is one line of visible text.
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo, dict[str, Any]]]:
    """Every key of a section and of those in it, such as `data.train[].source`: key, field, JSON schema."""
    properties = section.model_json_schema()["properties"]
    for name, info in section.model_fields.items():
        yield prefix + name, info, properties[name]
        inner = _section_in(info.annotation)
        if inner is not None:
            is_list = "tuple[" in str(info.annotation)
            yield from all_keys(inner, f"{prefix}{name}{'[]' if is_list else ''}.")


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `Section`, `Section | None` or `tuple[Section, ...]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, typing.get_args(annotation))), None)
