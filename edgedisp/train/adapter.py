"""Low-rank adapters (LoRA, Hu et al. 2021) through peft: which linear maps get one, and what is refused.

A map W [out, in] becomes W + (alpha / rank) B A with A [rank, in] random and B [out, rank] zero, and only A
and B are trained. `targets: auto` gives one to every linear map of attention and MLP in the transformer
layers. peft goes by the end of a module's name; where that would also catch a map outside the layers, whole
names are handed over instead.

A bundle has no room for an adapter, so it is merged before export (merge.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BadInput
from edgedisp.train.noise import quiet_peft

LINEAR = nn.Linear | Conv1D  # GPT-2's linear maps are Conv1D; bitsandbytes' layers derive from nn.Linear


@dataclass(frozen=True)
class AdapterSettings:
    """Fields as in a recipe's `train.adapter`; what holds a qlora adapter's base is `load_quantized`'s."""

    kind: str
    rank: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    targets: str | Sequence[str] = "auto"


def linear_maps(layers: nn.ModuleList) -> dict[str, nn.Module]:
    """Name within `layers` -> module, for every linear map of attention and MLP; the head is elsewhere."""
    return {name: module for name, module in layers.named_modules() if isinstance(module, LINEAR)}


def linear_names(layers: nn.ModuleList) -> list[str]:
    """Last name parts of the linear maps inside the transformer layers, as peft takes them: q_proj, ...

    Raises BadInput if there is none, or if weights in three dimensions (the experts of a mixture) hold a
    part of the layers that these maps leave out.
    """
    maps = linear_maps(layers)
    if not maps:
        raise BadInput(
            "train.adapter: no linear map was found in the transformer layers, so LoRA has nothing to adapt; "
            "leave the adapter out to train all weights"
        )
    stacked = [name for name, weight in layers.named_parameters() if weight.ndim > 2]
    if stacked:
        raise BadInput(
            f"train.adapter.targets: auto means every linear map of the layers, but {stacked[0]}"
            f"{f' and {len(stacked) - 1} more' if len(stacked) > 1 else ''} cannot carry an adapter; "
            f"name the targets yourself: {', '.join(_ends(maps))}"
        )
    return _ends(maps)


def _ends(names: Sequence[str] | dict[str, nn.Module]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def adapter_size(layers: nn.ModuleList, rank: int, targets: str | Sequence[str] = "auto") -> int:
    """Trainable parameters of a LoRA adapter over these linear maps of the layers: rank (in + out) each.

    Raises BadInput as `attach` does.
    """
    ends = _ends_wanted(layers, targets)
    maps: dict[str, Any] = linear_maps(layers)
    met = (module for name, module in maps.items() if any(_matches(name, end) for end in ends))
    return sum(rank * sum(module.weight.shape) for module in met)


def attach(model: nn.Module, layers: nn.ModuleList, settings: AdapterSettings, seed: int) -> nn.Module:
    """Wrap `model` with a fresh adapter whose random half depends on `seed` alone; all else is frozen.

    `layers` are the model's transformer layers. Raises BadInput if peft is missing, a named target matches
    nothing, or `auto` finds nothing to adapt.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise BadInput('train.adapter needs peft: pip install "edgedisp[train]"') from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=_targets(model, layers, settings.targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.modules()),
        task_type="CAUSAL_LM",
    )
    with quiet_peft(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _targets(model: nn.Module, layers: nn.ModuleList, wanted: str | Sequence[str]) -> list[str]:
    """What peft is told: ends of names, or whole names where an end also matches outside the layers."""
    ends = _ends_wanted(layers, wanted)
    maps = linear_maps(layers)
    meant = {id(module) for name, module in maps.items() if any(_matches(name, end) for end in ends)}
    matched = {
        name: module for name, module in model.named_modules() if any(_matches(name, end) for end in ends)
    }
    if {id(module) for module in matched.values()} == meant:
        return ends
    return [name for name, module in matched.items() if id(module) in meant]


def _ends_wanted(layers: nn.ModuleList, wanted: str | Sequence[str]) -> list[str]:
    """The ends of names that are meant. Raises BadInput if one of them ends no linear map's name."""
    if wanted == "auto":
        return linear_names(layers)
    ends = list(wanted)
    maps = linear_maps(layers)
    missing = [end for end in ends if not any(_matches(name, end) for name in maps)]
    if missing:
        raise BadInput(
            f"train.adapter.targets: {', '.join(missing)} is no linear map of this model, "
            f"which has {', '.join(_ends(maps))}; `auto` takes them all"
        )
    return ends


def _matches(name: str, end: str) -> bool:
    """peft's rule for a list of targets."""
    return name == end or name.endswith(f".{end}")
