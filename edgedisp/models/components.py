"""Where a model's parameters are: embedding, attention, mlp, norm, head.

Small models carry a large part of their weights in the embedding (SmolLM2-135M 21 %, Gemma-3-270M 63 %),
which quantizers treat apart, so a size alone says little. Parameters are sorted by the module that owns them,
not by a table of architectures, so a new family needs no entry; what fits nowhere is counted as `other`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Parts of module names, as the families write them: self_attn, attn, attention, self_attention; mlp,
# feed_forward, and OPT's bare fc1 and fc2.
ATTENTION = ("attn", "attention")
MLP = ("mlp", "feed_forward", "ffn", "experts", "moe", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")
NORM = ("norm", "ln_", "layernorm")


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """Parameter counts, shared ones once: embedding, attention, mlp, norm, head, other, total; and `tied`.

    tied: the head's matrix is the embedding's, so `head` counts a bias at most. The counts add up to `total`.
    """
    anything: Any = model
    embedding, head = anything.get_input_embeddings(), anything.get_output_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norm", "head", "other"), 0)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():  # yields a shared parameter once
        owner = name.rpartition(".")[0]
        is_head = head is not None and modules[owner] is head and not (tied and parameter is head.weight)
        counts["head" if is_head else _component(owner, modules[owner])] += parameter.numel()
    return {**counts, "total": sum(counts.values()), "tied": tied}


def _component(name: str, module: nn.Module) -> str:
    last = name.rpartition(".")[2].lower()
    if "norm" in type(module).__name__.lower() or any(word in last for word in NORM):
        return "norm"
    if "embedding" in type(module).__name__.lower():
        return "embedding"
    path = name.lower().split(".")
    for part in reversed(path):  # the innermost name decides: `attention.mlp` would be an mlp
        if any(word in part for word in ATTENTION):
            return "attention"
        if any(word in part for word in MLP):
            return "mlp"
    return "other"
