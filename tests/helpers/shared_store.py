"""Folders that tests share: each is made once in a session, by whichever process of xdist needs it first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from filelock import FileLock


class SharedStore:
    """Named folders under `root`. Tests copy a folder before they change it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def of_session(cls, factory: pytest.TempPathFactory) -> SharedStore:
        base = factory.getbasetemp()
        is_worker = "PYTEST_XDIST_WORKER" in os.environ  # workers have one parent; a single process has none
        root = (base.parent if is_worker else base) / "shared"
        root.mkdir(exist_ok=True)
        return cls(root)

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name`; `make` fills an empty one, which appears whole or not at all."""
        path = self.root / name
        with FileLock(self.root / f"{name}.lock"):
            if not path.exists():
                partial = path.with_name(f"{name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.rename(path)
        return path


class TinyFolders(Mapping[str, Path]):
    """Architecture -> folder of a tiny random model with a tokenizer, made when it is asked for."""

    ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_neox")

    def __init__(self, store: SharedStore) -> None:
        self.store = store

    def __getitem__(self, architecture: str) -> Path:
        return self.store.folder(f"tiny-{architecture}", lambda path: _tiny_model(architecture, path))

    def __iter__(self) -> Iterator[str]:
        return iter(self.ARCHITECTURES)

    def __len__(self) -> int:
        return len(self.ARCHITECTURES)


def _tiny_model(architecture: str, folder: Path) -> None:
    from edgedisp import data, models

    texts = [document.text for document in data.synthetic_documents(120, seed=0)]
    models.save(*models.tiny_model(architecture, texts, seed=0, context=256), folder)
