"""edgedisp: mid-train a small language model under dispersion loss and ship it, measured, to a device.

docs/architecture.md shows the packages. Importing this one loads neither torch nor onnxruntime. The names
in PUBLIC, for training loops of your own, are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgedisp.dispersion.hooks import DispersionLoss as DispersionLoss
    from edgedisp.dispersion.losses import DispersionConfig as DispersionConfig
    from edgedisp.train.dispersion_trainer import DispersionMixin as DispersionMixin
    from edgedisp.train.dispersion_trainer import DispersionTrainer as DispersionTrainer

__version__ = "0.1.0"

PUBLIC = {
    "DispersionConfig": "edgedisp.dispersion.losses",
    "DispersionLoss": "edgedisp.dispersion.hooks",
    "DispersionMixin": "edgedisp.train.dispersion_trainer",
    "DispersionTrainer": "edgedisp.train.dispersion_trainer",
}
"""Public name -> the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name]), name)
