"""A trained adapter as a plain PEFT folder that knows its base, and the way back into plain weights.

    adapter_config.json, adapter_model.safetensors    what peft reads and writes
    edgedisp.json                                     the base: name, fingerprint, and how it was held
    README.md                                         the same for people, and how to open the folder

peft merges an adapter into any model whose shapes fit, and leaves out modules without weights with a warning.
An adapter on a base that it was not trained on gives a model that talks, only worse, so `merge` compares the
base's fingerprint and every name and shape first.

The merged weight is W + (alpha / rank) B A (Hu et al. 2021, equation 3), W in float32: the full-precision
one, or for QLoRA the dequantized one that the adapter was trained over.

Refused, as that sum would not be what the adapter computes: the kinds of LoRA that do more (DoRA and others),
and an adapter on a weight that two modules share, such as a head tied to the embedding.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from edgedisp import __version__
from edgedisp.core.errors import BadInput
from edgedisp.train.noise import quiet_peft
from edgedisp.train.quantized import expand
from edgedisp.train.trainer import quiet

MARK = "edgedisp.json"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_ENTRY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
# Fields of a LoRA configuration that, if set, make it more than a plain sum or change more than linear maps.
_NOT_PLAIN = (
    "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "lora_bias", "layer_replication", "megatron_config", "modules_to_save",
    "target_parameters", "trainable_token_indices",
)  # fmt: skip
_CARD = """\
---
library_name: peft
pipeline_tag: text-generation
{base_model}tags:
- lora
- edgedisp
---

# LoRA adapter for {name}

Trained by edgedisp over {held}. Fingerprint of the base's weights (SHA-256): `{sha256}`.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM{imported}

