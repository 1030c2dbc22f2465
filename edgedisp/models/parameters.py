"""A model's parameters: how many each part has, and a folder's tensors read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgedisp.core.errors import BadInput

# Parts of module names, as the families write them: self_attn, attn, attention, self_attention; mlp,
# feed_forward, and OPT's bare fc1 and fc2.
ATTENTION = ("attn", "attention")
MLP = ("mlp", "feed_forward", "ffn", "experts", "moe", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")
NORM = ("norm", "ln_", "layernorm")


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """Parameter counts, shared ones once: embedding, attention, mlp, norm, head, other, total; and `tied`.

    Small models carry a large part of their weights in the embedding (SmolLM2-135M 21 %, Gemma-3-270M 63 %).
    tied: the head's matrix is the embedding's, so `head` counts a bias at most. A parameter is sorted by the
    module that owns it, so a new family needs no entry; what fits nowhere is `other`.
    """
    anything: Any = model
    embedding, head = anything.get_input_embeddings(), anything.get_output_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norm", "head", "other"), 0)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():  # yields a shared parameter once
        owner = name.rpartition(".")[0]
        is_head = head is not None and modules[owner] is head and not (tied and parameter is head.weight)
        counts["head" if is_head else component_of(owner, modules[owner])] += parameter.numel()
    return {**counts, "total": sum(counts.values()), "tied": tied}


def component_of(name: str, module: nn.Module) -> str:
    """embedding, attention, mlp, norm or other, for the module `name`."""
    kind, last = type(module).__name__.lower(), name.rpartition(".")[2].lower()
    if "norm" in kind or any(word in last for word in NORM):
        return "norm"
    if "embedding" in kind:
        return "embedding"
    for part in reversed(name.lower().split(".")):  # the innermost name decides: `attention.mlp` is an mlp
        for component, words in (("attention", ATTENTION), ("mlp", MLP)):
            if any(word in part for word in words):
                return component
    return "other"


class Weights(Mapping[str, Tensor]):
    """Tensor name -> its values as float32, from a folder's safetensors files, sharded or not.

    Each tensor is read when it is asked for. A tied weight is there once, as it was saved. Raises BadInput
    for a folder without such files.
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
            tensor: Tensor = file.get_tensor(name).float()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __len__(self) -> int:
        return len(self._file)
