"""How condensed a model's token vectors are, layer by layer.

Embedding condensation (arXiv 2602.00217): in deep layers the token vectors of a sequence crowd into a
narrow cone, so their pairwise cosines rise. One number hides two confounders, so three are given:

- raw: all tokens, as in the paper;
- sink-excluded: without the attention sinks, which point their own way: the first token, and any whose norm
  is more than 10 times the median (in Llama-like models also end-of-text tokens; up to 100 times);
- mean-removed: sink-excluded and centred on the sequence's mean vector. If this is low while raw is high,
  the cone is a common offset and not a loss of variety.

The effective rank (Roy & Vetterli 2007: exp of the entropy of the normalised singular values) says over
how many directions the tokens spread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.dispersion.collect import decoder_layers, hidden_states
from edgedisp.dispersion.loss import cosine_matrix

BINS = 40
"""Histogram bins over cosine -1 .. 1."""

SINK_NORM = 10.0
"""A token whose norm is more than so many times the sequence's median counts as an attention sink."""


def pair_cosines(vectors: Tensor) -> Tensor:
    """Cosines of the unordered pairs: `(tokens, features)` -> `(tokens * (tokens - 1) / 2,)`."""
    cosine = cosine_matrix(vectors)
    above = torch.ones_like(cosine, dtype=torch.bool).triu(diagonal=1)
    return cosine[above]


def effective_rank(vectors: Tensor) -> float:
    """exp(entropy of the normalised singular values) of `(tokens, features)`, between 1 and min(shape)."""
    singular = torch.linalg.svdvals(vectors.double())
    share = singular / singular.sum().clamp_min(1e-300)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def measure_layer(vectors: Tensor) -> dict[str, Any]:
    """The figures of one sequence at one layer: `(tokens, features)`, tokens >= 4, no padding.

    `sinks` counts the tokens left out of the sink-excluded figures, the first one included.
    """
    vectors = vectors.float()
    norms = vectors.norm(dim=-1)
    sink = norms > SINK_NORM * norms.median()
    sink[0] = True
    rest = vectors[~sink]
    raw = pair_cosines(vectors)
    return {
        "cosine_raw": float(raw.mean()),
        "cosine_sink_excluded": float(pair_cosines(rest).mean()),
        "cosine_mean_removed": float(pair_cosines(rest - rest.mean(dim=0)).mean()),
        "effective_rank": effective_rank(rest),
        "sinks": int(sink.sum()),
        "histogram": torch.histc(raw.clamp(-1, 1), bins=BINS, min=-1, max=1).long().tolist(),
    }


@torch.inference_mode()
def condensation(
    model: nn.Module,
    blocks: Tensor,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> dict[str, Any]:
    """Condensation of a causal language model over token blocks.

    Args:
        model: in evaluation mode.
        blocks: `(sequences, tokens)` int64, full blocks without padding, tokens >= 4.
    Returns:
        `{"layers": [{"layer": 0, ...}], "sequences": n, "tokens": n}`: layer 0 is the embedding output, layer
        i the output of the i-th block (before the final norm), each the mean over sequences of
        `measure_layer`, histograms summed.
    """
    depth = len(decoder_layers(model))
    device = next(model.parameters()).device
    measured: list[list[dict[str, Any]]] = [[] for _ in range(depth + 1)]
    with hidden_states(model, range(-1, depth)) as seen:
        for done, block in enumerate(blocks, start=1):
            model(input_ids=block[None].to(device), use_cache=False)
            for index in range(-1, depth):
                measured[index + 1].append(measure_layer(seen[index][0]))
            seen.clear()
            progress(done, len(blocks), "")
    layers = [{"layer": layer, **_mean(rows)} for layer, rows in enumerate(measured)]
    return {"layers": layers, "sequences": len(blocks), "tokens": int(blocks.numel())}


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    figures = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "histogram"}
    return {**figures, "histogram": [sum(column) for column in zip(*(row["histogram"] for row in rows))]}
