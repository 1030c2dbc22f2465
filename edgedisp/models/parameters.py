"""A model's parameters: how many each part has, and a folder's tensors read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edgedisp.models.checks import weight_files

# Parts of module names, as the families write them: self_attn, attn, attention, self_attention; mlp,
# feed_forward, and OPT's bare fc1 and fc2.
COMPONENTS = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "experts", "moe", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
}
NORM = ("norm", "ln_", "layernorm")


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """Parameter counts, shared ones once: embedding, attention, mlp, norm, head, other, total; and `tied`.

    Small models carry a large part of their weights in the embedding (SmolLM2-135M 21 %, Gemma-3-270M 63 %).
    tied: the head's matrix is the embedding's, so `head` counts a bias at most.
    """
    transformer: Any = model
    embedding, head = transformer.get_input_embeddings(), transformer.get_output_embeddings()
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
        for component, words in COMPONENTS.items():
            if any(word in part for word in words):
                return component
    return "other"


class Weights(Mapping[str, Tensor]):
    """Tensor name -> its values as float32, from a folder's safetensors files, sharded or not.

    Each tensor is read on access. A tied weight is there once, as it was saved. Raises BadInput for a folder
    without such files.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._open = safe_open
        self._path: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                self._path |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with self._open(self._path[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).float()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._path)

    def __len__(self) -> int:
        return len(self._path)
