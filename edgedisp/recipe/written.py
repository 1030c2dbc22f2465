"""A recipe as written: plain data, and for every key the place where it stands.

The YAML is composed into ruamel's nodes and no further. Nodes carry line numbers, and no constructor ever
runs, so a tag such as `!!python/object` cannot make anything; it is reported. Duplicate keys, which YAML
constructors often take silently, are reported too. Anchors and aliases work; merge keys (`<<`) do not.

`--set train.tokens=10k` puts a value into the same data and becomes that key's place, so that a bad override
is reported like a bad line.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

from edgedisp.core.errors import BadInput
from edgedisp.recipe.clashes import Key
from edgedisp.recipe.problems import Place, Problem, dotted, near, show

MOST_BYTES = 1_000_000
MOST_VALUES = 10_000
_PREFIX = "tag:yaml.org,2002:"
_TAGS = {
    _PREFIX + name for name in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "merge")
}
# What ruamel says -> the same in plain words, and what is usually the cause.
_PLAIN = {
    "mapping values are not allowed here": "found an unexpected ': '",
    "that cannot start any token": "where a key or value should start",
    "found character": "found",
    "'\\t'": "a tab",
    "but found another document": "found a second document",
    "<block end>": "the end of the section",
    "but found '?'": "but found another key",
    "'<stream end>'": "the end of the file",
    "unexpected end of stream": "the end of the file",
    "flow sequence": "list in brackets",
    "flow mapping": "mapping in braces",
    "block collection": "list",
    "block mapping": "section",
    "scalar": "text",
}
_CAUSES = {
    "unexpected ': '": "is the line before it complete, the indentation even, text with ': ' in quotes?",
    "a tab": "indent with spaces",
    "should start": "text that starts with a special sign needs quotes",
    "expected ',' or": "is a bracket or brace left open?",
    "found the end of the file": "is a quote left open?",
    "the end of the section": "keys of one section start in one column, each item of a list with '- '",
    "second document": "one file holds one recipe: take the line --- out",
    "undefined alias": "text that starts with * needs quotes",
    "unknown escape": "use single quotes for text with a backslash",
}


def read_text(path: Path, what: str = "a recipe") -> str:
    """The text of a YAML file (`what`, in messages). BadInput if missing, a folder, unreadable, large or not
    UTF-8."""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file{near_file(path)}") from None
    except IsADirectoryError:
        inside = sorted(entry.name for entry in path.glob("*.yaml"))[:12]
        raise BadInput(
            f"{path}: this is a folder; name {what} file in it" + (f": {', '.join(inside)}" if inside else "")
        ) from None
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else str(problem)
        raise BadInput(f"{path}: cannot be read: {reason}") from None
    if len(raw) > MOST_BYTES:
        raise BadInput(f"{path}: larger than {MOST_BYTES:,} bytes; {what} is a small YAML file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = raw.count(b"\n", 0, problem.start) + 1
        raise BadInput(
            f"{path}:{line}: byte {raw[problem.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from None


def near_file(path: Path) -> str:
    """`. Did you mean ...?` from the YAML files beside a path that does not exist, or nothing."""
    try:
        found = [entry for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")]
    except OSError:
        return ""
    beside = {entry.stem: entry for entry in found}
    guess = near(path.name, list(beside)) or near(path.stem, list(beside))
    return f". Did you mean {beside[guess]}?" if guess else ""


@dataclass
class Written:
    """A recipe's plain data, where each key stands, and the problems of the writing itself."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    values: int = 0

    def place(self, key: Key) -> Place:
        """Where a key stands; for a key that is not there, where its section stands."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.places:
                return self.places[key[:length]]
        return self.places.get((), Place(f"{self.name}:1", 1))

    def put(self, override: str) -> None:
        """Apply one `key.path=value`, the value read as YAML; a fault becomes a problem."""
        place = Place(f"--set {override if len(override) <= 80 else override[:77] + '...'}", None)
        path, equals, text = override.partition("=")
        parts = path.strip().split(".")
        if not equals or not all(parts):
            self.problems.append(Problem(place, (), "needs key=value, such as train.tokens=10k"))
            return
        try:
            node = _compose(text)
            value = None if node is None else self._plain(node, tuple(parts), place)
        except (YAMLError, RecursionError) as problem:
            self.problems.append(Problem(place, tuple(parts), f"the value is not YAML: {_said(problem)}"))
            return
        words = self._set(parts, value, place)
        if words:
            self.problems.append(Problem(place, tuple(parts), words))

    def _set(self, parts: list[str], value: object, place: Place) -> str:
        """Walk to the section, making those that are absent, and set the value; returns a complaint."""
        here: Any = self.data
        key: Key = ()
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            step: str | int = part
            if isinstance(here, list):
                if not part.isdecimal() or int(part) >= len(here):
                    items = "its only item is 0" if len(here) == 1 else f"it has {len(here)}, counted from 0"
                    return f"{dotted(key)} is a list, and has no item '{part}': {items}"
                step = int(part)
            elif not isinstance(here, dict):
                return f"{dotted(key)} is {show(here)}: it has no keys"
            key = (*key, step)
            absent = isinstance(here, dict) and here.get(part) is None
            if last or absent:
                here[step] = value if last else {}
                self.places = {old: where for old, where in self.places.items() if old[: len(key)] != key}
                self.places[key] = place
            here = here[step]
        return ""

    def _plain(self, node: Any, key: Key, place: Place | None = None) -> Any:
        """A node as None, bool, int, float, str, list or dict. `place` is fixed for overrides."""
        self.values += 1
        if self.values > MOST_VALUES:
            raise BadInput(f"{self.name}: more than {MOST_VALUES:,} values; is this a recipe?")
        here = place or self._line(node)
        if node.tag not in _TAGS:
            tag = node.tag.replace(_PREFIX, "!!")
            self.problems.append(Problem(here, key, f"the tag {tag} is not read; write the value without it"))
            return None
        if isinstance(node, MappingNode):
            return self._mapping(node, key, place)
        if isinstance(node, SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                if place is None:
                    self.places[(*key, index)] = self._line(item)
                items.append(self._plain(item, (*key, index), place))
            return items
        return _scalar(node)

    def _mapping(self, node: Any, key: Key, place: Place | None) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            here = place or self._line(name_node)
            if not isinstance(name_node, ScalarNode):
                self.problems.append(Problem(here, key, "a key must be plain text, found a list or mapping"))
                continue
            name = str(name_node.value)
            path = (*key, name)
            if name_node.tag == _PREFIX + "merge":
                self.problems.append(Problem(here, path, "merge keys are not read; write the keys out"))
                continue
            if name in result:
                first = self.places[path].words if place is None else "before"
                self.problems.append(
                    Problem(here, path, f"the key is given twice (first at {first}); keep one")
                )
            if place is None:
                self.places[path] = here
            result[name] = self._plain(value_node, path, place)
        return result

    def _line(self, node: Any) -> Place:
        line = node.start_mark.line + 1
        return Place(f"{self.name}:{line}", line)


def parse(text: str, name: str, what: str = "a recipe", keys: str = "name, model, data and train") -> Written:
    """Read the YAML of `what`, which needs `keys` (both for messages). Raises BadInput where no data come out
    of it: bad YAML, empty, not a mapping."""
    written = Written(name)
    try:
        node = _compose(text)
        if node is None:
            raise BadInput(f"{name}: the file is empty; {what} needs {keys}")
        if not isinstance(node, MappingNode):
            found = "a list" if isinstance(node, SequenceNode) else show(_scalar(node))
            line = node.start_mark.line + 1
            raise BadInput(f"{name}:{line}: found {found}; {what} is a mapping with {keys}")
        written.data = written._plain(node, ())
    except RecursionError:
        raise BadInput(f"{name}: nested too deeply, or an alias holds itself") from None
    except YAMLError as problem:
        raise BadInput(_not_yaml(problem, text, name)) from None
    written.places[()] = Place(f"{name}:{node.start_mark.line + 1}", node.start_mark.line + 1)
    return written


def to_yaml(data: dict[str, Any]) -> str:
    """Plain data as YAML that `parse` reads back to the same values."""
    yaml = YAML()
    yaml.width = 10**6  # never fold: a folded line loses nothing, but is hard to read and to search
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def _compose(text: str) -> Any:
    # The pure reader, so that messages and marks are the same with and without ruamel's C extension.
    return YAML(typ="safe", pure=True).compose(text)


def _scalar(node: Any) -> bool | int | float | str | None:
    kind, text = node.tag.removeprefix(_PREFIX), str(node.value)
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


def _not_yaml(problem: YAMLError, text: str, name: str) -> str:
    """`file:line:column: not YAML: why`, the line itself with a caret, and what is usually the cause."""
    if not isinstance(problem, MarkedYAMLError) or problem.problem_mark is None:
        position = getattr(problem, "position", 0)
        line, column = text.count("\n", 0, position), position - (text.rfind("\n", 0, position) + 1)
        return f"{name}:{line + 1}:{column + 1}: not YAML: an invisible control character; delete it"
    mark, begun, between, shown = problem.problem_mark, problem.context_mark, "", ""
    if begun and begun.line != mark.line and str(problem.context).startswith("while"):
        between = f", {_plain_words(problem.context)} that starts on line {begun.line + 1}"
    lines = text.splitlines()
    if mark.line < len(lines):
        shown = f"\n    {lines[mark.line].replace(chr(9), ' ')}\n    {' ' * mark.column}^"
    return f"{name}:{mark.line + 1}:{mark.column + 1}: not YAML: {_said(problem, between)}{shown}"


def _said(problem: Exception, between: str = "") -> str:
    said = _plain_words(
        str(getattr(problem, "problem", None) or "it is nested too deeply, or an alias holds itself")
    )
    cause = next((words for sign, words in _CAUSES.items() if sign in said), "")
    return f"{said}{between}" + (f" ({cause})" if cause else "")


def _plain_words(said: str) -> str:
    for theirs, ours in _PLAIN.items():
        said = said.replace(theirs, ours)
    return said
