"""The condensation profile of a model: every figure by layer, its trend with depth, and how sure they are.

Measured is whatever gives the hidden states of a sequence: a torch model (`condensation`), or anything else
that hands them over (`profile`), such as an exported graph. Layer 0 is the output of the embedding, layer i
that of the i-th block, before any final norm; what the final norm makes of the last one stands apart.

The trend is the paper's (arXiv 2602.00217, figure 2): the rank correlation of a layer's mean cosine, over all
sequences, with its depth. Its public code takes the hidden states as transformers lists them: the embedding
output counts, and the last entry is the last block AFTER the final norm. That is done here as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.dispersion.collect import decoder_layers, hidden_states
from edgedisp.dispersion.geometry import FIGURES, measure_layer
from edgedisp.dispersion.intervals import draws, interval, kendall, spearman

States = Callable[[Tensor], Sequence[Tensor]]
"""Token ids int64 `(tokens,)` -> depth + 2 tensors `(tokens, features)`: embedding, blocks, final norm."""

Statistic = Callable[[Tensor], Tensor]
"""Of curves `(..., layers)`, one number each."""

CORRELATIONS: dict[str, Statistic] = {"spearman": spearman, "kendall": kendall}


@contextmanager
def torch_states(model: nn.Module) -> Iterator[States]:
    """The hidden states of a causal language model of transformers, without the head and its logits."""
    depth = len(decoder_layers(model))
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]  # every causal language model has it
    device = next(model.parameters()).device
    with hidden_states(model, range(-1, depth)) as seen:

        def states(block: Tensor) -> list[Tensor]:
            last = decoder(input_ids=block[None].to(device), use_cache=False).last_hidden_state
            found = [seen[index][0] for index in range(-1, depth)]
            seen.clear()
            return [*found, last[0]]

        yield states


def condensation(
    model: nn.Module,
    blocks: Tensor,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> dict[str, Any]:
    """The profile of a causal language model in evaluation mode over token blocks; see `profile`."""
    with torch_states(model) as states:
        return profile(states, blocks, progress)


@torch.inference_mode()
def profile(
    states: States,
    blocks: Tensor,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> dict[str, Any]:
    """Measure every layer over every sequence.

    Args:
        states: gives the hidden states of one sequence.
        blocks: `(sequences, tokens)` int64, full blocks without padding, tokens >= 4.
    Returns a dict, fit for JSON:
        layers: for each a dict of `layer`, FIGURES (means over sequences), `histogram` (summed), and
            `intervals`: figure -> [low, high], 95 %; empty for a single sequence.
        final_norm: the same of the last layer after the final norm.
        mean_cosine: raw, mean over the blocks' outputs: {value, low, high}.
        correlations: {spearman, kendall}, each {value, low, high}.
        sequences, tokens: how many; by_sequence: figure -> [sequence][layer, the final norm last].
    """
    measured: list[list[dict[str, Any]]] = []
    for done, block in enumerate(blocks, start=1):
        measured.append([measure_layer(vectors) for vectors in states(block)])
        progress(done, len(blocks), "")
    by_sequence = {
        figure: [[layer[figure] for layer in sequence] for sequence in measured] for figure in FIGURES
    }
    rows = _rows(by_sequence, [[layer["histogram"] for layer in sequence] for sequence in measured])
    return {
        "layers": [{"layer": layer, **row} for layer, row in enumerate(rows[:-1])],
        "final_norm": rows[-1],
        **_over_layers(_of_one(_values(by_sequence, "cosine_raw"))),
        "sequences": len(blocks),
        "tokens": int(blocks.numel()),
        "by_sequence": by_sequence,
    }


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """second - first, two profiles over the same sequences, with paired intervals.

    Returns `layers` (each `layer` and figure -> {difference, low, high}; empty if the models differ in
    depth), `final_norm`, `mean_cosine`, `correlations`. The ends are None for a single sequence. Raises
    ValueError for profiles of different numbers of sequences or tokens: those were not the same text.
    """
    if any(first[size] != second[size] for size in ("sequences", "tokens")):
        raise ValueError("profiles of different numbers of sequences or tokens cannot be compared")
    pairs = {name: [_values(one["by_sequence"], name) for one in (first, second)] for name in FIGURES}
    same_depth = len(first["layers"]) == len(second["layers"])
    rows: list[dict[str, Any]] = [{} for _ in first["layers"]] if same_depth else []
    last: dict[str, Any] = {}
    for name, (before, after) in pairs.items():
        if not same_depth:
            before, after = before[:, -1:], after[:, -1:]
        for row, found in zip([*rows, last], _differences(after - before), strict=True):
            row[name] = found
    return {
        "layers": [{"layer": layer, **row} for layer, row in enumerate(rows)],
        "final_norm": last,
        **_over_layers(_of_two(*pairs["cosine_raw"])),
    }


def _values(by_sequence: dict[str, Any], figure: str) -> Tensor:
    """float64 `(sequences, layers + 1)`, the final norm last."""
    return torch.tensor(by_sequence[figure], dtype=torch.float64)


def _rows(by_sequence: dict[str, Any], histograms: list[list[list[int]]]) -> list[dict[str, Any]]:
    """A dict for each layer, the final norm last."""
    rows: list[dict[str, Any]] = [{"intervals": {}} for _ in histograms[0]]
    for figure in FIGURES:
        values = _values(by_sequence, figure)
        ends = _ends(values)
        for layer, row in enumerate(rows):
            row[figure] = float(values[:, layer].mean())
            if ends is not None:
                row["intervals"][figure] = [float(ends[0][layer]), float(ends[1][layer])]
    for row, counts in zip(rows, torch.tensor(histograms).sum(dim=0).tolist(), strict=True):
        row["histogram"] = counts
    return rows


def _itself(mean: Tensor) -> Tensor:
    return mean


def _ends(values: Tensor, statistic: Statistic = _itself) -> list[Tensor] | None:
    """Interval of `statistic(mean over sequences)` of `(sequences, ...)`; None for a single sequence."""
    if len(values) < 2:
        return None
    drawn = statistic(draws(len(values)) @ values)
    return list(interval(drawn, statistic(values.mean(dim=0)), len(values)))


def _differences(values: Tensor) -> list[dict[str, float | None]]:
    ends = _ends(values)
    return [
        _found("difference", values[:, layer].mean(), None if ends is None else [end[layer] for end in ends])
        for layer in range(values.shape[1])
    ]


def _found(name: str, value: Tensor, ends: list[Tensor] | None) -> dict[str, float | None]:
    low, high = (None, None) if ends is None else (float(end) for end in ends)
    return {name: float(value), "low": low, "high": high}


def _blocks_mean(curve: Tensor) -> Tensor:
    """Mean over the blocks' outputs of `(..., layers + 1)`: without embedding and final norm."""
    return curve[..., 1:-1].mean(dim=-1)


