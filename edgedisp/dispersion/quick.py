"""Condensation in two figures, cheap enough to look at while a model trains.

The mean cosine of N unit vectors is (|sum|^2 - N) / (N (N - 1)), so no pair is ever formed: the cost is one
forward pass over a few short blocks. The full instrument (profile.py) has intervals, sinks and ranks.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.dispersion.collect import decoder_layers, hidden_states
from edgedisp.dispersion.geometry import mean_cosine


@torch.no_grad()
def quick_condensation(model: nn.Module, blocks: Tensor) -> dict[str, Any]:
    """How condensed a causal language model's token vectors are over `blocks`.

    Args:
        model: in evaluation mode, bare or wrapped by peft.
        blocks: `(sequences, tokens)` int64, full blocks without padding, tokens >= 3.
    Returns:
        `cosine_by_layer`: mean cosine of the token pairs of a sequence, averaged over sequences, sinks
        included; index 0 is the embedding output, i the output of the i-th block. `embedding_variance`: how
        far the last block's token vectors spread: the variance over the tokens of a sequence, averaged over
        features and sequences. The first token is left out of it, as the norm of an attention sink, up to
        100 times the others', would be all that it shows.
    """
    device = next(model.parameters()).device
    layers = range(-1, len(decoder_layers(model)))
    with hidden_states(model, layers) as seen:
        model(input_ids=blocks.to(device), use_cache=False, **_few_logits(model))
        cosines = [float(mean_cosine(seen[index].float()).mean()) for index in layers]
        last = seen[layers[-1]].float()
    return {
        "cosine_by_layer": cosines,
        "embedding_variance": float(last[:, 1:].var(dim=1, correction=0).mean()),
    }


def _few_logits(model: Any) -> dict[str, int]:
    """Where a model can be told to, it makes the logits of the last token alone."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
