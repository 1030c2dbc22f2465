"""QLoRA's base: the linear maps of a model held by bitsandbytes as nf4 or int8 (Dettmers et al. 2023).

    nf4    blocks of 64 values along the flattened weight: w = scale of the block * one of 16 levels
    int8   rows: w = scale of the row * q / 127

What such a base computes with is its dequantized weight. `dequantized` gives it, and `expand` puts it in the
place of the full-precision one, so that an adapter can be merged into the very weights it was trained over.
Embedding, norms and head are not quantized by bitsandbytes and stay in float32.

In eval mode an int8 layer rounds its input to 8 bits too (LLM.int8); in training on CPU it does not.

Left out: double quantization of the scales, which saves 0.4 bits a weight and changes nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BadInput
from edgedisp.train.noise import quiet_bitsandbytes
from edgedisp.train.trainer import quiet


def load_quantized(folder: Path, base: str) -> nn.Module:
    """The model of `folder`, the linear maps of its layers held by bitsandbytes as `nf4` or `int8`.

    Raises BadInput if bitsandbytes is missing.
    """
    bnb = _bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if base == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    with quiet():
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32
        )
    for module in opened.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On CPUs with AVX512-BF16 the first eval pass would repack the weights for a kernel without a
            # backward: every training step after it loses the gradient through this layer, without an error.
            module.support_avx512bf16_for_cpu = False
    return opened


def dequantized(model: nn.Module) -> dict[str, Tensor]:
    """Module name -> float32 weight [out, in] for each linear map that bitsandbytes holds in `model`."""
    bnb = _bitsandbytes()
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            found[name] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            # The first forward pass moves the scales from the weight to the layer's state.
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            found[name] = module.weight.data.float() * (scales.float() / 127).unsqueeze(1)
    return found


def expand(quantized: nn.Module, full: nn.Module) -> nn.Module:
    """Put the dequantized weights of `quantized` in the place of `full`'s, which is changed and returned.

    Raises ValueError if `full` is not the same model in full precision.
    """
    modules = dict(full.named_modules())
    with torch.no_grad():
        for name, weight in dequantized(quantized).items():
            module = modules.get(name)
            if not isinstance(module, nn.Linear | Conv1D):
                raise ValueError(f"{name} is quantized, but is no linear map of the full-precision model")
            stored = weight.T if isinstance(module, Conv1D) else weight  # Conv1D holds [in, out]
            if stored.shape != module.weight.shape:
                raise ValueError(
                    f"{name} is {list(stored.shape)} dequantized, {list(module.weight.shape)} in full"
                )
            module.weight.copy_(stored)
    return full


def _bitsandbytes() -> Any:
    try:
        with quiet_bitsandbytes():
            import bitsandbytes
    except ImportError as error:
        raise BadInput('a qlora adapter needs bitsandbytes: pip install "edgedisp[train]"') from error
    return bitsandbytes
