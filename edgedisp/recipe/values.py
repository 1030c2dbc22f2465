"""The types of the values in a recipe, and numbers as people write them: `40k`, `200M`, `5%`, `5e-5`.

A check raises ValueError with what would work; load.py adds file, line, key and value. Numbers are read as
`Decimal`, so `0.1k` is exactly 100. Lower-case `m` is refused because it could be milli.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Strict, WithJsonSchema

from edgedisp.core.files import data_folder
from edgedisp.core.results import ANSWERS_TASK

HELDOUT_TASKS = ("heldout_perplexity", "heldout_cloze", "heldout_continuation")
"""Tasks made from the held-out text. Every other name but `ANSWERS_TASK` belongs to lm-evaluation-harness."""
TASK_SETS = ("heldout", "paper", "small")
BITS = {"int8": 8, "int4": 4}
"""Bits of a weight in the quantized bundles, by precision."""
LAYER_NAMES = ("all", "first_half", "last_half", "last")
RESERVED_NAMES = {
    *("base", "corpus", "items", "latency", "report", "plots", "devices"),
    *("difference", "torch", "fp32", "int8", "int4"),
}
"""What an arm cannot be called: folders of a run that belong to no arm, and columns of the report."""

Key = tuple[str | int, ...]
_Item = TypeVar("_Item")


class Section(BaseModel):
    """A part of a recipe: frozen, without unknown keys. The text under a key goes to docs/recipe.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


# ---------------------------------------------------------------- numbers

_NUMBER = re.compile(
    r"([+-]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]{1,3})?) ?([kKMB%]?)"
)
_UNITS = {"": Decimal(1), "k": Decimal(10**3), "K": Decimal(10**3), "M": Decimal(10**6), "B": Decimal(10**9)}
_UNITS["%"] = Decimal("0.01")
_LONGEST = 40  # characters; more than any float64 or 64-bit integer needs


def read_number(value: object) -> float:
    """A finite float64 from a YAML value."""
    number = float(_exact(value, "a number, such as 0.1, 5e-5 or 5%"))
    if not math.isfinite(number):
        raise ValueError("the number is too large")
    return number


def read_whole(value: object) -> int:
    """An exact int below 10^18 from a YAML value: `40k` and `4e4` are whole, `40.5` is not."""
    exact = _exact(value, "a whole number, such as 40, 40k or 200M")
    if exact and exact.adjusted() >= 18:
        raise ValueError("the number is too large")
    if exact != exact.to_integral_value():
        raise ValueError("needs a whole number")
    return int(exact)


def _exact(value: object, works: str) -> Decimal:
    text = value.strip() if isinstance(value, str) else repr(value) if isinstance(value, int | float) else ""
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST else None
    if match is None or isinstance(value, bool):
        raise ValueError(f"needs {works}" + "; write it without commas" * ("," in text))
    return Decimal(match[1].replace("_", "")) * _UNITS[match[2]]


# ---------------------------------------------------------------- choices and text


