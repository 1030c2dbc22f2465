"""edgedisp: mid-train a small language model under dispersion loss and ship it, measured, to a device.

The package is a house of rooms (docs/architecture.md). This file holds the few words that every room
may use: the two kinds of failure, the progress callback, and where the packaged data lies. Importing it
loads neither torch nor onnxruntime.

For those who train elsewhere, three names of the rooms below can be had from here, and are loaded when they
are asked for: `DispersionConfig`, `DispersionTrainer` and `DispersionMixin`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgedisp.dispersion.config import DispersionConfig as DispersionConfig
    from edgedisp.train.mixin import DispersionMixin as DispersionMixin
    from edgedisp.train.mixin import DispersionTrainer as DispersionTrainer

__version__ = "0.1.0"

PUBLIC = {
    "DispersionConfig": "edgedisp.dispersion.config",
    "DispersionMixin": "edgedisp.train.mixin",
    "DispersionTrainer": "edgedisp.train.mixin",
}
"""Names that can be imported from here although a room holds them; the rooms themselves do not do so."""

Progress = Callable[[int, int, str], None]
"""`progress(done, total, note)`: called by long work; `total` 0 means unknown. Must be cheap."""


class BadInput(ValueError):
    """The user's input cannot work: says what, where, and what would work. Exit code 2, nothing written."""


class BuildFailed(RuntimeError):
    """Valid input, but the work did not succeed: says which step and why. Exit code 1."""


def silent(done: int, total: int, note: str) -> None:
    """The progress callback that shows nothing."""


def data_folder(name: str) -> Path:
    """Folder of packaged data: `recipes` or `export`, from the wheel or from the top of a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "data" / name
    return packaged if packaged.is_dir() else here.parent / name


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)
