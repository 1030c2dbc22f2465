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
from edgedisp.recipe.smoke import smoke as shrink
from edgedisp.recipe.values import Key, near

MOST_BYTES, MOST_VALUES, MOST_SHOWN, DEEPEST = 50_000, 1_000, 30, 10
_YAML = "tag:yaml.org,2002:"
_TAGS = {_YAML + name for name in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")}
_QUANTIZE = {
    "rescale": "removed; method gptq loses less in less time",
    "max_flips": "removed with accuracy_level auto; accuracy_level 0 computes in fp32, 4 in int8",
    "damping": "removed; method gptq always uses 0.01",
    "act_order": "removed; method gptq always takes the most important columns first",
    "correction": "removed; method gptq always uses 0.5",
    "head_group": "removed; the head has the groups of `group`",
}
REMOVED = {
    **{f"quantize.{name}.{key}": words for name in ("int8", "int4") for key, words in _QUANTIZE.items()},
    "quantize.head_group": _QUANTIZE["head_group"],  # of a device profile
    "train.quantization_aware.learn_scales": "removed; method gptq finds the scales when rounding begins",
    "train.quantization_aware.ramp": "removed; rounding begins at once, at `start`",
    "evaluate.batch_tokens": "removed; every sequence is scored alone, so that batches change no score",
}
"""Dotted key of recipes and device profiles of earlier versions -> what replaced it."""

_Model = TypeVar("_Model", bound=BaseModel)


def load(path: Path, overrides: Sequence[str] = (), smoke: bool = False) -> Recipe:
    """Read and check a recipe.

    `overrides` are texts `key.path=value`, the value in YAML: `train.tokens=10k`, `arms=[baseline]`,
    `data.train.0.limit=10`. `smoke` returns the recipe cut down by `smoke.smoke`. Raises BadInput with all
    problems, one a line: place (file:line, or the override), key, what is wrong and what would work.
    """
    document = read_yaml(Path(path), "a recipe", "name, model, data and train")
    for override in overrides:
        document.put(override)
    recipe = document.validate(Recipe)
    recipe._origin = Origin(Path(path))
    return shrink(recipe, where=document.location(("model", "architecture"))) if smoke else recipe


def read_yaml(path: Path, what: str, keys: str) -> Document:
    """The YAML file of `what`, which needs `keys` (both for messages).

    Raises BadInput if it cannot be read, is too large, not UTF-8, not YAML, or not a mapping.
    """
    document, text = Document(str(path)), ""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        text = raw.decode("utf-8-sig")
        node = None if len(raw) > MOST_BYTES else _compose(text)
        if isinstance(node, MappingNode):
            document.data = document.plain(node, ())
            return document
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, YAMLError, RecursionError) as problem:
        mark = getattr(problem, "problem_mark", None)
        location = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        if isinstance(problem, ReaderError):  # a control character
            location = f"{path}:{text.count(chr(10), 0, problem.position) + 1}"
        raise BadInput(_one_line(f"{location}: {_reason(problem)}")) from None
    if len(raw) > MOST_BYTES:
        raise BadInput(f"{path}: too large; {what} is a small YAML file")
    raise BadInput(f"{path}:1: {what} is a mapping with {keys}")


