"""Parts of torch models as `description.py` writes them down: what every family's reader needs."""

from __future__ import annotations

from typing import Any

import torch

from edgedisp.core.errors import BadInput
from edgedisp.graph.description import Linear, Norm, Rope

# transformers' activation name -> what the graph computes. All three tanh forms are the same function.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def activation(name: str) -> str:
    """What `decoder.py` calls transformers' activation `name`. BadInput for one that it does not write."""
    if name not in ACTIVATIONS:
        raise BadInput(
            f"activation {name!r} has no counterpart in the graph; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def rotary(module: Any, context: int, names: list[str] | None = None) -> dict[str, Rope]:
    """The tables of the model's own rotary module, one for each kind of layer where `names` lists kinds."""
    like, positions = torch.zeros(1, dtype=torch.float32), torch.arange(context)[None]
    ropes = {}
    for name in names or ["rope"]:
        with torch.no_grad():
            cos, sin = module(like, positions, name) if names else module(like, positions)
        half = cos.shape[-1] // 2  # both halves of a row are the same angles
        ropes[name] = (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
    return ropes


def linear(name: str, *modules: Any) -> Linear:
    """Torch's linear maps, stored as one. BadInput if only some of them have a bias."""
    biases = tuple(module.bias for module in modules if module.bias is not None)
    if biases and len(biases) != len(modules):
        raise BadInput(f"{name}: some of its parts have a bias and some have none; that form is not written")
    return Linear(name, tuple(module.weight for module in modules), biases)


def rms(name: str, module: Any, offset: float = 0.0) -> Norm:
    """RMSNorm; `offset` is what the family adds to the stored weight (Gemma: 1)."""
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    return Norm(name, module.weight + offset if offset else module.weight, float(epsilon))


def layer_norm(name: str, module: Any) -> Norm:
    """LayerNorm; one without parameters multiplies by 1 and adds 0."""
    width = module.normalized_shape
    weight = torch.ones(width) if module.weight is None else module.weight
    bias = torch.zeros(width) if module.bias is None else module.bias
    return Norm(name, weight, float(module.eps), bias)


def head(model: Any, embedding: torch.Tensor) -> torch.Tensor | None:
    """The head's matrix [vocab, hidden]; None where it is the embedding's."""
    weight: torch.Tensor = model.lm_head.weight
    return None if weight is embedding or weight.data_ptr() == embedding.data_ptr() else weight
