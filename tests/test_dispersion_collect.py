"""The collector on real transformers models: what it gathers, what it samples, what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgedisp.dispersion.collect import Dispersion, decoder_layers, hidden_states, select_layers
from edgedisp.dispersion.geometry import condensation, effective_rank, measure_layer, pair_cosines
from edgedisp.dispersion.loss import angular

ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "gpt2"]


def open_tiny(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def some_ids(batch: int = 2, tokens: int = 12) -> torch.Tensor:
    return torch.randint(3, 400, (batch, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_are_those_that_transformers_returns(
    tiny_folder: dict[str, Path], architecture: str
) -> None:
    model = open_tiny(tiny_folder[architecture])
    with torch.no_grad(), hidden_states(model, [-1, 0, 1]) as seen:
        returned = model(some_ids(), output_hidden_states=True).hidden_states
        assert torch.equal(seen[-1], returned[0])
        assert torch.equal(seen[0], returned[1])
        assert not torch.equal(seen[1], returned[2])  # the last one is returned after the final norm


def test_hooks_are_gone_after_the_block(tiny_folder: dict[str, Path]) -> None:
    model = open_tiny(tiny_folder["llama"])

    def hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    with hidden_states(model, [-1, 0, 1]):
        assert hooks() == 3
    assert hooks() == 0


def test_loss_is_the_mean_over_layers_and_sequences(tiny_folder: dict[str, Path]) -> None:
    model = open_tiny(tiny_folder["llama"])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    penalty = Dispersion(tokens=None)
    with torch.no_grad(), penalty.watch(model), hidden_states(model, [0, 1]) as seen:
        model(some_ids(), attention_mask=mask)
        by_hand = torch.stack([angular(seen[layer], mask.bool()) for layer in (0, 1)]).mean()
        torch.testing.assert_close(penalty.loss(mask), by_hand)


def test_a_batch_is_the_mean_of_its_sequences(tiny_folder: dict[str, Path]) -> None:
    model, ids = open_tiny(tiny_folder["qwen3"]), some_ids(4)
    penalty = Dispersion(tokens=None)

    def value(rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), penalty.watch(model):
            model(rows)
            return penalty.loss()

    torch.testing.assert_close(value(ids), torch.stack([value(row[None]) for row in ids]).mean())


def test_sampled_tokens_depend_on_seed_and_step_alone(tiny_folder: dict[str, Path]) -> None:
    model, ids = open_tiny(tiny_folder["llama"]), some_ids()

    def value(seed: int, step: int) -> float:
        penalty = Dispersion(tokens=5, seed=seed)
        with torch.no_grad(), penalty.watch(model):
            model(ids)
            return penalty.loss(step=step).item()

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = value(0, 3)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global stream was not touched
    torch.manual_seed(99)
    assert value(0, 3) == first
    assert value(0, 4) != first and value(1, 3) != first


def test_sampling_takes_real_tokens_before_padding() -> None:
    penalty = Dispersion(tokens=4)
    state = torch.arange(20.0).reshape(1, 10, 2)
    real = torch.arange(10)[None] < 4
    for step in range(20):
        vectors, kept = penalty._sample(state, real, 0, step)
        assert kept.all() and torch.equal(vectors, state[:, :4])


def test_the_sink_is_the_first_real_token(tiny_folder: dict[str, Path]) -> None:
    model = open_tiny(tiny_folder["llama"])
    ids, mask = some_ids(1), torch.ones(1, 12, dtype=torch.long)
    mask[0, :3] = 0  # left padding
    penalty = Dispersion(tokens=None, exclude_sink=True, layers="last")
    with torch.no_grad(), penalty.watch(model), hidden_states(model, [1]) as seen:
        model(ids, attention_mask=mask)
        expected = angular(seen[1][:, 4:], torch.ones(1, 8, dtype=torch.bool))
        torch.testing.assert_close(penalty.loss(mask), expected[0])


def test_gradient_checkpointing_counts_no_layer_twice(tiny_folder: dict[str, Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = open_tiny(tiny_folder["llama"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        penalty = Dispersion(tokens=6)
        with penalty.watch(model):
            loss = model(some_ids(), labels=some_ids(), use_cache=False).loss + penalty.loss()
            loss.backward()
        assert not penalty._seen
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_layer_choices() -> None:
    assert select_layers("all", 5) == [0, 1, 2, 3, 4]
    assert select_layers("first_half", 5) == [0, 1]
    assert select_layers("last_half", 5) == [2, 3, 4]
    assert select_layers("last", 5) == [4]
    assert select_layers([3, 1, 1], 5) == [1, 3]


def test_an_unknown_layer_choice_does_not_mean_all() -> None:
    with pytest.raises(ValueError, match=r"early_half.*is not one of all"):
        select_layers("early_half", 5)
    with pytest.raises(ValueError, match=r"layers \[5\] are outside"):
        select_layers([0, 5], 5)


def test_loss_without_a_forward_pass_is_an_error(tiny_folder: dict[str, Path]) -> None:
    penalty = Dispersion()
    with pytest.raises(ValueError, match="no forward pass"), penalty.watch(open_tiny(tiny_folder["gpt2"])):
        penalty.loss()


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no list"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_effective_rank_of_an_orthonormal_set_is_its_size() -> None:
    assert effective_rank(torch.eye(6, 10)) == pytest.approx(6)
    assert effective_rank(torch.ones(6, 10)) == pytest.approx(1)


def test_mean_removed_cosine_sees_through_a_common_offset() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(200, 64, generator=generator) + 10
    measured = measure_layer(vectors)
    assert measured["cosine_raw"] > 0.98
    assert abs(measured["cosine_mean_removed"]) < 0.02
    assert sum(measured["histogram"]) == 200 * 199 // 2


def test_a_token_of_huge_norm_counts_as_a_sink_wherever_it_stands() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(60, 32, generator=generator)
    plain = measure_layer(vectors)
    vectors[20] *= 100
    measured = measure_layer(vectors)
    assert plain["sinks"] == 1 and measured["sinks"] == 2
    rest = torch.cat([vectors[1:20], vectors[21:]])
    assert measured["effective_rank"] == pytest.approx(effective_rank(rest))
    assert measured["cosine_sink_excluded"] == pytest.approx(pair_cosines(rest).mean().item())


def test_mean_cosine_is_the_closed_form_of_the_sum_of_directions(tiny_folder: dict[str, Path]) -> None:
    model = open_tiny(tiny_folder["qwen3"])
    ids = some_ids(2)
    measured = condensation(model, ids)
    assert [row["layer"] for row in measured["layers"]] == [0, 1, 2] and measured["tokens"] == 24
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[1]
    directions = torch.nn.functional.normalize(states, dim=-1)
    total = directions.sum(dim=1).square().sum(dim=-1)
    expected = ((total - 12) / (12 * 11)).mean()
    assert measured["layers"][1]["cosine_raw"] == pytest.approx(expected.item(), abs=1e-5)