@dataclass
class Document:
    """A YAML file as plain data, with the location of every key and the problems of the writing itself."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    locations: dict[Key, str] = field(default_factory=dict)
    problems: list[tuple[Key, str]] = field(default_factory=list)
    values: int = 0

    def location(self, key: Key) -> str:
        """`file:line` or `--set ...` of a key; of its section, for a key that is not there."""
        sections = (key[:length] for length in range(len(key), -1, -1))
        return next((self.locations[part] for part in sections if part in self.locations), f"{self.name}:1")

    def put(self, override: str) -> None:
        """Apply one `key.path=value`, the value read as YAML. Raises BadInput where it cannot be applied."""
        location = f"--set {override if len(override) <= 80 else override[:77] + '...'}"
        path, equals, text = override.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts) or len(parts) > DEEPEST:
            raise BadInput(_one_line(f"{location}: needs key=value, such as train.tokens=10k"))
        try:
            node = _compose(text)
            parent: Any = {"": self.data}
            key: Key = ()
            index: str | int = ""
            for part in parts:
                parent = parent[index]
                index = _index(parent, part)
                key = (*key, index)
                self.locations.setdefault(key, location)
            self.locations = {old: line for old, line in self.locations.items() if old[: len(key)] != key}
            self.locations[key] = location
            parent[index] = None if node is None else self.plain(node, key, location)
        except (YAMLError, RecursionError, ValueError) as problem:
            raise BadInput(_one_line(f"{location}: {path.strip()}: {_reason(problem)}")) from None

    def plain(self, node: Any, key: Key, override: str | None = None) -> Any:
        """A node as None, bool, int, float, str, list or dict. `override`: the location of all its keys."""
        self.values += 1
        if self.values > MOST_VALUES:
            raise BadInput(f"{self.name}: more than {MOST_VALUES:,} values; is this a recipe?")
        if override is None:
            self.locations.setdefault(key, self._line(node))
        if node.tag not in _TAGS:
            tag = node.tag.replace(_YAML, "!!")
            self.problems.append((key, f"the tag {tag} is not read; write the value without it"))
            return None
        if isinstance(node, SequenceNode):
            return [self.plain(item, (*key, index), override) for index, item in enumerate(node.value)]
        if not isinstance(node, MappingNode):
            return _scalar(node.tag.removeprefix(_YAML), str(node.value))
        mapping: dict[str, Any] = {}
        for name_node, value_node in node.value:
            is_name = isinstance(name_node, ScalarNode)
            name = str(name_node.value) if is_name else "?"
            path, line = (*key, name), self._line(name_node)
            if name_node.tag == _YAML + "merge" or not is_name:
                self.locations.setdefault(path, override or line)
                self.problems.append((path, "a key must be plain text; merge keys are not read"))
            elif name in mapping:
                self.problems.append((path, f"the key is given twice (again at {line})"))
            else:
                if override is None:
                    self.locations[path] = line
                mapping[name] = self.plain(value_node, path, override)
        return mapping

    def _line(self, node: Any) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def validate(self, model: type[_Model], context: object = None) -> _Model:
        """The data as a `model`. Raises BadInput with all problems in the order of the file."""
        problems = [*self.problems]
        try:
            result = model.model_validate(self.data, context=context)
            if not problems:
                return result
        except ValidationError as invalid:
            reported = [key for key, _ in problems]
            for error in invalid.errors(include_url=False):
                # A list with a faulty item counts as too short, which is noise beside the item's own error.
                is_noise = error["type"] == "too_short" and error["input"]
                if not is_noise and not any(error["loc"][: len(key)] == key for key in reported):
                    problems.append((error["loc"], _describe(error, model)))

        def line_number(problem: tuple[Key, str]) -> float:
            line = self.location(problem[0]).rpartition(":")[2]
            return int(line) if line.isdecimal() else math.inf

        lines = [
            _one_line(f"{self.location(key)}: {'.'.join(map(str, key))}: {words}")
            for key, words in sorted(problems, key=line_number)
        ]
        if len(lines) == 1:
            raise BadInput(lines[0])
        numbered = [f"  {number}. {line}" for number, line in enumerate(lines[:MOST_SHOWN], 1)]
        more = [f"  and {len(lines) - MOST_SHOWN:,} more"] if len(lines) > MOST_SHOWN else []
        raise BadInput("\n".join([f"{self.name}: {len(lines):,} problems", *numbered, *more]))


def _index(parent: Any, part: str) -> str | int:
    """One part of an override's path as an index of `parent`; an absent section is created."""
    if isinstance(parent, list):
        if not part.isdecimal() or int(part) >= len(parent):
            raise ValueError(f"the list has no item '{part}': it has {len(parent)}, counted from 0")
        return int(part)
    if not isinstance(parent, dict):
        raise ValueError(f"{_show(parent)} has no keys")
    if parent.get(part) is None:
        parent[part] = {}
    return part


def _describe(error: Any, model: type[BaseModel]) -> str:
    """One item of `ValidationError.errors()` in words: the message, the value and a hint."""
    key, kind, value, message = error["loc"], error["type"], error["input"], error["msg"]
    if kind == "extra_forbidden":
        return REMOVED.get(".".join(map(str, key))) or _unknown(key, model)
    if kind in ("missing", "rule"):
        return "missing" if kind == "missing" else str(message)
    hint = ""
    if kind == "value_error":
        message = error["ctx"]["error"]
    elif kind == "model_type":
        message = f"needs a mapping with {', '.join(_section_at(model, key).model_fields)}"
    elif kind == "literal_error" and (guess := near(value, re.findall(r"'([^']*)'", message))):
        hint = f"; did you mean '{guess}'?"
    elif kind == "string_type" and isinstance(value, int | float):
        hint = "; put it in quotes"
    return f"{message} (found {_show(value)}){hint}"


def _show(value: object) -> str:
    """A value as YAML would write it, in at most 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str | list | tuple) else str(value)
    text = f"a mapping of {', '.join(map(str, value))}" if isinstance(value, dict) else text
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown(key: Key, root: type[BaseModel]) -> str:
    name, keys = str(key[-1]), list(_section_at(root, key[:-1]).model_fields)
    guess = next((path for path in _all_keys(root) if path.rpartition(".")[2] == name), None) or near(
        name, keys
    )
    hint = f"did you mean '{guess}'?" if guess else f"the keys are {', '.join(keys)}"
    return f"unknown key; {hint}"


def _section_at(root: type[BaseModel], key: Key) -> type[BaseModel]:
    """The section of a key, or of the longest part of it that names one."""
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


def _scalar(kind: str, text: str) -> bool | int | float | str | None:
    """A YAML scalar. What is not a finite number to Python (hexadecimal, .inf, 1e400, 5,000 digits) stays
    text, and the key's own check says what is wrong with it."""
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("true", "yes", "on")
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
