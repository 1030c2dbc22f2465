"""The explanations of a report, read from templates/texts.toml."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

TEXTS: dict[str, Any] = tomllib.loads(
    files("edgedisp.report").joinpath("templates/texts.toml").read_text(encoding="utf-8")
)
TERMS: dict[str, str] = TEXTS["terms"]
