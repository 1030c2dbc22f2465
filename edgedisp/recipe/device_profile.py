"""Device profiles: export/targets/*.yaml, one file per kind of device, read as strictly as recipes.

A profile says how the weights of a bundle for the device are stored, how many threads it starts, how much
context it keeps, and which runtimes open it. A new device is a new file; your own file works by its path.
`edgedisp export` quantizes as the profile says. A build ships what it measured: there the recipe's `quantize`
says how, and the profile the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le, MinLen

from edgedisp.core.errors import BadInput
from edgedisp.core.files import data_folder
from edgedisp.recipe.load import read_yaml
from edgedisp.recipe.rules import Problem
from edgedisp.recipe.values import (
    WHOLE,
    AccuracyLevel,
    Flag,
    FolderName,
    Group,
    HeadBits,
    Precision,
    Section,
    Text,
    Unique,
    choice,
    target_names,
)

Layout = Literal["onnxruntime-genai", "transformers.js", "optimum"]


class TargetQuantize(Section):
    """How the weights of the target's precision are stored."""

    group: Group = 32
    """weights that share one scale"""
    symmetric: Flag = False
    """false: each group has a zero point"""
    accuracy_level: AccuracyLevel = 4
    """of MatMulNBits: 0 and 1 multiply in float32, 4 in int8"""
    head_bits: HeadBits = 8
    """bits of the output head and of a tied embedding"""
    method: Literal["rtn", "k_quant"] = "rtn"
    """rtn: round to nearest; k_quant: the scale of each group is searched; gptq needs the training text of a
    recipe"""


class Target(Section):
    """One kind of device."""

    name: FolderName
    """the file's name without .yaml"""
    description: Text
    """which devices are meant"""
    architecture: Literal["x86_64", "arm64", "wasm32"]
    """of the device's processor"""
    precision: Precision = "int4"
    """of the weights"""
    quantize: TargetQuantize = TargetQuantize()
    """how int8 and int4 are stored"""
    threads: Annotated[int, Ge(1), Le(1024), WHOLE] | None = None
    """null: the physical cores of the machine that makes the bundle"""
    context: Annotated[int, Ge(64), Le(2**20), WHOLE]
    """most positions kept in the cache; the model's own, if fewer"""
    logits: Literal["last", "all"] = "last"
    """of the last token, which is all that generating needs; or of every token of a prompt"""
    layouts: Annotated[tuple[Layout, ...], Unique, MinLen(1)] = ("onnxruntime-genai",)
    """the runtimes that open the bundle"""
    notes: tuple[Text, ...] = ()
    """why it is as it is"""
    sources: tuple[Text, ...] = ()
    """where the figures in the notes come from"""


def load_target(name: str, folder: Path | None = None) -> Target:
    """The profile `name`, or that of a file `x.yaml`. Raises BadInput with every problem, one a line."""
    if folder is None and name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        try:
            choice(name, target_names(folder), "or your own file, such as box.yaml")
        except ValueError as problem:
            raise BadInput(f"target '{name}': no such device profile; {problem}") from None
        path = (folder or data_folder("export") / "targets") / f"{name}.yaml"
    document = read_yaml(path, "a device profile", "name, description, architecture and context")
    target = document.validate(Target)
    problems = list(_problems(target, path.stem, document.data.get("quantize") is not None))
    return document.validate(Target, problems)


def _problems(target: Target, stem: str, has_quantize: bool) -> Iterator[Problem]:
    """What two keys of a profile, or a key and the file's name, cannot be together."""
    if target.name != stem:
        yield ("name",), f"'{target.name}', but the file is called {stem}; make them equal"
    if target.precision == "fp32" and has_quantize:
        yield ("quantize",), "precision fp32 stores no weight on a grid; take it out"
    if target.precision == "int8" and target.quantize.head_bits < 8:
        yield (
            ("quantize", "head_bits"),
            "int8 weights need a head of 8 bits: it is the most sensitive matrix",
        )
    if target.notes and not target.sources:
        yield ("notes",), "notes without sources; say where the figures come from (sources: a list of text)"
