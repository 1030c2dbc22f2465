"""Checkpoints that are whole or unused.

The Trainer writes a checkpoint as a folder of several files; the marker comes last, with the sizes of all of
them. A checkpoint without one, or with a file of another size, is never resumed from. The one before it is
removed only when the marker is there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgedisp.core.files import write_json

MARKER = "edgedisp.json"
PREFIX = "checkpoint-"  # the Trainer's own name for checkpoint folders


def mark_whole(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write the marker, with `state` (JSON-able) and the sizes of all files."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MARKER]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_json(checkpoint / MARKER, {**state, "sizes": sizes})


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint under `output_dir` with a marker and every file as long as the marker says."""
    return next((path for path in reversed(_checkpoints(output_dir)) if read_marker(path)), None)


def keep_only(output_dir: Path, checkpoint: Path | None) -> None:
    """Remove every other checkpoint, whole or not."""
    for path in _checkpoints(output_dir):
        if path != checkpoint:
            shutil.rmtree(path)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Folders named like a checkpoint, oldest first."""
    steps = {path: path.name.removeprefix(PREFIX) for path in output_dir.glob(f"{PREFIX}*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda p: int(steps[p]))


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """The marker of a whole checkpoint, else empty."""
    try:
        marker: dict[str, Any] = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        sizes = marker["sizes"].items()
        return marker if all((checkpoint / name).stat().st_size == size for name, size in sizes) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # absent or damaged
