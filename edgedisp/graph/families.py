"""Reads a torch model into a `Decoder`, whatever its family.

A family differs from the next in few things: names, norms, biases, activation, positions, window, scaling.
The readers (`llama.py`, `gpt.py`) alone know those differences; `decoder.py` sees a `Decoder` and writes
nodes. The model is opened by transformers, so old checkpoint names, shards, tied weights and half precision
are handled where they are known best. Rotary tables come from the model's own rotary module, so that every
`rope_type` is right.

Left out: mixtures of experts, encoder-decoders, ALiBi and vision towers. A folder of such a family goes to
`builder.py` or is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgedisp.core.errors import BadInput
from edgedisp.graph import gpt, llama
from edgedisp.graph.description import Decoder

DEFAULT_CONTEXT = 8192
"""Positions that a bundle is made for unless asked otherwise: rotary tables and KV buffers grow with it."""

READERS: dict[str, Callable[[Any, int], Decoder]] = {
    "llama": llama.llama_like,
    "mistral": llama.llama_like,
    "qwen2": llama.llama_like,
    "qwen3": llama.llama_like,
    "gemma3_text": llama.gemma3,
    "gpt2": gpt.gpt2,
    "opt": gpt.opt,
    "gpt_neox": gpt.gpt_neox,
}


def family_of(folder: Path) -> str:
    """The `model_type` of a model folder. BadInput if it is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder}: not a model folder (config.json is missing)")
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("model_type", "unknown"))
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path}: no readable configuration: {error}") from error


def load(folder: Path) -> Any:
    """Open the model folder with transformers, in fp32 and eval mode. BadInput for an incomplete one."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: transformers cannot open this model: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    model, loaded = opened
    if loaded["missing_keys"]:  # transformers makes them up at random and goes on
        missing = ", ".join(sorted(loaded["missing_keys"])[:5])
        raise BadInput(f"{folder}: {len(loaded['missing_keys'])} weights are missing: {missing}")
    return model.eval()


def check_finite(model: Any, name: str) -> None:
    """BadInput names the first weight with NaN or infinity: no graph is worth writing from it."""
    for key, weight in model.named_parameters():
        # A sum is not finite if a value is not, and needs no array of flags; but it may also overflow.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise BadInput(
                f"{name}: {key} holds {bad} values that are not finite (NaN or infinity) of "
                f"{weight.numel()}; the model is damaged, or its training diverged"
            )


def describe(model: Any, max_context: int | None = None) -> Decoder:
    """The model of a family in READERS. BadInput for a form of the family that is not written here."""
    decoder = READERS[model.config.model_type](model, _context(model.config, max_context))
    if decoder.ropes and decoder.head_dim % 16:
        raise BadInput(
            f"heads of {decoder.head_dim} dimensions with rotary positions: "
            "onnxruntime's fused attention takes multiples of 16 alone"
        )
    return decoder


def _context(config: Any, asked: int | None) -> int:
    """Positions of the bundle: the model's own, at most `asked` or 8192; see the loop for two rope types."""
    own = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    for table in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        # These two change their frequencies with the sequence length: one table is right only below that.
        if table.get("rope_type") in ("dynamic", "longrope"):
            own = min(own, int(table.get("original_max_position_embeddings") or own))
    return min(own, asked or DEFAULT_CONTEXT)
