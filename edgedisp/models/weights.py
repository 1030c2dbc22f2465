"""The tensors of a Hugging Face folder by name, read one at a time: nothing else of the file is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from edgedisp.core.errors import BadInput


class Weights(Mapping[str, Tensor]):
    """Tensor name -> its values as float32, from the folder's safetensors files, sharded or not.

    A tied weight is there once, as it was saved. BadInput for a folder without such files.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        index = folder / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        self._open = safe_open
        self._file: dict[str, Path] = {}
        for name in sorted(names):
            if not (folder / name).is_file():
                raise BadInput(f"{folder}: there is no {name}")
            with safe_open(folder / name, framework="pt") as file:
                self._file |= dict.fromkeys(file.keys(), folder / name)

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._file[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name).float()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)
