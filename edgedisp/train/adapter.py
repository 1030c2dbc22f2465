"""Low-rank adapters: LoRA and QLoRA through peft, and the merge back into plain weights.

A bundle has no room for an adapter, so it is merged before export: into the full-precision weights that
the base was quantized from, which is where the adapter's own rounding is smallest. The plain PEFT folder
is kept beside the merged model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edgedisp import BadInput
from edgedisp.train.trainer import quiet


@dataclass(frozen=True)
class AdapterSettings:
    """Fields as in a recipe's `train.adapter`; what holds a qlora adapter's base is `load_quantized`'s."""

    kind: str
    rank: int = 16
    alpha: int | None = None
    dropout: float = 0.0
    targets: str | Sequence[str] = "auto"


def linear_names(layers: nn.ModuleList) -> list[str]:
    """Last name parts of every linear map inside the transformer layers: attention and MLP, no head.

    Raises ValueError if the layers hold none.
    """
    kinds = nn.Linear | Conv1D  # GPT-2's linear maps are Conv1D; bitsandbytes' layers derive from nn.Linear
    names = {name.rsplit(".", 1)[-1] for name, module in layers.named_modules() if isinstance(module, kinds)}
    if not names:
        raise ValueError("no linear map was found in the transformer layers, so LoRA has nothing to adapt")
    return sorted(names)


def adapter_size(layers: nn.ModuleList, rank: int) -> int:
    """Trainable parameters of a LoRA adapter over every linear map of the layers: rank (in + out) each."""
    linear = [module for module in layers.modules() if isinstance(module, nn.Linear | Conv1D)]
    return sum(rank * sum(module.weight.shape) for module in linear)


def load_quantized(folder: Path, base: str) -> nn.Module:
    """The model of `folder` with its linear maps held by bitsandbytes as `nf4` or `int8` (QLoRA's base).

    Raises BadInput if bitsandbytes is missing.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise BadInput('a qlora adapter needs bitsandbytes: pip install "edgedisp[train]"') from error
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if base == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def attach(model: nn.Module, layers: nn.ModuleList, settings: AdapterSettings, seed: int) -> nn.Module:
    """Wrap `model` with a fresh adapter whose random half depends on `seed` alone.

    Raises BadInput if peft is missing or a named target matches nothing.
    """
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise BadInput('train.adapter needs peft: pip install "edgedisp[train]"') from error
    found = linear_names(layers)
    targets = found if settings.targets == "auto" else list(settings.targets)
    missing = [target for target in targets if target not in found]
    if missing:
        raise BadInput(
            f"train.adapter.targets: {', '.join(missing)} is no linear map of this model, "
            f"which has {', '.join(found)}; `auto` takes them all"
        )
    if settings.kind == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merge(adapter: Path, base: nn.Module) -> nn.Module:
    """`base` (full precision) with the PEFT folder `adapter` merged in: W + (alpha / rank) B A."""
    from peft import PeftModel

    merged: Any = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    return merged