base = AutoModelForCausalLM.from_pretrained({name!r}, {held_by})
model = PeftModel.from_pretrained(base, "this folder")
```
"""


_HELD_BY = {
    None: 'dtype="float32"',
    "nf4": 'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")',
    "int8": "quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_names(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return is_list or value is None or isinstance(value, str)


# What the fields that decide a merge have to be; peft looks at none of them before it computes with them.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number of at least 1", lambda value: type(value) is int and value >= 1),
    "lora_alpha": ("a number", _is_number),
    "lora_dropout": ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    "target_modules": ("a list of names, or a pattern", _is_names),
    "exclude_modules": ("a list of names, or a pattern", _is_names),
    "use_rslora": ("true or false", lambda value: value in (None, True, False)),
    "rank_pattern": ("numbers by name", _is_numbers),
    "alpha_pattern": ("numbers by name", _is_numbers),
}
# Of a configuration that its weights do not fit, or whose other fields are damaged.
_PEFT_RAISES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, re.error)


@dataclass(frozen=True)
class Base:
    """What an adapter was trained over.

    `name`: a hub id or a folder, what transformers opens. `sha256`: `fingerprint` of its weights in full
    precision. `held_as`: `nf4` or `int8` for QLoRA, None for LoRA.
    """

    name: str
    sha256: str
    held_as: str | None = None
    revision: str | None = None


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and float32 values of a model's parameters, in the order of names.

    The same weights give the same fingerprint however they are stored: in one file or several, in bfloat16
    or expanded to float32. About a second for 500 million bytes.
    """
    found = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        found.update(f"{name} {list(weight.shape)}\n".encode())
        found.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return found.hexdigest()


def save(model: nn.Module, base: Base, folder: Path) -> None:
    """Write the adapter of `model` (as `adapter.attach` wrapped it) into `folder`."""
    wrapped: Any = model
    config = wrapped.peft_config["default"]
    config.base_model_name_or_path, config.revision = base.name, base.revision
    # Left to itself, peft asks a hub whether the vocabulary grew.
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    _sort_targets(folder / CONFIG)
    (folder / MARK).write_text(
        json.dumps({**asdict(base), "edgedisp": __version__}, indent=1) + "\n", encoding="utf-8"
    )
    is_hub_id = not Path(base.name).is_absolute()
    card = _CARD.format(
        base_model=f"base_model: {json.dumps(base.name)}\n" if is_hub_id else "",
        name=base.name,
        held="the full-precision base" if base.held_as is None else f"the base held as {base.held_as}",
        sha256=base.sha256,
        held_by=_HELD_BY[base.held_as],
        imported=", BitsAndBytesConfig" if base.held_as else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _sort_targets(path: Path) -> None:
    """peft keeps them as a set: without an order, equal trainings would leave unequal files."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def merge(adapter: Path, base: nn.Module, *, quantized: nn.Module | None = None) -> nn.Module:
    """`base` (full precision, changed) with the PEFT folder `adapter` merged into it: W + (alpha / rank) B A.

    With `quantized` (the same base from `load_quantized`), each W that it holds is its dequantized one.
    Raises BadInput if `adapter` is no plain LoRA folder, was trained on another base or does not fit it.
    """
    check(adapter, base)
    if quantized is not None:
        expand(quantized, base)
    try:
        wrapped: Any = opened(adapter, base)
    except _PEFT_RAISES as problem:
        raise BadInput(f"{adapter}: {CONFIG} and {WEIGHTS} do not fit: {_one_line(problem)}") from problem
    _check_complete(adapter, wrapped)
    return wrapped.merge_and_unload()


def opened(adapter: Path, base: nn.Module) -> nn.Module:
    """`base` with the adapter on, in eval mode. Nothing is checked: a quantized base has no fingerprint."""
    from peft import PeftModel

    with quiet(), quiet_peft(), torch.random.fork_rng():
        return PeftModel.from_pretrained(base, adapter).eval()


def check(adapter: Path, base: nn.Module) -> None:
    """Raise BadInput unless `adapter` is a plain LoRA folder, trained on `base`'s weights, that fits them.

    A folder without our mark (trained elsewhere) is checked by names and shapes alone.
    """
    _check_config(adapter)
    mark = adapter / MARK
    if mark.is_file():
        trained_on = _read_json(mark)
        found = fingerprint(base)
        if trained_on.get("sha256") != found:
            raise BadInput(
                f"{adapter}: this adapter was trained on another base: on {trained_on.get('name')}, whose "
                f"weights have the fingerprint {str(trained_on.get('sha256'))[:12]}; "
                f"these have {found[:12]}. Give the base that it was trained on, or train the adapter again"
            )
    _check_shapes(adapter, base)


def _check_config(adapter: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            pickle = (adapter / "adapter_model.bin").is_file()
            why = " (adapter_model.bin is a pickle, which can run any code and is never opened)"
            raise BadInput(f"{adapter}: not a PEFT folder, there is no {name}{why if pickle else ''}")
    config = _read_json(adapter / CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise BadInput(f"{adapter}: an adapter of the kind {kind}; only LORA can be merged here")
    for name in _NOT_PLAIN:
        if config.get(name) not in (None, False, []):
            raise BadInput(
                f"{adapter / CONFIG}: {name} is {_short(config[name])}; only plain LoRA, without it, can be "
                "merged here"
            )
    for name, (wanted, is_right) in _FIELDS.items():
        if name in config and not is_right(config[name]):
            raise BadInput(f"{adapter / CONFIG}: {name} is {_short(config[name])}, but has to be {wanted}")


def _check_shapes(adapter: Path, base: nn.Module) -> None:
    """Every matrix of the file belongs to a linear map of the base with its width, and none is missing."""
    halves = _halves(adapter)
    modules = dict(base.named_modules())
    unknown = sorted({module for module, _ in halves if module not in modules})
    if unknown:
        raise BadInput(
            f"{adapter}: {len(unknown)} adapted modules are not in this base: {_some(unknown)}. "
            "The adapter belongs to another architecture or a deeper model"
        )
    alone = sorted(module for module, half in halves if (module, "AB".replace(half, "")) not in halves)
    if alone:
        raise BadInput(f"{adapter}: {len(alone)} adapted modules have half of their weights: {_some(alone)}")
    others = [
        f"{module}.lora_{half} is {shape}, the base's width is {wanted}"
        for (module, half), shape in sorted(halves.items())
        if shape[1 if half == "A" else 0] != (wanted := _width(modules[module], half))
    ]
    if others:
        raise BadInput(f"{adapter}: {len(others)} weights do not fit this base: {_some(others)}")
    _check_untied(adapter, base, {module for module, _ in halves})


def _check_untied(adapter: Path, base: nn.Module, adapted: set[str]) -> None:
    """Merged into a weight that two modules share, an adapter on one of them would change the other too."""
    owners = defaultdict(list)
    for name, weight in base.named_parameters(remove_duplicate=False):
        owners[id(weight)].append(name.rpartition(".")[0])
    for sharing in owners.values():
        if len(sharing) > 1 and (named := sorted(adapted & set(sharing))):
            raise BadInput(
                f"{adapter}: {named[0]} is adapted, but in this base {' and '.join(sharing)} are one weight "
                "(tied), so it cannot be merged into one of them alone; train the adapter without it"
            )


def _check_complete(adapter: Path, wrapped: nn.Module) -> None:
    """The configuration names the very modules that the file has weights for.

    peft leaves a module that the file says nothing of as it was, and drops weights that it finds no place
    for, both with a warning.
    """
    known = {module for module, _ in _halves(adapter)}
    made = {
        name.removeprefix("base_model.model.")
        for name, module in wrapped.named_modules()
        if hasattr(module, "lora_A")
    }
    if made - known:
        raise BadInput(
            f"{adapter}: {CONFIG} names {len(made)} modules, {WEIGHTS} holds nothing for "
            f"{len(made - known)} of them: {_some(sorted(made - known))}"
        )
    if known - made:
        raise BadInput(
            f"{adapter}: {WEIGHTS} holds weights for {len(known)} modules, {CONFIG} leaves out "
            f"{len(known - made)} of them: {_some(sorted(known - made))}"
        )


def _halves(adapter: Path) -> dict[tuple[str, str], list[int]]:
    """(module, A or B) -> shape, from the header of the file."""
    try:
        with safe_open(adapter / WEIGHTS, "pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise BadInput(f"{adapter / WEIGHTS}: cannot be opened: {problem}") from problem
    entries = {name: _ENTRY.fullmatch(name) for name in shapes}
    others = sorted(name for name, entry in entries.items() if entry is None)
    if others or not shapes:
        raise BadInput(f"{adapter / WEIGHTS}: holds other weights than LoRA's: {_some(others) or 'nothing'}")
    return {(entry["module"], entry["half"]): shapes[name] for name, entry in entries.items() if entry}


def _width(module: nn.Module, half: str) -> int | None:
    """The side of a linear map that the half must have: A [rank, in], B [out, rank]."""
    if not isinstance(module, nn.Linear | Conv1D):
        return None
    out, inside = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
    return int(inside if half == "A" else out)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300]


def _short(value: Any) -> str:
    return json.dumps(value)[:60]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise BadInput(f"{path}: is damaged: {problem}") from problem
    if not isinstance(found, dict):
        raise BadInput(f"{path}: is damaged: no mapping")
    return found
