"""Where packaged data lies."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def data_folder(name: str) -> Path:
    """Folder of packaged data: `recipes` or `export`, from the wheel or from the top of a checkout."""
    packaged = PACKAGE / "packaged" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name
