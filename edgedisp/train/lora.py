"""LoRA (Hu et al. 2021) and QLoRA (Dettmers et al. 2023) through peft: attach, save as a PEFT folder, merge.

A linear map W [out, in] becomes W + (alpha / rank) B A with A [rank, in] random and B [out, rank] zero; only
A and B are trained. QLoRA's base has the linear maps of its layers stored by bitsandbytes: nf4 (blocks of 64
values, w = scale * one of 16 levels) or int8 (rows, w = scale * q / 127). It computes with the dequantized
weights, so an adapter can be merged into the very weights it was trained over. Embedding, norms and head stay
float32. In eval mode an int8 layer also rounds its input to 8 bits (LLM.int8).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from edgedisp import __version__
from edgedisp.core.errors import BadInput
from edgedisp.models import quiet
from edgedisp.recipe import Adapter
from edgedisp.train.quantized_weights import LINEAR

MARK = "edgedisp.json"
CONFIG = "adapter_config.json"
_CARD = """\
---
library_name: peft
pipeline_tag: text-generation
{base_model}tags: [lora, edgedisp]
---

# LoRA adapter for {name}

Trained by edgedisp over {stored}. SHA-256 of the base's weights: `{sha256}`.

```python
base = transformers.AutoModelForCausalLM.from_pretrained({name!r}, {options})
model = peft.PeftModel.from_pretrained(base, "this folder")
```
"""
_BNB = "quantization_config=transformers.BitsAndBytesConfig"
_LOAD_OPTIONS = {
    None: 'dtype="float32"',
    "nf4": f'{_BNB}(load_in_4bit=True, bnb_4bit_quant_type="nf4")',
    "int8": f"{_BNB}(load_in_8bit=True)",
}


def target_modules(layers: nn.ModuleList, targets: str | Sequence[str] = "auto") -> list[Any]:
    """The linear maps of the layers that get an adapter: those named, whole or by the end of their names.

    `auto`: every linear map of attention and MLP. Raises BadInput if a target is no linear map of the layers.
    Under `auto`, raises it if there is none, or if weights in three dimensions (the experts of a mixture)
    would be left out.
    """
    maps = {name: module for name, module in layers.named_modules() if isinstance(module, LINEAR)}
    last_parts = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in maps}))
    if targets != "auto":
        matching = {
            target: [maps[name] for name in maps if f".{name}".endswith(f".{target}")] for target in targets
        }
        if missing := [target for target, modules in matching.items() if not modules]:
            raise BadInput(
                f"train.adapter.targets: {', '.join(missing)} is no linear map of this model, "
                f"which has {last_parts}; `auto` takes them all"
            )
        return list({id(module): module for modules in matching.values() for module in modules}.values())
    if not maps:
        raise BadInput(
            "train.adapter: no linear map was found in the transformer layers, so LoRA has nothing to adapt; "
            "leave the adapter out to train all weights"
        )
    if stacked := [name for name, weight in layers.named_parameters() if weight.ndim > 2]:
        raise BadInput(
            f"train.adapter.targets: auto means every linear map of the layers, but {stacked[0]}"
            f"{f' and {len(stacked) - 1} more' if len(stacked) > 1 else ''} cannot carry an adapter; "
            f"name the targets yourself: {last_parts}"
        )
    return list(maps.values())


def adapter_size(layers: nn.ModuleList, rank: int, targets: str | Sequence[str] = "auto") -> int:
    """Trainable parameters of a LoRA adapter over these linear maps of the layers: rank (in + out) each."""
    return sum(rank * sum(module.weight.shape) for module in target_modules(layers, targets))


def attach(model: nn.Module, layers: nn.ModuleList, adapter: Adapter, seed: int) -> nn.Module:
    """Wrap `model` with a fresh adapter over its transformer `layers`; all else is frozen. The random half
    depends on `seed` alone. Raises BadInput if peft is missing, and as `target_modules` does."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise BadInput('train.adapter needs peft: pip install "edgedisp[train]"') from error
    targets = set(map(id, target_modules(layers, adapter.targets)))
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha or 2 * adapter.rank,
        lora_dropout=adapter.dropout,
        # Whole names, which peft shortens to ends of names where they match nothing else.
        target_modules=[name for name, module in model.named_modules() if id(module) in targets],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in layers.modules()),
        task_type="CAUSAL_LM",
    )
    with _quiet_peft(), torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def load_quantized(folder: Path, base: str) -> nn.Module:
    """The model of `folder` with the linear maps of its layers stored by bitsandbytes as `nf4` or `int8`.
    Raises BadInput if bitsandbytes is missing."""
    bnb = _bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**nf4 if base == "nf4" else {"load_in_8bit": True})
    load = AutoModelForCausalLM.from_pretrained
    with quiet():
        model: nn.Module = load(folder, quantization_config=config, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # On CPUs with AVX512-BF16 the first eval pass would repack the weights for a kernel without a
            # backward: every training step after it loses the gradient through this layer, without an error.
            module.support_avx512bf16_for_cpu = False
    return model


def dequantized(module: Any) -> Tensor | None:
    """float32 [out, in] of a linear map that bitsandbytes stores, else None."""
    bnb = _bitsandbytes()
    if isinstance(module, bnb.nn.Linear4bit):
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        return cast(Tensor, weight.float())
    if isinstance(module, bnb.nn.Linear8bitLt):
        # The first forward pass moves the scales from the weight to the layer's state.
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        return cast(Tensor, module.weight.data.float() * (scales.float() / 127).unsqueeze(1))
    return None


@torch.no_grad()
def expand(quantized: nn.Module, full: nn.Module) -> None:
    """Replace the weights of `full` by the dequantized ones of `quantized`, the same model."""
    modules = dict(full.named_modules())
    for name, stored in quantized.named_modules():
        if (weight := dequantized(stored)) is not None:
            module: Any = modules[name]
            module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)  # Conv1D stores [in, out]


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise BadInput('a qlora adapter needs bitsandbytes: pip install "edgedisp[train]"') from error
    return bitsandbytes


