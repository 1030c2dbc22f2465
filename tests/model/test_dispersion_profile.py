"""What many sequences and layers say together: means, intervals, the trend with depth, differences."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from edgedisp.dispersion.geometry import FIGURES, measure_layer
from edgedisp.dispersion.intervals import _student_t, draws, interval, kendall, ranks, spearman
from edgedisp.dispersion.profile import compare, condensation, profile, torch_states

# ---------------------------------------------------------------- rank correlations

curves = st.lists(st.integers(-4, 4), min_size=3, max_size=9).filter(lambda values: len(set(values)) > 1)


@settings(max_examples=60, deadline=None)
@given(curves)
def test_both_correlations_are_scipys_ties_included(values: list[int]) -> None:
    curve, depth = torch.tensor(values, dtype=torch.float64), range(len(values))
    assert ranks(curve).tolist() == stats.rankdata(values).tolist()
    assert spearman(curve).item() == pytest.approx(stats.spearmanr(values, depth).statistic, abs=1e-12)
    assert kendall(curve).item() == pytest.approx(stats.kendalltau(values, depth).statistic, abs=1e-12)


def test_a_flat_curve_has_no_trend_and_batches_are_rows() -> None:
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert spearman(rows).tolist() == pytest.approx([0, 1, -1])
    assert kendall(rows).tolist() == pytest.approx([0, 1, -1])


# ---------------------------------------------------------------- intervals


def test_students_t_is_scipys_from_four_degrees_of_freedom_on() -> None:
    for confidence in (0.8, 0.95, 0.99):
        tail = 0.5 + confidence / 2
        for freedom in (4, 7, 15, 100):
            expected = stats.t.ppf(tail, freedom)
            assert _student_t(stats.norm.ppf(tail), freedom) == pytest.approx(expected, rel=0.03)
        assert _student_t(stats.norm.ppf(tail), 15) == pytest.approx(stats.t.ppf(tail, 15), rel=1e-3)


def test_draws_weigh_sequences_like_a_resample_and_leave_the_global_stream_alone() -> None:
    before = torch.random.get_rng_state()
    weights = draws(5, seed=3, count=400)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights, draws(5, seed=3, count=400))
    assert not torch.equal(weights, draws(5, seed=4, count=400))
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(400, dtype=torch.float64))
    counts = weights * 5
    assert torch.equal(counts, counts.round()) and 0.9 < counts.mean() < 1.1


def test_an_interval_of_eight_sequences_covers_the_truth_about_as_often_as_it_says() -> None:
    generator, hits = torch.Generator().manual_seed(0), 0
    for trial in range(300):
        values = torch.randn(8, generator=generator, dtype=torch.float64)
        low, high = interval(draws(8, seed=trial) @ values, values.mean(), 8)
        hits += bool(low < 0 < high)
    assert 0.91 < hits / 300 < 0.985  # plain percentiles: 0.88


def test_an_interval_holds_its_estimate_even_where_no_draw_reaches_it() -> None:
    drawn = torch.linspace(0.5, 0.9, 2000, dtype=torch.float64)
    low, high = interval(drawn, torch.tensor(1.0, dtype=torch.float64), 10)
    assert 0.5 < low < 0.55 and high == 1


def test_one_sequence_has_no_interval() -> None:
    with pytest.raises(ValueError, match="one sequence"):
        interval(torch.ones(10), torch.tensor(1.0), 1)


# ---------------------------------------------------------------- a model


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

    bare = condensation(tiny(tiny_folder["llama"]), blocks(2))
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    wrapped = condensation(get_peft_model(tiny(tiny_folder["llama"]), config).eval(), blocks(2))
    assert wrapped["by_sequence"] == bare["by_sequence"]  # a fresh adapter adds nothing


def test_a_profile_is_the_mean_of_its_sequences(tiny_folder: dict[str, Path]) -> None:
    model, ids = tiny(tiny_folder["qwen3"]), blocks()
    told: list[tuple[int, int]] = []
    found = condensation(model, ids, lambda done, total, note: told.append((done, total)))
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
    found = condensation(model, ids)["correlations"]
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(curve, range(3)).statistic)
    assert found["kendall"]["value"] == pytest.approx(stats.kendalltau(curve, range(3)).statistic)
    assert found["kendall"]["low"] <= found["kendall"]["value"] <= found["kendall"]["high"]


def test_the_same_blocks_give_the_same_profile(tiny_folder: dict[str, Path]) -> None:
    model = tiny(tiny_folder["llama"])
    torch.manual_seed(0)
    first = condensation(model, blocks())
    torch.manual_seed(9)
    assert condensation(model, blocks()) == first


def test_a_single_sequence_has_values_without_intervals(tiny_folder: dict[str, Path]) -> None:
    found = condensation(tiny(tiny_folder["llama"]), blocks(1))
    assert all(row["intervals"] == {} for row in found["layers"])
    assert found["mean_cosine"]["low"] is None and found["correlations"]["kendall"]["high"] is None
    change = compare(found, found)
    assert change["mean_cosine"] == {"difference": 0, "low": None, "high": None}


# ---------------------------------------------------------------- differences


def made(offset: float, layers: int = 3, rows: int = 6, seed: int = 0) -> dict[str, Any]:
    """A profile of random vectors around a common offset that grows with depth."""

    def states(block: torch.Tensor) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(int(block[0]) + 1000 * seed)
        noise = torch.randn(layers + 1, 30, 12, generator=generator)
        return [noise[layer] + offset * layer / layers for layer in range(layers + 1)]

    return profile(states, torch.arange(rows).unsqueeze(1).expand(rows, 30))


def test_differences_are_paired_by_sequence() -> None:
    first, second = made(1.0), made(1.1)
    change = compare(first, second)
    assert [row["layer"] for row in change["layers"]] == [0, 1, 2]
    assert change["layers"][0]["cosine_raw"] == {"difference": 0, "low": 0, "high": 0}  # the same vectors
    found = change["layers"][2]["cosine_raw"]
    before, after = (one["layers"][2]["cosine_raw"] for one in (first, second))
    assert found["difference"] == pytest.approx(after - before)
    # The same noise is in both, so the pairs say more than the two intervals do.
    low, high = first["layers"][2]["intervals"]["cosine_raw"]
    assert 0 < found["low"] < found["high"] and found["high"] - found["low"] < (high - low) / 2
    whole = change["mean_cosine"]
    assert whole["difference"] == pytest.approx(
        second["mean_cosine"]["value"] - first["mean_cosine"]["value"]
    )


def test_a_profile_does_not_differ_from_itself() -> None:
    change = compare(made(1.0), made(1.0))
    assert all(row[name]["difference"] == 0 for row in change["layers"] for name in FIGURES)
    assert change["correlations"]["spearman"] == {"difference": 0, "low": 0, "high": 0}


def test_models_of_different_depth_are_compared_as_a_whole() -> None:
    shallow, deep = made(1.0, layers=3), made(1.0, layers=5)
    change = compare(shallow, deep)
    assert change["layers"] == [] and set(change["final_norm"]) == set(FIGURES)
    expected = deep["mean_cosine"]["value"] - shallow["mean_cosine"]["value"]
    assert change["mean_cosine"]["difference"] == pytest.approx(expected)
    assert math.isfinite(change["correlations"]["kendall"]["low"])


def test_profiles_over_other_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(made(1.0), made(1.0, rows=5))
