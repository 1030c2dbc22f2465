"""The collector on real transformers models: what it gathers, what it samples, what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from edgedisp.dispersion.collect import decoder_layers, hidden_states, select_layers
from edgedisp.dispersion.config import DispersionConfig
from edgedisp.dispersion.loss import VARIANTS

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


def run(
    model: torch.nn.Module, config: DispersionConfig, ids: torch.Tensor, first: int = 0, **call: Any
) -> Any:
    """The collector after one training pass of `model` over `ids`, and its loss."""
    term = config.collector()
    with term.watch(model):
        term.begin(first_sequence=first)
        model(ids, use_cache=False, **call)
        return term, term.loss()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_loss_is_the_mean_over_layers_and_sequences(tiny_folder: dict[str, Path], variant: str) -> None:
    model = open_tiny(tiny_folder["llama"])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    with hidden_states(model, [0, 1]) as seen:
        term, value = run(model, DispersionConfig(variant, tokens=None), some_ids(), attention_mask=mask)
        by_layer = [VARIANTS[variant](seen[layer], mask.bool(), clamp=0.1) for layer in (0, 1)]
    torch.testing.assert_close(value, torch.stack(by_layer).mean())
    assert term.by_layer() == pytest.approx({0: by_layer[0].item(), 1: by_layer[1].item()}, abs=1e-6)


@pytest.mark.parametrize("variant", ["angular", "l2_repel"])
@pytest.mark.parametrize("tokens", [None, 5])
def test_gradient_of_the_weights_is_that_of_the_plain_loss(
    tiny_folder: dict[str, Path], variant: str, tokens: int | None
) -> None:
    model, config = open_tiny(tiny_folder["qwen3"]), DispersionConfig(variant, tokens=tokens)
    with hidden_states(model, [0, 1]) as seen:
        term, value = run(model, config, some_ids(), first=3)
        value.backward()
        ours = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    with hidden_states(model, [0, 1]) as seen:
        model(some_ids(), use_cache=False)
        picks = term._picks(3, 2, 12, 2, None) if tokens else torch.arange(12).expand(2, 2, 12)
        drawn = [
            seen[layer].gather(1, picks[layer, :, :, None].expand(-1, -1, seen[0].shape[-1]))
            for layer in (0, 1)
        ]
        everyone = torch.ones(2, picks.shape[-1], dtype=torch.bool)
        plain = torch.stack([VARIANTS[variant](vectors, everyone, clamp=0.1) for vectors in drawn]).mean()
        plain.backward()
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(
        ours,
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
        atol=1e-6,
        rtol=1e-4,
    )


@pytest.mark.parametrize("tokens", [None, 5])
def test_a_batch_is_the_mean_of_its_sequences(tiny_folder: dict[str, Path], tokens: int | None) -> None:
    """Sampled tokens too: what a sequence draws depends on its number, not on its micro-batch."""
    model, ids = open_tiny(tiny_folder["qwen3"]), some_ids(4)
    config = DispersionConfig(tokens=tokens)
    together = run(model, config, ids, first=8)[1]
    apart = [run(model, config, ids[row : row + 1], first=8 + row)[1] for row in range(4)]
    torch.testing.assert_close(together, torch.stack(apart).mean())


def test_drawn_tokens_depend_on_seed_and_sequence_alone(tiny_folder: dict[str, Path]) -> None:
    model, ids = open_tiny(tiny_folder["llama"]), some_ids()

    def value(seed: int, first: int) -> float:
        return run(model, DispersionConfig(tokens=5, seed=seed), ids, first)[1].item()

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = value(0, 3)
    assert torch.equal(torch.random.get_rng_state(), before)  # the global stream was not touched
    torch.manual_seed(99)
    assert value(0, 3) == first
    assert value(0, 4) != first and value(1, 3) != first


def test_every_layer_draws_anew_and_without_repetition() -> None:
    picks = DispersionConfig(tokens=40).collector()._picks(0, 2, 100, 3, None)
    assert picks.shape == (3, 2, 40)
    assert (picks.diff(dim=-1) > 0).all()
    assert not torch.equal(picks[0], picks[1]) and not torch.equal(picks[0, 0], picks[0, 1])


def test_padding_is_drawn_for_want_of_real_tokens_only() -> None:
    real = torch.arange(10)[None] < 4
    for first in range(20):
        picks = DispersionConfig(tokens=4).collector()._picks(first, 1, 10, 1, real)
        assert picks.tolist() == [[[0, 1, 2, 3]]]


@pytest.mark.parametrize("tokens", [None, 6])
def test_padding_changes_nothing(tiny_folder: dict[str, Path], tokens: int | None) -> None:
    """A sequence with and without right padding: one value. With fewer real tokens than drawn, also one."""
    model, ids = open_tiny(tiny_folder["gpt2"]), some_ids(1)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 5:] = 0
    padded = run(model, DispersionConfig(tokens=tokens), ids, attention_mask=mask)[1]
    torch.testing.assert_close(padded, run(model, DispersionConfig(tokens=tokens), ids[:, :5])[1])


def test_the_sink_is_the_first_real_token(tiny_folder: dict[str, Path]) -> None:
    model = open_tiny(tiny_folder["llama"])
    ids, mask = some_ids(1), torch.ones(1, 12, dtype=torch.long)
    mask[0, :3] = 0  # left padding
    config = DispersionConfig(tokens=None, exclude_sink=True, layers="last")
    with hidden_states(model, [1]) as seen:
        value = run(model, config, ids, attention_mask=mask)[1]
        expected = VARIANTS["angular"](seen[1][:, 4:], torch.ones(1, 8, dtype=torch.bool), clamp=0.1)
    torch.testing.assert_close(value, expected)


def test_a_token_of_huge_norm_is_a_sink_too(tiny_folder: dict[str, Path]) -> None:
    model, ids = open_tiny(tiny_folder["llama"]), some_ids(1)
    config = DispersionConfig(tokens=None, exclude_sink=True, layers=[0])

    def lengthen(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.where(torch.arange(12) == 7, 100.0, 1.0)[None, :, None]

    handle = decoder_layers(model)[0].register_forward_hook(lengthen)
    with hidden_states(model, [0]) as seen:
        value = run(model, config, ids)[1]
        rest = [token for token in range(1, 12) if token != 7]
        expected = VARIANTS["angular"](seen[0][:, rest], torch.ones(1, 10, dtype=torch.bool), clamp=0.1)
    handle.remove()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_counts_no_layer_twice(
    tiny_folder: dict[str, Path], use_reentrant: bool
) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = open_tiny(tiny_folder["llama"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        term = DispersionConfig(tokens=6).collector()
        with term.watch(model):
            loss = model(some_ids(), labels=some_ids(), use_cache=False).loss + term.loss()
            loss.backward()
            with pytest.raises(ValueError, match="no forward pass"):
                term.loss()  # the recomputation left nothing behind
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_hooks_inside_a_checkpointed_region_count_once_too(tiny_folder: dict[str, Path]) -> None:
    """As in implementations that recompute a layer with its hooks."""
    model = open_tiny(tiny_folder["llama"])
    inputs = model.get_input_embeddings()(some_ids())
    config = DispersionConfig(tokens=6)
    gradients = []
    for recompute in (False, True):
        term, x = config.collector(), inputs.detach().requires_grad_()
        with term.watch(model):
            term._start(model, (), {})
            rotary = model.model.rotary_emb(x, torch.arange(12)[None])
            for layer in decoder_layers(model):
                if recompute:
                    x_next = checkpoint(layer, x, position_embeddings=rotary, use_reentrant=False)
                else:
                    x_next = layer(x, position_embeddings=rotary)
                x = x_next[0] if isinstance(x_next, tuple) else x_next
            value = term.loss()
            value.backward()
        gradients.append([p.grad.clone() for p in decoder_layers(model).parameters()])
        model.zero_grad()
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


def test_evaluation_inside_the_block_is_not_looked_at(tiny_folder: dict[str, Path]) -> None:
    model, ids = open_tiny(tiny_folder["gpt2"]), some_ids()
    expected = run(model, DispersionConfig(tokens=None), ids)[1]
    term = DispersionConfig(tokens=None).collector()
    with term.watch(model):
        model(ids, use_cache=False)
        with torch.no_grad():
            model(some_ids(1, 5))
        torch.testing.assert_close(term.loss(), expected)


def test_sequences_without_a_pair_count_as_nothing_and_are_counted(tiny_folder: dict[str, Path]) -> None:
    model, ids = open_tiny(tiny_folder["llama"]), some_ids(3)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 1:] = 0
    config = DispersionConfig(tokens=None)
    term, value = run(model, config, ids, attention_mask=mask)
    torch.testing.assert_close(value, run(model, config, ids[[0, 2]])[1])
    assert term.skipped_sequences == 1
    term, value = run(model, config, ids[:, :1])
    assert value.item() == 0 and term.skipped_sequences == 3
    value.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_frozen_layers_have_a_value_and_no_gradient(tiny_folder: dict[str, Path]) -> None:
    model = open_tiny(tiny_folder["llama"])
    expected = run(model, DispersionConfig(), some_ids())[1].item()
    model.requires_grad_(False)
    _, value = run(model, DispersionConfig(), some_ids())
    assert value.item() == pytest.approx(expected) and not value.requires_grad


def test_autocast_rounds_the_products_and_no_more(tiny_folder: dict[str, Path]) -> None:
    model = open_tiny(tiny_folder["qwen3"])
    with torch.autocast("cpu", torch.bfloat16), hidden_states(model, [0, 1]) as seen:
        value = run(model, DispersionConfig(tokens=None), some_ids())[1]
        everyone = torch.ones(2, 12, dtype=torch.bool)
        exact = torch.stack(
            [VARIANTS["angular"](seen[layer], everyone, clamp=0.1) for layer in (0, 1)]
        ).mean()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, exact, atol=5e-4, rtol=0)


def test_a_mask_of_another_shape_is_an_error(tiny_folder: dict[str, Path]) -> None:
    model, term = open_tiny(tiny_folder["llama"]), DispersionConfig().collector()
    with term.watch(model), pytest.raises(ValueError, match=r"the mask is \(2, 11\)"):
        term.begin(torch.ones(2, 11))
        model(some_ids())


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
    term = DispersionConfig().collector()
    with pytest.raises(ValueError, match="no forward pass"), term.watch(open_tiny(tiny_folder["gpt2"])):
        term.loss()


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no list"):
        decoder_layers(torch.nn.Linear(2, 2))
