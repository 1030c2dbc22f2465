"""The weights of a model that a bundle quantizes, and their rounding in place.

They are the linear maps of the layers, the embedding and the head, a tied one once. Norms, biases and learned
positions stay as they are. Callers bring the rounding, which is the code that makes the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = nn.Linear | Conv1D  # GPT-2's linear maps are Conv1D; bitsandbytes' layers derive from nn.Linear

Rounding = Callable[[str, Tensor], Tensor]
"""(name of the parameter in the plain model, its values fp32 [out, in]) -> new values, rounded along `in`."""


@dataclass(frozen=True)
class Weight:
    """A parameter that is rounded. `adapter`: peft's layer around it, whose update is part of the weight."""

    name: str
    parameter: Tensor
    transposed: bool  # stored [in, out], as Conv1D does
    rounding: Rounding
    adapter: Any = None

    def values(self) -> Tensor:
        """fp32 [out, in], without an adapter's update."""
        stored = self.parameter.detach()
        return (stored.T if self.transposed else stored).float()

    def rounded(self) -> Tensor:
        """What the parameter's data become: Q(W), in new memory. With an adapter Q(W + s B A) - s B A: it
        adds s B A itself, so the layer computes with Q of the merged weight."""
        whole, update = self.parameter.data, None
        if self.adapter is not None:
            update = sum(self.adapter.get_delta_weight(name) for name in self.adapter.active_adapters)
            whole = whole + update
        new = self.rounding(self.name, (whole.T if self.transposed else whole).float())
        new = new.T if self.transposed else new
        return (new if update is None else new - update).contiguous()


def weights_of(model: nn.Module, layers: Rounding, embedding_and_head: Rounding) -> Iterator[Weight]:
    """The weights of `model`, bare or wrapped by peft or data parallelism, each tensor once. `layers` rounds
    the linear maps of the layers, `embedding_and_head` those two."""
    whole: Any = getattr(model, "module", model)
    outer = {id(whole.get_input_embeddings().weight), id(whole.get_output_embeddings().weight)}
    adapters = {
        id(module.base_layer): module for module in whole.modules() if hasattr(module, "get_delta_weight")
    }
    seen: set[int] = set()
    for name, module in whole.named_modules():
        weight = getattr(module, "weight", None)
        is_outer = id(weight) in outer
        if weight is None or id(weight) in seen or not (is_outer or isinstance(module, LINEAR)):
            continue
        if ".lora_" in name:
            continue
        seen.add(id(weight))
        plain = name.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"
        rounding, adapter = embedding_and_head if is_outer else layers, adapters.get(id(module))
        yield Weight(plain, weight, isinstance(module, Conv1D), rounding, adapter)


@torch.no_grad()
def round_weights(model: nn.Module, layers: Rounding, embedding_and_head: Rounding) -> list[str]:
    """Round the weights of `model` in place, for good. Returns their names."""
    weights = list(weights_of(model, layers, embedding_and_head))
    for weight in weights:
        weight.parameter.copy_(weight.rounded())
    return [weight.name for weight in weights]
