"""Device profiles: export/targets/*.yaml, one file per kind of device, read strictly.

A profile is data: which runtime and precision a bundle for the device has, how it is quantized, how many
threads it starts, how much context it keeps. Profiles are found by listing the folder, so a new device is a
new file and nothing else.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgedisp import BadInput, data_folder


class Strict(BaseModel):
    """Unknown keys and wrong types are refused; what was read does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TargetQuantize(Strict):
    """How the weights of the target's precision are stored."""

    group: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share one scale."""
    symmetric: bool = False
    """False: each group has a zero point."""
    accuracy_level: Literal[0, 1, 4] = 4
    """Of MatMulNBits: 0 and 1 multiply in float32, 4 in int8."""
    head_bits: Literal[4, 8] = 8
    """Bits of the output head."""


class Target(Strict):
    """One kind of device."""

    name: str
    description: str
    runtime: Literal["onnxruntime-genai"]
    architecture: Literal["x86_64", "arm64"]
    precision: Literal["fp32", "int8", "int4"] = "int4"
    quantize: TargetQuantize = TargetQuantize()
    threads: int | None = Field(default=None, ge=1)
    """None: the physical cores that the process may use."""
    context: int = Field(ge=1)
    """Most positions kept in the cache; a model's own context caps it further."""
    notes: list[str] = []
    sources: list[str] = []


def names(folder: Path | None = None) -> list[str]:
    """Names of all profiles, sorted."""
    return sorted(path.stem for path in (folder or _folder()).glob("*.yaml"))


def load_target(name: str, folder: Path | None = None) -> Target:
    """The profile `name`. Raises BadInput for an unknown name and for a file that says something unknown."""
    known = names(folder)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise BadInput(
            f"target {name!r}: no such device profile.{meant} Known are: {', '.join(known) or 'none'}"
        )
    path = (folder or _folder()) / f"{name}.yaml"
    try:
        target = Target.model_validate(_read(path))
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, e['loc'])) or 'top'}: {e['msg']}" for e in error.errors()]
        raise BadInput("\n".join(lines)) from error
    if target.name != name:
        raise BadInput(
            f"{path}: name: is {target.name!r}, but the file is called {name}.yaml; make them equal"
        )
    return target


def _folder() -> Path:
    return data_folder("export") / "targets"


def _read(path: Path) -> Any:
    """The file as plain Python values."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise BadInput(f"{path}: not readable as YAML: {error}") from error