def near(word: str, choices: Iterable[str]) -> str | None:
    """The closest of `choices` to a misspelt word, or None."""
    by_lower = {each.lower(): each for each in choices}
    close = difflib.get_close_matches(word[:80].lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def target_names() -> list[str]:
    """The device profiles that the package carries: export/targets/*.yaml."""
    return sorted(path.stem for path in (data_folder("export") / "targets").glob("*.yaml"))


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
    seen = set()
    for value in values:
        if same(value) in seen:
            raise ValueError(f"'{value}' is listed twice; name each once")
        seen.add(same(value))
    return values


def accepts(words: str) -> WithJsonSchema:
    """What docs/recipe.md says of a type whose JSON schema says too little."""
    return WithJsonSchema({"accepts": words})


def _text(value: str) -> str:
    # Names and paths: an invisible character in one of them costs an hour.
    if not value or value != value.strip() or not value.isprintable():
        raise ValueError("needs text without spaces at its ends, line breaks and invisible characters")
    return value


def _matching(pattern: str, words: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"needs {words}")
        return value

    return AfterValidator(check)


def _arm_name(value: str) -> str:
    if value.casefold() in RESERVED_NAMES or re.search(r"-seed\d+$", value):
        raise ValueError("this name means something else in a run folder or a report; choose another")
    return value


def _task(value: str) -> str:
    # A misspelt task of ours would be looked for in lm-evaluation-harness, after training.
    names = (*HELDOUT_TASKS, ANSWERS_TASK, *TASK_SETS)
    is_ours = value.startswith("heldout") or difflib.get_close_matches(value, names, n=1, cutoff=0.8)
    return choice(value, names, "or any lm-evaluation-harness task") if is_ours else value


def _layers(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return choice(value, LAYER_NAMES, "or a list of layers counted from 0")
    layers = unique(tuple(map(read_whole, value))) if isinstance(value, list | tuple) else ()
    if not layers or not 0 <= min(layers) <= max(layers) < 10_000:
        raise ValueError(f"needs {', '.join(LAYER_NAMES)}, or a list of layers counted from 0")
    return layers


def _modules(value: object) -> str | tuple[str, ...]:
    if value == "auto":
        return "auto"
    if not isinstance(value, list | tuple) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError("needs auto, or a list of module names")
    return unique(tuple(map(_text, value)))


def _count_or(word: str, least: int) -> list[object]:
    """The metadata of a type that takes a word or a whole number."""
    words = f"{word}, or a whole number of at least {least}"

    def check(value: object) -> int | str:
        if value == word:
            return word
        number = read_whole(value)
        if not least <= number <= 10**9:
            raise ValueError(f"needs {words}")
        return number

    return [BeforeValidator(check), accepts(words)]


# ---------------------------------------------------------------- types

WHOLE, NUMBER = BeforeValidator(read_whole), BeforeValidator(read_number)  # listed last: they run first
Unique = AfterValidator(unique)

Flag = Annotated[bool, Strict()]
Size = Annotated[ByteSize, Gt(0), Lt(10**15), accepts("a size such as 100MB or 95MiB")]
Count = Annotated[int, Ge(1), Le(10**9), WHOLE]
Tokens = Annotated[int, Ge(1), Le(10**14), WHOLE]
Length = Annotated[int, Ge(1), Le(2**20), WHOLE]
Threads = Annotated[int, Ge(1), Le(1024), WHOLE]
Seed = Annotated[int, Ge(0), Le(2**31), WHOLE]
Positive = Annotated[float, Gt(0), Le(1e9), NUMBER]
NotNegative = Annotated[float, Ge(0), Le(1e9), NUMBER]
Share = Annotated[float, Ge(0), Le(1), NUMBER]
ShareBelow1 = Annotated[float, Ge(0), Lt(1), NUMBER]
Between0And1 = Annotated[float, Gt(0), Lt(1), NUMBER]
Betas = Annotated[tuple[ShareBelow1, ShareBelow1], accepts("a list of two numbers >= 0 and < 1")]

Text = Annotated[str, AfterValidator(_text)]
FolderName = Annotated[
    str,
    _matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "1 to 100 letters, digits, '.', '_' or '-': it names a folder"
    ),
]
ArmName = Annotated[
    str,
    _matching(r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}", "1 to 60 letters, digits, '_' or '-': it names a folder"),
    AfterValidator(_arm_name),
]
Sha256 = Annotated[str, _matching("[0-9a-fA-F]{64}", "64 hexadecimal digits"), AfterValidator(str.lower)]
Task = Annotated[Text, AfterValidator(_task)]
TargetName = Annotated[Text, AfterValidator(lambda value: choice(value, target_names()))]
Precision = Literal["fp32", "int8", "int4"]
Variant = Literal["angular", "cosine", "l2_repel", "decorrelation", "orthogonalization", "spectral_entropy"]
Layers = Annotated[
    str | tuple[int, ...],
    BeforeValidator(_layers),
    accepts(f"{', '.join(LAYER_NAMES)}, or a list of layers counted from 0"),
]
Modules = Annotated[
    str | tuple[str, ...], BeforeValidator(_modules), accepts("auto, or a list of module names")
]
Sample = Annotated[int | Literal["all"], *_count_or("all", 2)]
Forgetting = Annotated[int | Literal["auto"], *_count_or("auto", 1)]
