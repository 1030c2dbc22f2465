"""The condensation profile of tiny transformers models, against their own hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from edgedisp.dispersion.condensation import (
    FIGURES,
    compare,
    measure_layer,
    measure_model,
    quick_condensation,
    torch_states,
)


def tiny(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def blocks(rows: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 100, (rows, 16), generator=torch.Generator().manual_seed(seed))


def hidden(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(ids, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_layers_are_embedding_blocks_and_final_norm(architecture: str, tiny_folder: dict[str, Path]) -> None:
    model, ids = tiny(tiny_folder[architecture]), blocks(1)
    listed = hidden(model, ids)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with torch_states(model) as states, torch.no_grad():
        found = states(ids[0])
    assert len(found) == len(listed) + 1 == 4
    for ours, theirs in zip([*found[:2], found[3]], listed):  # theirs is normed in the last place
        torch.testing.assert_close(ours, theirs[0])
    assert not torch.allclose(found[2], found[3])
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_model_wrapped_by_peft_is_measured_like_the_bare_one(tiny_folder: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    bare = measure_model(tiny(tiny_folder["llama"]), blocks(2))
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = measure_model(get_peft_model(tiny(tiny_folder["llama"]), config).eval(), blocks(2))
    assert wrapped["by_sequence"] == bare["by_sequence"]  # a fresh adapter adds nothing


def test_a_profile_is_the_mean_of_its_sequences(tiny_folder: dict[str, Path]) -> None:
    model, ids = tiny(tiny_folder["qwen3"]), blocks()
    told: list[tuple[int, int]] = []
    found = measure_model(model, ids, lambda done, total, note: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (found["sequences"], found["tokens"]) == (4, 64)
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    middle = [measure_layer(state) for state in hidden(model, ids)[1]]
    for figure in FIGURES:
        assert found["layers"][1][figure] == pytest.approx(np.mean([one[figure] for one in middle]), rel=1e-5)
        low, high = found["layers"][1]["intervals"][figure]
        assert low <= found["layers"][1][figure] <= high
        assert [row[1] for row in found["by_sequence"][figure]] == pytest.approx([o[figure] for o in middle])
    assert sum(found["layers"][1]["histogram"]) == 4 * 16 * 15 // 2


def test_the_trend_is_the_papers_over_the_hidden_states_as_transformers_lists_them(
    tiny_folder: dict[str, Path],
) -> None:
    model, ids = tiny(tiny_folder["gemma3_text"]), blocks()
    curve = []
    for state in hidden(model, ids):
        directions = torch.nn.functional.normalize(state, dim=-1)
        curve.append((directions @ directions.transpose(1, 2)).mean().item())  # diagonal and all, as there
    found = measure_model(model, ids)["correlations"]
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(curve, range(3)).statistic)
    assert found["kendall"]["value"] == pytest.approx(stats.kendalltau(curve, range(3)).statistic)
    assert found["kendall"]["low"] <= found["kendall"]["value"] <= found["kendall"]["high"]


def test_a_single_sequence_has_values_without_intervals(tiny_folder: dict[str, Path]) -> None:
    found = measure_model(tiny(tiny_folder["llama"]), blocks(1))
    assert all(row["intervals"] == {} for row in found["layers"])
    assert found["mean_cosine"]["low"] is None and found["correlations"]["kendall"]["high"] is None
    change = compare(found, found)
    assert change["mean_cosine"] == {"difference": 0, "low": None, "high": None}


def test_the_quick_look_has_the_cosines_of_the_full_profile(tiny_folder: dict[str, Path]) -> None:
    model, ids = tiny(tiny_folder["llama"]), blocks()
    rows = measure_model(model, ids)["layers"]
    quick = quick_condensation(model, ids)
    assert quick["cosine_by_layer"] == pytest.approx([row["cosine_raw"] for row in rows], abs=1e-6)
