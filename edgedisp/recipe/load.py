"""`load`: a recipe file and its `--set` overrides -> a checked `Recipe`, or one BadInput with every problem.

The YAML is composed into ruamel's nodes, which carry line numbers, and no constructor ever runs: a tag such
as `!!python/object` makes nothing and is reported, as are duplicate keys. Each problem is one line: place,
key, pydantic's message, the value and a hint. `--set train.tokens=10k` puts a value into the same data and
becomes that key's place.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from edgedisp.core.errors import BadInput
from edgedisp.recipe.recipe import Origin, Recipe
from edgedisp.recipe.removed import REMOVED
from edgedisp.recipe.rules import Key
from edgedisp.recipe.smoke import smoke as shrink
from edgedisp.recipe.values import near

MOST_BYTES, MOST_VALUES, MOST_SHOWN, DEEPEST = 50_000, 1_000, 30, 10
_YAML = "tag:yaml.org,2002:"
_TAGS = {_YAML + name for name in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")}

_Model = TypeVar("_Model", bound=BaseModel)


def load(path: Path, overrides: Sequence[str] = (), smoke: bool = False) -> Recipe:
    """Read and check a recipe.

    `overrides` are texts `key.path=value`, the value in YAML: `train.tokens=10k`, `arms=[baseline]`,
    `data.train.0.limit=10`. `smoke` returns the recipe cut down by `smoke.smoke`. Raises BadInput with all
    problems, one a line: place (file:line, or the override), key, what is wrong and what would work.
    """
    path = Path(path)
    document = read_yaml(path)
    for override in overrides:
        document.put(override)
    recipe = document.validate(Recipe)
    recipe._origin = Origin(path)
    return shrink(recipe, where=document.place(("model", "architecture"))) if smoke else recipe


@dataclass
class Document:
    """A YAML file as plain data, with the place of every key and the problems of the writing itself."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[tuple[Key, str]] = field(default_factory=list)
    values: int = 0

    def place(self, key: Key) -> str:
        """`file:line` or `--set ...` of a key; of its section, for a key that is not there."""
        lengths = (length for length in range(len(key), 0, -1) if key[:length] in self.places)
        return self.places.get(key[: next(lengths, 0)], f"{self.name}:1")

    def put(self, override: str) -> None:
        """Apply one `key.path=value`, the value read as YAML. Raises BadInput where it cannot be applied."""
        place = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
        path, equals, text = override.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts) or len(parts) > DEEPEST:
            raise BadInput(_one_line(f"{place}: needs key=value, such as train.tokens=10k"))
        try:
            node = _compose(text)
            parent: Any = {"": self.data}
            key: Key = ()
            index: str | int = ""
            for part in parts:
                parent = parent[index]
                index = _index(parent, part)
                key = (*key, index)
                self.places.setdefault(key, place)
            self.places = {old: line for old, line in self.places.items() if old[: len(key)] != key}
            self.places[key] = place
            parent[index] = None if node is None else self.plain(node, key, place)
        except (YAMLError, RecursionError, ValueError) as problem:
            raise BadInput(_one_line(f"{place}: {path.strip()}: {_reason(problem)}")) from None

    def plain(self, node: Any, key: Key, place: str | None = None) -> Any:
        """A node as None, bool, int, float, str, list or dict. `place` is fixed for overrides."""
        self.values += 1
        if self.values > MOST_VALUES:
            raise BadInput(f"{self.name}: more than {MOST_VALUES:,} values; is this a recipe?")
        if place is None:
            self.places.setdefault(key, self._line(node))
        if node.tag not in _TAGS:
            tag = node.tag.replace(_YAML, "!!")
            self.problems.append((key, f"the tag {tag} is not read; write the value without it"))
            return None
        if isinstance(node, SequenceNode):
            return [self.plain(item, (*key, index), place) for index, item in enumerate(node.value)]
        return self._mapping(node, key, place) if isinstance(node, MappingNode) else _scalar(node)

    def _mapping(self, node: Any, key: Key, place: str | None) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = str(name_node.value) if isinstance(name_node, ScalarNode) else "?"
            path = (*key, name)
            if name_node.tag == _YAML + "merge" or not isinstance(name_node, ScalarNode):
                self.places.setdefault(path, place or self._line(name_node))
                self.problems.append((path, "a key must be plain text; merge keys are not read"))
            elif name in result:
                self.problems.append((path, f"the key is given twice (again at {self._line(name_node)})"))
            else:
                if place is None:
                    self.places[path] = self._line(name_node)
                result[name] = self.plain(value_node, path, place)
        return result

    def _line(self, node: Any) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def validate(self, model: type[_Model], extra: Sequence[tuple[Key, str]] = ()) -> _Model:
        """The data as a `model`. Raises BadInput with all problems, `extra` among them, in file order."""
        problems, result = [*self.problems, *extra], None
        reported = [key for key, _ in problems]
        try:
            result = model.model_validate(self.data)
        except ValidationError as invalid:
            for error in invalid.errors(include_url=False):
                # A list with a faulty item counts as too short, which is noise beside the item's own error.
                is_noise = error["type"] == "too_short" and error["input"]
                if not is_noise and not any(error["loc"][: len(key)] == key for key in reported):
                    problems.append((error["loc"], _describe(error, model)))
        if result is None or problems:
            raise BadInput(self._summary(problems))
        return result

    def _summary(self, problems: Sequence[tuple[Key, str]]) -> str:
        def line_number(problem: tuple[Key, str]) -> float:
            line = self.place(problem[0]).rpartition(":")[2]
            return int(line) if line.isdecimal() else math.inf

        lines = [
            _one_line(f"{self.place(key)}: {'.'.join(map(str, key))}: {words}")
            for key, words in sorted(problems, key=line_number)
        ]
        if len(lines) == 1:
            return lines[0]
        numbered = [f"  {number}. {line}" for number, line in enumerate(lines[:MOST_SHOWN], 1)]
        more = [f"  and {len(lines) - MOST_SHOWN:,} more"] if len(lines) > MOST_SHOWN else []
        return "\n".join([f"{self.name}: {len(lines):,} problems", *numbered, *more])


