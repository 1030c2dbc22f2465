"""LoRA (Hu et al. 2021) and QLoRA (Dettmers et al. 2023) through peft: attach, save as a PEFT folder, merge.

A linear map W [out, in] becomes W + (alpha / rank) B A; only A and B are trained. QLoRA's base has the linear
maps of its layers stored by bitsandbytes, as nf4 or int8, and computes with the dequantized weights, so an
adapter can be merged into the very weights it was trained over. Embedding, norms and head stay float32. In
eval mode an int8 layer also rounds its input to 8 bits (LLM.int8).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.core.hub import quiet
from edgedisp.recipe import Adapter
from edgedisp.train.quantized_weights import LINEAR


def attach(model: Any, adapter: Adapter, seed: int) -> Any:
    """Wrap `model` with a fresh adapter; all else is frozen. The random half depends on `seed` alone.
    `auto` targets every linear map but the head. Raises BadInput for a target that is no linear map."""
    _check_installed("peft")
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    maps = [name for name, part in model.named_modules() if isinstance(part, LINEAR) and part is not head]
    targets = () if adapter.targets == "auto" else adapter.targets
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in maps)]
    if missing or not maps:
        names = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in maps})) or "none"
        raise BadInput(
            f"train.adapter.targets: {', '.join(missing) or 'auto'} is no linear map of this model, "
            f"which has {names}; `auto` takes them all"
        )
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(targets) or "all-linear",
        task_type="CAUSAL_LM",
    )
    with _quiet_peft(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def load_quantized(folder: Path, quantization: str) -> Any:
    """The model of `folder`, its layers' linear maps stored by bitsandbytes as `nf4` or `int8`."""
    _check_installed("bitsandbytes")
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**nf4 if quantization == "nf4" else {"load_in_8bit": True})
    load: Any = AutoModelForCausalLM.from_pretrained
    with quiet():
        model = load(folder, quantization_config=config, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On CPUs with AVX512-BF16 the first eval pass would repack the weights for a kernel without a
            # backward: every training step after it loses the gradient through this layer, without an error.
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def load_dequantized(folder: Path, quantization: str) -> Any:
    """The model of `folder` in float32, with the values that `load_quantized` computes with."""
    model = models.load(folder)
    with quiet():
        stored = load_quantized(folder, quantization).dequantize(torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, LINEAR):
            weight = stored.get_submodule(name).weight
            module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)  # stored as nn.Linear
    return model


def save_adapter(wrapped: Any, base: str, revision: str | None, folder: Path) -> None:
    """Write the adapter of a model from `attach` as a PEFT folder that names its base, a hub id or a path."""
    config = wrapped.peft_config["default"]
    config.base_model_name_or_path, config.revision = base, revision
    config.target_modules = sorted(config.target_modules)  # a set: equal trainings would leave unequal files
    # Left to itself, peft asks a hub whether the vocabulary grew.
    wrapped.save_pretrained(folder, save_embedding_layers=False)


def load_adapter(adapter: Path, base: nn.Module) -> Any:
    """`base` with the PEFT folder `adapter` on, in eval mode."""
    from peft import PeftModel

    with quiet(), _quiet_peft(), torch.random.fork_rng():
        return PeftModel.from_pretrained(base, adapter).eval()


def merge(adapter: Path, base: nn.Module) -> Any:
    """`base` (float32, changed) with the PEFT folder `adapter` merged into it: W + (alpha / rank) B A."""
    return load_adapter(adapter, base).merge_and_unload()


def _check_installed(package: str) -> None:
    if find_spec(package) is None:
        raise BadInput(f'train.adapter needs {package}: pip install "edgedisp[train]"')


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without peft's warnings of a renamed property, and of GPT-2's Conv1D layers, which it handles."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out|`is_gradient_checkpointing` is deprecated")
        yield