def _trend(correlation: Statistic) -> Statistic:
    """The correlation over layers as transformers lists them: the last block after the final norm only."""

    def statistic(curve: Tensor) -> Tensor:
        return correlation(torch.cat([curve[..., :-2], curve[..., -1:]], dim=-1))

    return statistic


def _over_layers(found: Callable[[Statistic], dict[str, float | None]]) -> dict[str, Any]:
    """`mean_cosine` and `correlations`, each as `found` makes it from a curve's statistic."""
    return {
        "mean_cosine": found(_blocks_mean),
        "correlations": {name: found(_trend(of)) for name, of in CORRELATIONS.items()},
    }


def _of_one(cosines: Tensor) -> Callable[[Statistic], dict[str, float | None]]:
    """{value, low, high} of a statistic of the mean curve of `(sequences, layers + 1)`."""

    def found(statistic: Statistic) -> dict[str, float | None]:
        return _found("value", statistic(cosines.mean(dim=0)), _ends(cosines, statistic))

    return found


def _of_two(before: Tensor, after: Tensor) -> Callable[[Statistic], dict[str, float | None]]:
    """{difference, low, high} of a statistic of two mean curves, after - before; their depths may differ."""
    depth, both = before.shape[1], torch.cat([before, after], dim=1)

    def found(statistic: Statistic) -> dict[str, float | None]:
        def change(curves: Tensor) -> Tensor:
            return statistic(curves[..., depth:]) - statistic(curves[..., :depth])

        return _found("difference", change(both.mean(dim=0)), _ends(both, change))

    return found