def _index(parent: Any, part: str) -> str | int:
    """One part of an override's path as an index of `parent`; an absent section is created."""
    if isinstance(parent, list):
        if not part.isdecimal() or int(part) >= len(parent):
            raise ValueError(f"the list has no item '{part}': it has {len(parent)}, counted from 0")
        return int(part)
    if not isinstance(parent, dict):
        raise ValueError(f"{show(parent)} has no keys")
    if parent.get(part) is None:
        parent[part] = {}
    return part


def read_yaml(path: Path, what: str = "a recipe", keys: str = "name, model, data and train") -> Document:
    """The YAML file of `what`, which needs `keys` (both for messages).

    Raises BadInput if it cannot be read, is too large, not UTF-8, not YAML, or not a mapping.
    """
    document, text = Document(str(path)), ""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        text = raw.decode("utf-8-sig")
        if len(raw) > MOST_BYTES:
            raise BadInput(f"{path}: too large; {what} is a small YAML file")
        node = _compose(text)
        if not isinstance(node, MappingNode):
            raise BadInput(f"{path}:1: {what} is a mapping with {keys}")
        document.data = document.plain(node, ())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except BadInput:
        raise
    except (OSError, ValueError, YAMLError, RecursionError) as problem:
        mark = getattr(problem, "problem_mark", None)
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        if isinstance(problem, ReaderError):  # a control character
            place = f"{path}:{text.count(chr(10), 0, problem.position) + 1}"
        raise BadInput(_one_line(f"{place}: {_reason(problem)}")) from None
    return document


def show(value: object) -> str:
    """A value as YAML would write it, in at most 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str | list | tuple) else str(value)
    text = f"a mapping of {', '.join(map(str, value))}" if isinstance(value, dict) else text
    return text if len(text) <= 60 else f"{text[:57]}..."


def _describe(error: Any, model: type[BaseModel]) -> str:
    """One item of `ValidationError.errors()` in words: the message, the value and a hint."""
    key, kind, value, message = error["loc"], error["type"], error["input"], error["msg"]
    if kind == "extra_forbidden":
        return REMOVED.get(".".join(map(str, key))) or _unknown(key, model)
    if kind in ("missing", "rule"):
        return "missing" if kind == "missing" else str(message)
    if kind == "value_error":
        message = error["ctx"]["error"]
    if kind == "model_type":
        message = f"needs a mapping with {', '.join(_section_at(model, key).model_fields)}"
    guess = near(value, re.findall(r"'([^']*)'", message)) if kind == "literal_error" else None
    hint = f"; did you mean '{guess}'?" if guess else ""
    is_number = kind == "string_type" and isinstance(value, int | float)
    return f"{message} (found {show(value)}){'; put it in quotes' if is_number else hint}"


def _unknown(key: Key, root: type[BaseModel]) -> str:
    name, keys = str(key[-1]), list(_section_at(root, key[:-1]).model_fields)
    elsewhere = next((path for path in _all_keys(root) if path.rpartition(".")[2] == name), None)
    guess = elsewhere or near(name, keys)
    return (
        f"unknown key; did you mean '{guess}'?" if guess else f"unknown key; the keys are {', '.join(keys)}"
    )


def _section_at(root: type[BaseModel], key: Key) -> type[BaseModel]:
    """The section behind a key, or behind the longest part of it that names one."""
    section = root
    for part in key:
        if isinstance(part, str) and part in section.model_fields:
            section = section_in(section.model_fields[part].annotation) or section
    return section


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `Section`, `Section | None` or `tuple[Section, ...]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_in, typing.get_args(annotation))), None)


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        inner = section_in(info.annotation)
        if inner is not None and name != "arms":
            yield from _all_keys(inner, f"{prefix}{name}.")


def _compose(text: str) -> Any:
    # The pure reader, so that messages and marks are the same with and without ruamel's C extension.
    return YAML(typ="safe", pure=True).compose(text)


def _scalar(node: Any) -> bool | int | float | str | None:
    kind, text = node.tag.removeprefix(_YAML), str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("true", "yes", "on")
    # What is not a finite number to Python (hexadecimal, .inf, 1e400, 5,000 digits) stays text, and the
    # key's own check says what is wrong with it.
    try:
        if kind == "int":
            return int(text.replace("_", ""))
        if kind == "float" and math.isfinite(number := float(text.replace("_", ""))):
            return number
    except ValueError:
        return text
    return text


def _reason(problem: BaseException) -> str:
    if isinstance(problem, RecursionError):
        return "nested too deeply, or an alias holds itself"
    if isinstance(problem, YAMLError):
        return f"not YAML: {getattr(problem, 'problem', None) or 'a character that YAML does not allow'}"
    return f"cannot be read: {problem.strerror}" if isinstance(problem, OSError) else str(problem)


def _one_line(text: str) -> str:
    # A key or tag can hold line breaks and terminal codes; a problem is one line of visible text.
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
