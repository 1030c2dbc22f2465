"""What a value in a recipe can be: types with their checks and with the words that describe them.

A check that fails raises with a short hint ("it is not whole"); what would work is said by `Works` and the
bounds, in problems.py, so that each message and docs/recipe.md take their words from one place.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, Strict
from pydantic_core import PydanticCustomError

from edgedisp.core.paths import data_folder
from edgedisp.recipe.number import read_bytes, read_number, read_whole

HELDOUT_TASKS = ("heldout_perplexity", "heldout_cloze", "heldout_continuation")
TASK_SETS = ("heldout", "paper", "small")
"""Tasks made from the held-out text. Every other task name belongs to lm-evaluation-harness."""

TAKEN_NAMES = {
    *("base", "corpus", "items", "latency", "report", "plots", "devices"),
    *("difference", "torch", "fp32", "int8", "int4"),
}
"""What an arm cannot be called: folders of a run that belong to no arm, and columns of the report."""

LAYER_NAMES = ("all", "first_half", "last_half", "last")

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Works:
    """What a value of this type looks like, in the words of error messages and of docs/recipe.md."""

    words: str


def _number(value: object) -> float:
    try:
        return read_number(value)
    except ValueError as problem:
        raise PydanticCustomError("hint", "{hint}", {"hint": str(problem)}) from None


def _whole(value: object) -> int:
    try:
        return read_whole(value)
    except ValueError as problem:
        raise PydanticCustomError("hint", "{hint}", {"hint": str(problem)}) from None


def _bytes(value: object) -> int:
    try:
        return read_bytes(value)
    except ValueError as problem:
        raise PydanticCustomError("hint", "{hint}", {"hint": str(problem)}) from None


def _refuse(hint: str) -> PydanticCustomError:
    return PydanticCustomError("hint", "{hint}", {"hint": hint})


def _text(value: str) -> str:
    # Names and paths: an invisible character in one of them costs an hour.
    if not value.strip() or value != value.strip():
        raise _refuse("it is empty" if not value.strip() else "it has spaces at an end")
    if not value.isprintable():
        raise _refuse("it holds an invisible character or a line break")
    return value


def _folder_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise _refuse("it names the run's folder")
    return value


def _arm_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}", value):
        raise _refuse("it names a folder")
    if value.casefold() in TAKEN_NAMES:
        raise _refuse("that name means something else in a run folder or a report")
    if re.search(r"-seed\d+$", value):
        raise _refuse("-seed and a number end the folder of another seed")
    return value


def _sha256(value: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise _refuse(f"it has {len(value)} characters" if len(value) != 64 else "it is not hexadecimal")
    return value.lower()


def _unique(values: tuple[_Item, ...]) -> tuple[_Item, ...]:
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise PydanticCustomError("duplicate", "{twice}", {"twice": str(twice[0])})
    return values


def _choice(value: str, choices: Sequence[str], also: str = "") -> str:
    if value not in choices:
        raise PydanticCustomError("choice", "{choices}", {"choices": list(choices), "also": also})
    return value


def _task(value: str) -> str:
    # A misspelt task of ours would be looked for in lm-evaluation-harness, after training.
    known = (*HELDOUT_TASKS, *TASK_SETS)
    ours = value.startswith("heldout") or difflib.get_close_matches(value, known, n=1, cutoff=0.8)
    return _choice(value, known, "or any lm-evaluation-harness task") if ours else value


BITS = {"int8": 8, "int4": 4}
"""Bits of a weight in the quantized bundles, by precision."""


def target_names(folder: Path | None = None) -> list[str]:
    """The device profiles that the package carries: export/targets/*.yaml, or those in `folder`."""
    return sorted(path.stem for path in (folder or data_folder("export") / "targets").glob("*.yaml"))


def _target(value: str) -> str:
    return _choice(value, target_names())


def _layers(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return _choice(value, LAYER_NAMES, "or a list of layers counted from 0")
    layers = tuple(_whole(layer) for layer in _filled(value))
    if min(layers) < 0:
        raise _refuse("layers are counted from 0")
    return _unique(layers)


def _sample(value: object) -> int | str:
    if isinstance(value, str) and value.isalpha():
        return _choice(value, ("all",), "or a whole number of at least 2")
    if (tokens := _whole(value)) < 2:
        raise _refuse("dispersion needs a pair of tokens")
    return tokens


def _forgetting(value: object) -> int | str:
    if isinstance(value, str) and value.isalpha():
        return _choice(value, ("auto",), "or a whole number of steps")
    if (steps := _whole(value)) < 1:
        raise _refuse("")
    return steps


def _modules(value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return _choice(value, ("auto",), "or a list of module names")
    names = _filled(value)
    if not all(isinstance(name, str) for name in names):
        raise _refuse("not all of it is text")
    return _unique(tuple(_text(str(name)) for name in names))


def _filled(value: object) -> tuple[object, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise _refuse("")
    return tuple(value)


def _pair(value: object) -> object:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise _refuse("")
    return tuple(value)


Whole = Annotated[int, BeforeValidator(_whole), Works("a whole number")]
Number = Annotated[float, BeforeValidator(_number), Works("a number")]
Text = Annotated[str, AfterValidator(_text), Works("text")]
Flag = Annotated[bool, Strict(), Works("true or false")]
Size = Annotated[int, BeforeValidator(_bytes), Works("a size such as 100MB")]
Unique = AfterValidator(_unique)

Count = Annotated[Whole, Ge(1)]
Seed = Annotated[Whole, Ge(0), Lt(2**32)]
Seeds = Annotated[Whole, Ge(1), Le(1000)]
Positive = Annotated[Number, Gt(0)]
NotNegative = Annotated[Number, Ge(0)]
Share = Annotated[Number, Ge(0), Le(1)]
ShareBelow1 = Annotated[Number, Ge(0), Lt(1)]
Between0And1 = Annotated[Number, Gt(0), Lt(1)]
Betas = Annotated[
    tuple[ShareBelow1, ShareBelow1], BeforeValidator(_pair), Works("a list of two numbers from 0 to below 1")
]

FolderName = Annotated[
    Text,
    AfterValidator(_folder_name),
    Works("1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit"),
]
Sha256 = Annotated[Text, AfterValidator(_sha256), Works("the file's SHA-256, 64 hexadecimal digits")]
Task = Annotated[Text, AfterValidator(_task), Works("a task name")]
Target = Annotated[Text, AfterValidator(_target), Works("a device profile")]
ArmName = Annotated[
    Text,
    AfterValidator(_arm_name),
    Works("a name of 1 to 60 letters, digits, '_' or '-', starting with a letter or digit"),
]
Forgetting = Annotated[
    int | Literal["auto"],
    BeforeValidator(_forgetting),
    Works("a whole number of steps of at least 1, or auto"),
]
Precision = Literal["fp32", "int8", "int4"]

Layers = Annotated[
    str | tuple[int, ...],
    BeforeValidator(_layers),
    Works(f"{', '.join(LAYER_NAMES)}, or a list of layers counted from 0"),
]
Sample = Annotated[
    int | Literal["all"], BeforeValidator(_sample), Works("a whole number of at least 2, or all")
]
Modules = Annotated[
    str | tuple[str, ...], BeforeValidator(_modules), Works("auto, or a list of module names")
]

Group = Annotated[Literal[16, 32, 64, 128, 256], BeforeValidator(_whole)]
AccuracyLevel = Annotated[Literal[0, 1, 4], BeforeValidator(_whole)]
HeadBits8 = Annotated[Literal[8], BeforeValidator(_whole)]
HeadBits = Annotated[Literal[4, 8], BeforeValidator(_whole)]
