"""Who is told of the log as training goes on: TensorBoard and the like, through transformers' own callbacks.

Nothing is reported to anyone unless it is named. Of those who can be named, TensorBoard writes files and the
others may talk to a server; what they need (addresses, keys) is theirs to find in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from edgedisp.core.errors import BadInput


@dataclass(frozen=True)
class Reporting:
    """Who else is told of the log: names that transformers knows (`tensorboard`, `wandb`, ...), and as what.

    TensorBoard's files go to `folder`; the others keep to their own settings and environment variables.
    """

    to: tuple[str, ...]
    folder: Path
    name: str


def check_reporters(names: Sequence[str]) -> None:
    """Raise BadInput if a program that the log should go to is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise BadInput(
            f"train.report_to: {', '.join(missing)} is not installed; pip install {' '.join(missing)}, "
            "or take it out"
        )


@contextmanager
def reported_in(reporting: Reporting | None) -> Iterator[None]:
    """TensorBoard is told its folder by a variable of the environment alone; one that is set already wins."""
    name = "TENSORBOARD_LOGGING_DIR"
    if reporting is None or name in os.environ:
        yield
        return
    os.environ[name] = str(reporting.folder)
    try:
        yield
    finally:
        del os.environ[name]
