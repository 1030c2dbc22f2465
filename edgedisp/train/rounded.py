"""The weights of a model that a bundle quantizes, and their rounding: what training, audit and checks share.

They are the linear maps of the layers, the embedding and the head, a tied one once. Norms, biases and learned
positions stay as they are. The rounding is handed in, since the grid is not this room's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp.train.adapter import LINEAR

Rounding = Callable[[str, Tensor], Tensor]
"""(name of the parameter in the plain model, its values fp32 [out, in]) -> new values, rounded along `in`."""


@dataclass(frozen=True)
class Weight:
    """A parameter that is rounded. `adapter`: peft's layer around it, whose update is part of the weight."""

    name: str
    parameter: Tensor
    turned: bool  # stored [in, out], as Conv1D does
    rounding: Rounding
    is_end: bool = False  # the embedding or the head
    adapter: Any = None

    def values(self) -> Tensor:
        """fp32 [out, in], without an adapter's update."""
        own = self.parameter.detach()
        return (own.T if self.turned else own).float()

    def rounded(self, strength: float = 1.0) -> Tensor:
        """What the parameter's data become, `strength` of the way to the grid; always new memory."""
        own = self.parameter.data
        update = None
        if self.adapter is not None:
            update = sum(self.adapter.get_delta_weight(name) for name in self.adapter.active_adapters)
        whole = own if update is None else own + update
        new = self.rounding(self.name, (whole.T if self.turned else whole).float())
        new = (new.T if self.turned else new).to(own.dtype)
        if strength < 1:
            new = torch.lerp(whole, new, strength)
        return (new if update is None else new - update).contiguous()


def weights_of(model: nn.Module, body: Rounding, ends: Rounding) -> Iterator[Weight]:
    """The weights of `model`, bare or wrapped by peft or data parallelism, each tensor once.

    `ends` rounds the embedding and the head, `body` every other linear map.
    """
    whole: Any = getattr(model, "module", model)
    outer = {id(whole.get_input_embeddings().weight), id(whole.get_output_embeddings().weight)}
    adapters = {
        id(module.base_layer): module for module in whole.modules() if hasattr(module, "get_delta_weight")
    }
    seen: set[int] = set()
    for name, module in whole.named_modules():
        weight = getattr(module, "weight", None)
        is_end = id(weight) in outer
        if weight is None or id(weight) in seen or not (is_end or isinstance(module, LINEAR)):
            continue
        if ".lora_" in name:
            continue
        seen.add(id(weight))
        plain = name.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"
        turned = isinstance(module, Conv1D)
        yield Weight(plain, weight, turned, ends if is_end else body, is_end, adapters.get(id(module)))


def check_replaceable(weight: Weight) -> None:
    """ValueError for a weight that cannot be replaced by its rounded self while it trains."""
    parameter, name = weight.parameter, weight.name
    if type(parameter.data) is not Tensor:
        raise ValueError(f"{name} is divided among processes (FSDP); rounding in training needs it whole")
    if parameter.dtype != torch.float32:
        raise ValueError(f"{name} is stored as {parameter.dtype}; rounding in training needs float32")
    dropouts = [] if weight.adapter is None else weight.adapter.lora_dropout.values()
    if any(getattr(dropout, "p", 0) for dropout in dropouts):
        raise ValueError("the adapter has dropout, so no step computes with the merged weight")


@torch.no_grad()
def round_weights(model: nn.Module, body: Rounding, ends: Rounding) -> list[str]:
    """Round the weights of `model` in place, for good. Returns their names."""
    weights = list(weights_of(model, body, ends))
    for weight in weights:
        weight.parameter.copy_(weight.rounded())
    return [weight.name for weight in weights]