@dataclass(frozen=True)
class Base:
    """What an adapter was trained over: `name`, a hub id or a folder; `sha256`, the `fingerprint` of its
    weights in full precision; `quantization`, `nf4` or `int8` for QLoRA."""

    name: str
    sha256: str
    quantization: str | None = None
    revision: str | None = None


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and float32 values of a model's parameters, in the order of names."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def save_adapter(model: nn.Module, base: Base, folder: Path) -> None:
    """Write the adapter of `model` (wrapped by `attach`) as a PEFT folder that names its base."""
    wrapped: Any = model
    config = wrapped.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.name, base.revision
    # Left to itself, peft asks a hub whether the vocabulary grew.
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    # peft has the targets as a set: without an order, equal trainings would leave unequal files.
    stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if isinstance(stored["target_modules"], list):
        stored["target_modules"].sort()
    mark = {**asdict(base), "edgedisp": __version__}
    (folder / CONFIG).write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
    card = _CARD.format(
        base_model="" if Path(base.name).is_absolute() else f"base_model: {json.dumps(base.name)}\n",
        stored=f"the base stored as {base.quantization}" if base.quantization else "the full-precision base",
        options=_LOAD_OPTIONS[base.quantization],
        **asdict(base),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def load_adapter(adapter: Path, base: nn.Module) -> nn.Module:
    """`base` with the PEFT folder `adapter` on, in eval mode."""
    from peft import PeftModel

    with quiet(), _quiet_peft(), torch.random.fork_rng():
        return PeftModel.from_pretrained(base, adapter).eval()


def merge(adapter: Path, base: nn.Module, *, quantized: nn.Module | None = None) -> nn.Module:
    """`base` (full precision, changed) with the PEFT folder `adapter` merged into it: W + (alpha / rank) B A.

    With `quantized` (the same base from `load_quantized`), each W that it stores is its dequantized one.
    Raises BadInput if the adapter was trained on other weights: peft merges into any model whose shapes fit.
    """
    trained_on = json.loads((adapter / MARK).read_text(encoding="utf-8"))
    if trained_on["sha256"] != (actual := fingerprint(base)):
        raise BadInput(
            f"{adapter}: this adapter was trained on another base: on {trained_on['name']}, whose weights "
            f"have the fingerprint {trained_on['sha256'][:12]}; these have {actual[:12]}. Give the base that "
            "it was trained on, or train the adapter again"
        )
    if quantized is not None:
        expand(quantized, base)
    wrapped: Any = load_adapter(adapter, base)
    merged: nn.Module = wrapped.merge_and_unload()
    return merged


@torch.inference_mode()
def block_losses(model: nn.Module, blocks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cross-entropy of each block of int64 [blocks, tokens], summed over its tokens - 1 predictions, in nats:
    float64 [blocks]. The model is left in eval mode."""
    device = next(model.eval().parameters()).device
    losses = np.zeros(len(blocks))
    for index, block in enumerate(blocks):
        ids = torch.from_numpy(block).to(device)
        logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False).logits
        losses[index] = functional.cross_entropy(logits[0, :-1].float(), ids[1:], reduction="sum").item()
    return losses


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without peft's warnings of a renamed property, and of GPT-2's Conv1D layers, which it handles."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out|`is_gradient_checkpointing` is deprecated")
        yield
