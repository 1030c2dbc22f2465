"""Device profiles: export/targets/*.yaml, one file per kind of device, read as strictly as recipes.

A profile is data: how the weights of a bundle for the device are stored, how many threads it starts, how much
context it keeps, and which runtimes open it. Profiles are found by listing the folder, so a new device is a
new file and nothing else; a file of one's own works by its path. Figures in them carry their sources.

`edgedisp export` quantizes as the profile says. A build ships what it measured: there the recipe's `quantize`
says how, and the profile the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import Field, ValidationError

from edgedisp.core.errors import BadInput
from edgedisp.core.paths import data_folder
from edgedisp.recipe.clashes import Key
from edgedisp.recipe.kinds import (
    AccuracyLevel,
    Count,
    Flag,
    FolderName,
    Group,
    HeadBits,
    Precision,
    Text,
    Unique,
    Whole,
    target_names,
)
from edgedisp.recipe.problems import Problem, describe, near, summary
from edgedisp.recipe.section import Section
from edgedisp.recipe.written import Written, parse, read_text

Layout = Literal["onnxruntime-genai", "transformers.js", "optimum"]
SUFFIXES = (".yaml", ".yml")


class TargetQuantize(Section):
    """How the weights of the target's precision are stored."""

    group: Group = Field(default=32, description="weights that share one scale")
    symmetric: Flag = Field(default=False, description="false: each group has a zero point")
    accuracy_level: AccuracyLevel = Field(
        default=4, description="of MatMulNBits: 0 and 1 multiply in float32, 4 in int8"
    )
    head_bits: HeadBits = Field(default=8, description="bits of the output head and of a tied embedding")
    method: Literal["rtn", "k_quant"] = Field(
        default="rtn",
        description="rtn: round to nearest; k_quant: the scale of each group is searched; gptq needs the "
        "training text of a recipe",
    )


class Target(Section):
    """One kind of device."""

    name: FolderName = Field(description="the file's name without .yaml")
    description: Text = Field(description="which devices are meant")
    architecture: Literal["x86_64", "arm64", "wasm32"] = Field(description="of the device's processor")
    precision: Precision = Field(default="int4", description="of the weights")
    quantize: TargetQuantize = Field(
        default_factory=TargetQuantize, description="how int8 and int4 are stored"
    )
    threads: Count | None = Field(
        default=None, description="null: the physical cores of the machine that makes the bundle"
    )
    context: Annotated[Whole, Ge(64)] = Field(
        description="most positions kept in the cache; the model's own, if fewer", examples=["2048"]
    )
    logits: Literal["last", "all"] = Field(
        default="last",
        description="of the last token, which is all that generating needs; or of every token of a prompt",
    )
    layouts: Annotated[tuple[Layout, ...], Unique] = Field(
        default=("onnxruntime-genai",), min_length=1, description="the runtimes that open the bundle"
    )
    notes: tuple[Text, ...] = Field(default=(), description="why it is as it is")
    sources: tuple[Text, ...] = Field(default=(), description="where the figures in the notes come from")


def load_target(name: str, folder: Path | None = None) -> Target:
    """The profile `name`, or that of a file `x.yaml`.

    Raises BadInput for an unknown name, and for a file with every problem in it: place, key, what was found
    and what would work.
    """
    path = _path(name, folder)
    what = "a device profile"
    written = parse(read_text(path, what), str(path), what, "name, description, architecture and context")
    target, problems = _check(written)
    if target is not None and target.name != path.stem:
        place = written.place(("name",))
        words = f"found '{target.name}', but the file is called {path.name}; make them equal"
        problems.append(Problem(place, ("name",), words))
    if target is None or problems:
        raise BadInput(summary(written.name, problems))
    return target


def _path(name: str, folder: Path | None) -> Path:
    known = target_names(folder)
    if folder is None and name.endswith(SUFFIXES):
        return Path(name)
    if name not in known:
        guess = near(name, known)
        meant = f"did you mean '{guess}'? " if guess else ""
        raise BadInput(
            f"target '{name}': no such device profile; {meant}(choices: {', '.join(known)}, or your own "
            "file, such as box.yaml)"
        )
    return (folder or data_folder("export") / "targets") / f"{name}.yaml"


def _check(written: Written) -> tuple[Target | None, list[Problem]]:
    problems = list(written.problems)
    mute = [problem.key for problem in problems if problem.key]
    try:
        target = Target.model_validate(written.data)
    except ValidationError as found:
        for error in found.errors(include_url=False):
            key: Key = error["loc"]
            if error["type"] == "too_short" and error["input"]:
                continue  # a list with a faulty item counts as too short: noise beside the item's own error
            if not any(key[: len(told)] == told for told in mute):
                place = written.place(key)
                problems.append(Problem(place, key, describe(error, Target, written.data, place)))
        return None, problems
    problems += [Problem(written.place(key), key, words) for key, words in _clashes(target, written.data)]
    return target, problems


def _clashes(target: Target, data: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    """What two keys of a profile cannot be together."""
    if target.precision == "fp32" and data.get("quantize") is not None:
        yield ("quantize",), "found, but precision fp32 stores no weight on a grid; take it out"
    if target.precision == "int8" and target.quantize.head_bits < 8:
        yield (
            ("quantize", "head_bits"),
            f"found {target.quantize.head_bits}, but int8 weights need a head of 8 bits: it is the most "
            "sensitive matrix",
        )
    if target.notes and not target.sources:
        yield ("notes",), "found without sources; say where its figures come from (sources: a list of text)"
