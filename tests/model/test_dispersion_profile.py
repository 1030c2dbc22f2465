"""The condensation profile of tiny transformers models, against their own hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from training import open_tiny

from edgedisp.core.files import from_json, to_json
from edgedisp.dispersion.condensation import (
    FIGURES,
    Profile,
    measure_layer,
    measure_model,
    quick_condensation,
    summary,
)


def blocks(rows: int = 4) -> torch.Tensor:
    return torch.randint(5, 100, (rows, 16), generator=torch.Generator().manual_seed(0))


def hidden_states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(ids, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_neox", "phi"])
def test_a_profile_is_of_transformers_hidden_states(architecture: str, tiny_folder: dict[str, Path]) -> None:
    model, ids = open_tiny(tiny_folder[architecture]).eval(), blocks()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    calls: list[tuple[int, int]] = []
    measured = measure_model(model, ids, lambda done, total, note: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    for layer, states in enumerate(hidden_states(model, ids)):
        rows = [measure_layer(state) for state in states]
        for figure in FIGURES:
            expected = [row[figure] for row in rows]
            assert measured.values(figure)[:, layer].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(measured.figures["kurtosis"][0]) == 3 and measured.tokens == 64
    assert [sum(counts) for counts in measured.histograms] == [4 * 16 * 15 // 2] * 3
    assert from_json(Profile, to_json(measured)) == measured
    quick = quick_condensation(model, ids)
    assert quick == pytest.approx(measured.values("cosine_raw").mean(dim=0).tolist(), abs=1e-6)


def test_a_summary_has_the_mean_of_the_sequences_and_the_trend_of_the_paper(
    tiny_folder: dict[str, Path],
) -> None:
    model, ids = open_tiny(tiny_folder["gemma3_text"]).eval(), blocks()
    measured = measure_model(model, ids)
    result = summary(measured)
    assert (result.sequences, result.tokens, result.change) == (4, 64, None)
    assert [row.layer for row in result.layers] == [0, 1, 2]
    for layer, row in enumerate(result.layers):
        for name, estimate in row.figures.items():
            value, low, high = estimate.value or 0, estimate.low or 0, estimate.high or 0
            assert value == pytest.approx(measured.values(name)[:, layer].mean()) and low <= value <= high
        assert list(row.histogram) == measured.histograms[layer]
    assert result.mean_cosine.value == pytest.approx(measured.values("cosine_raw")[:, 1:].mean())
    curve = []
    for state in hidden_states(model, ids):  # the hidden states as transformers lists them
        directions = torch.nn.functional.normalize(state, dim=-1)
        curve.append((directions @ directions.mT).mean().item())  # diagonal and all, as in the paper's code
    expected = {
        "spearman": stats.spearmanr(curve, range(3)).statistic,
        "kendall": stats.kendalltau(curve, range(3)).statistic,
    }
    assert {name: value.value for name, value in result.correlations.items()} == pytest.approx(expected)
