"""Device profiles: export/targets/*.yaml, one file per kind of device, read as strictly as recipes.

A profile says how the weights of a bundle are stored, its threads, context and runtimes. Your own file works
by its path. `edgedisp export` quantizes as it says; a build ships what it measured, so there the recipe's
`quantize` says how.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le, MinLen

from edgedisp.core.errors import BadInput
from edgedisp.core.files import data_folder
from edgedisp.recipe import values
from edgedisp.recipe.load import read_yaml
from edgedisp.recipe.schema import Grid
from edgedisp.recipe.values import WHOLE, Section, Text, Unique, choice, target_names

Layout = Literal["onnxruntime-genai", "transformers.js", "optimum", "gguf"]


class TargetQuantize(Grid):
    """How the weights of the target's precision are stored."""

    method: Literal["rtn", "k_quant"] = "rtn"
    """rtn: round to nearest; k_quant: the scale of each group is searched; gptq needs the training text of a
    recipe"""


class Target(Section):
    """One kind of device."""

    name: values.FolderName
    """the file's name without .yaml"""
    description: Text
    """which devices are meant"""
    architecture: Literal["x86_64", "arm64", "wasm32"]
    """of the device's processor"""
    precision: values.Precision = "int4"
    """of the weights"""
    quantize: TargetQuantize = TargetQuantize()
    """how int8 and int4 are stored"""
    threads: values.Threads | None = None
    """null: the physical cores of the machine that makes the bundle"""
    context: Annotated[int, Ge(64), Le(2**20), WHOLE]
    """most positions in the cache; the model's own, if fewer"""
    logits: Literal["last", "all"] = "last"
    """of the last token, which is all that generating needs; or of every token of a prompt"""
    layouts: Annotated[tuple[Layout, ...], Unique, MinLen(1)] = ("onnxruntime-genai",)
    """the runtimes that open the bundle"""
    notes: tuple[Text, ...] = ()
    """why it is as it is"""
    sources: tuple[Text, ...] = ()
    """where the figures in the notes come from"""


def load_target(name: str) -> Target:
    """The profile `name`, or that of a file `x.yaml`. Raises BadInput with every problem, one a line."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        try:
            choice(name, target_names(), "or your own file, such as box.yaml")
        except ValueError as problem:
            raise BadInput(f"target '{name}': no such device profile; {problem}") from None
        path = data_folder("export") / "targets" / f"{name}.yaml"
    document = read_yaml(path, "a device profile", "name, description, architecture and context")
    return document.validate(Target)
