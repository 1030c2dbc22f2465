"""The types of the values in a recipe, each with its check.

A check raises ValueError with what would work; load.py adds place, key and value. A type whose JSON schema
says too little for docs/recipe.md carries words of its own (`accepts`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Strict, WithJsonSchema

from edgedisp.core.files import data_folder
from edgedisp.recipe.units import read_bytes, read_number, read_whole

HELDOUT_TASKS = ("heldout_perplexity", "heldout_cloze", "heldout_continuation")
"""Tasks made from the held-out text. Every other task name belongs to lm-evaluation-harness."""
TASK_SETS = ("heldout", "paper", "small")
BITS = {"int8": 8, "int4": 4}
"""Bits of a weight in the quantized bundles, by precision."""
LAYER_NAMES = ("all", "first_half", "last_half", "last")
VARIANTS = ("angular", "cosine", "l2_repel", "decorrelation", "orthogonalization", "spectral_entropy")
TAKEN_NAMES = {
    *("base", "corpus", "items", "latency", "report", "plots", "devices"),
    *("difference", "torch", "fp32", "int8", "int4"),
}
"""What an arm cannot be called: folders of a run that belong to no arm, and columns of the report."""

_Item = TypeVar("_Item")


def near(word: object, choices: Sequence[str]) -> str | None:
    """The closest of `choices` to a misspelt word, or None."""
    text = str(word)[:80]
    spellings = (difflib.get_close_matches(each, choices, n=1, cutoff=0.6) for each in (text, text.lower()))
    return next((close[0] for close in spellings if close), None)


def target_names(folder: Path | None = None) -> list[str]:
    """The device profiles that the package carries: export/targets/*.yaml, or those in `folder`."""
    return sorted(path.stem for path in (folder or data_folder("export") / "targets").glob("*.yaml"))


def choice(value: str, choices: Sequence[str], also: str = "") -> str:
    """`value` if it is one of `choices`; ValueError with the closest one otherwise."""
    if value not in choices:
        guess = near(value, choices)
        listed = ", ".join(choices) + (f", {also}" if also else "")
        raise ValueError((f"did you mean '{guess}'? " if guess else "") + f"(choices: {listed})")
    return value


def unique(
    values: tuple[_Item, ...], same: Callable[[_Item], object] = lambda item: item
) -> tuple[_Item, ...]:
    """The values; ValueError naming one that is listed twice (by `same`)."""
    seen: set[object] = set()
    for value in values:
        if same(value) in seen:
            raise ValueError(f"'{value}' is listed twice; name each once")
        seen.add(same(value))
    return values


def _text(value: str) -> str:
    # Names and paths: an invisible character in one of them costs an hour.
    if not value.strip() or value != value.strip():
        raise ValueError("needs text without spaces at its ends" if value.strip() else "needs text")
    if not value.isprintable():
        raise ValueError("needs text without invisible characters and line breaks")
    return value


def _matching(pattern: str, words: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"needs {words}")
        return value

    return AfterValidator(check)


def _arm_name(value: str) -> str:
    if value.casefold() in TAKEN_NAMES or re.search(r"-seed\d+$", value):
        raise ValueError("this name means something else in a run folder or a report; choose another")
    return value


def _task(value: str) -> str:
    # A misspelt task of ours would be looked for in lm-evaluation-harness, after training.
    known = (*HELDOUT_TASKS, *TASK_SETS)
    ours = value.startswith("heldout") or difflib.get_close_matches(value, known, n=1, cutoff=0.8)
    return choice(value, known, "or any lm-evaluation-harness task") if ours else value


def _layers(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return choice(value, LAYER_NAMES, "or a list of layers counted from 0")
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"needs {', '.join(LAYER_NAMES)}, or a list of layers counted from 0")
    layers = unique(tuple(read_whole(layer) for layer in value))
    if not 0 <= min(layers) <= max(layers) < 10_000:
        raise ValueError("layers are counted from 0 and below 10,000")
    return layers


def _whole_or(word: str, least: int, unit: str) -> BeforeValidator:
    def check(value: object) -> int | str:
        if isinstance(value, str) and value.isalpha():
            return choice(value, (word,), f"or a whole number of {unit}")
        number = read_whole(value)
        if not least <= number <= 10**9:
            raise ValueError(f"needs {word}, or a whole number of at least {least} {unit}")
        return number

    return BeforeValidator(check)


def _modules(value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return choice(value, ("auto",), "or a list of module names")
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError("needs auto, or a list of module names")
    return unique(tuple(_text(name) for name in value))


def accepts(words: str) -> WithJsonSchema:
    """What the reference says of a type whose JSON schema says too little."""
    return WithJsonSchema({"accepts": words})


WHOLE, NUMBER = BeforeValidator(read_whole), BeforeValidator(read_number)  # listed last: they run first
Text = Annotated[str, AfterValidator(_text)]
Flag = Annotated[bool, Strict()]
Size = Annotated[int, BeforeValidator(read_bytes), accepts("a size such as 100MB")]
Unique = AfterValidator(unique)

Count = Annotated[int, Ge(1), Le(10**9), WHOLE]
Tokens = Annotated[int, Ge(1), Le(10**14), WHOLE]
Length = Annotated[int, Ge(1), Le(2**20), WHOLE]
Steps = Annotated[int, Ge(1), Le(10**9), WHOLE]
Seed = Annotated[int, Ge(0), Lt(2**32), WHOLE]
Positive = Annotated[float, Gt(0), Le(1e9), NUMBER]
NotNegative = Annotated[float, Ge(0), Le(1e9), NUMBER]
Share = Annotated[float, Ge(0), Le(1), NUMBER]
ShareBelow1 = Annotated[float, Ge(0), Lt(1), NUMBER]
Between0And1 = Annotated[float, Gt(0), Lt(1), NUMBER]

FolderName = Annotated[
    Text,
    _matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
        "1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit: it names a folder",
    ),
]
ArmName = Annotated[
    Text,
    _matching(
        r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}",
        "1 to 60 letters, digits, '_' or '-', starting with a letter or digit: it names a folder",
    ),
    AfterValidator(_arm_name),
]
Sha256 = Annotated[
    Text, _matching("[0-9a-fA-F]{64}", "a SHA-256, 64 hexadecimal digits"), AfterValidator(str.lower)
]
Task = Annotated[Text, AfterValidator(_task)]
TargetName = Annotated[Text, AfterValidator(lambda value: choice(value, target_names()))]
Precision = Literal["fp32", "int8", "int4"]
Layers = Annotated[
    str | tuple[int, ...],
    BeforeValidator(_layers),
    accepts(f"{', '.join(LAYER_NAMES)}, or a list of layers counted from 0"),
]
Sample = Annotated[
    int | Literal["all"], _whole_or("all", 2, "tokens"), accepts("a whole number of at least 2, or all")
]
Forgetting = Annotated[
    int | Literal["auto"], _whole_or("auto", 1, "steps"), accepts("a whole number of at least 1, or auto")
]
Modules = Annotated[
    str | tuple[str, ...], BeforeValidator(_modules), accepts("auto, or a list of module names")
]
Group = Annotated[Literal[16, 32, 64, 128, 256], WHOLE]
AccuracyLevel = Annotated[Literal[0, 1, 4], WHOLE]
HeadBits = Annotated[Literal[4, 8], WHOLE]


class Section(BaseModel):
    """A part of a recipe: frozen, without unknown keys. The text under a key goes to docs/recipe.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
