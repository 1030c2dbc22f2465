"""The collector on real transformers models: what it gathers, what it samples, what it leaves alone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from training import open_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from edgedisp.dispersion.hooks import DispersionLoss, hidden_states, sample_tokens
from edgedisp.dispersion.losses import VARIANTS, DispersionConfig
from edgedisp.recipe import Adapter
from edgedisp.train.lora import attach


def some_ids(batch: int = 2, tokens: int = 12) -> torch.Tensor:
    return torch.randint(3, 400, (batch, tokens), generator=torch.Generator().manual_seed(0))


def sample(count: int, layers: int, shape: tuple[int, int]) -> torch.Tensor:
    everything = torch.ones(shape, dtype=torch.bool)
    return sample_tokens(count, range(layers), everything, everything, (0, 0))


def run(model: torch.nn.Module, config: DispersionConfig, ids: torch.Tensor, **call: Any) -> Any:
    """The collector after one training pass of `model` over `ids`, and its loss."""
    term = DispersionLoss(config)
    with term.watch(model):
        model(ids, use_cache=False, **call)
        return term, term.loss()


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_loss_is_the_mean_over_layers_and_sequences(tiny_folder: dict[str, Path], variant: str) -> None:
    model = open_tiny(tiny_folder["llama"])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    term, value = run(model, DispersionConfig(variant, tokens=None), some_ids(), attention_mask=mask)
    states = model(some_ids(), attention_mask=mask, output_hidden_states=True).hidden_states
    by_layer = [VARIANTS[variant](state, mask.bool(), clamp=0.1).mean() for state in states[1:]]
    torch.testing.assert_close(value, torch.stack(by_layer).mean())
    assert term.by_layer() == pytest.approx({0: by_layer[0].item(), 1: by_layer[1].item()}, abs=1e-6)


OPT_350M = {"do_layer_norm_before": False, "_remove_final_layer_norm": True, "word_embed_proj_dim": 32}
FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_neox", "phi", "llama with lora"]


@pytest.mark.parametrize(("family", "changes"), [*((name, {}) for name in FAMILIES), ("opt", OPT_350M)])
def test_the_last_layer_is_dispersed_after_the_final_norm_in_every_family(
    tiny_folder: dict[str, Path], family: str, changes: dict[str, Any]
) -> None:
    """As in the paper's code, whose layers are transformers' `hidden_states[1:]`. OPT-350M has no final norm,
    and a projection to fewer features in its place."""
    config = AutoConfig.from_pretrained(tiny_folder[family.split()[0]])
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    if family.endswith("lora"):
        model = attach(model, Adapter(kind="lora", rank=4), seed=0)
    term, value = run(model, DispersionConfig(tokens=8), some_ids())
    states = model(some_ids(), output_hidden_states=True).hidden_states[1:]
    for layer, (state, picks) in enumerate(zip(states, sample(8, 2, (2, 12)))):
        vectors = state.gather(1, picks[..., None].expand(-1, -1, state.shape[-1]))
        assert term.by_layer()[layer] == pytest.approx(VARIANTS["angular"](vectors).mean().item(), abs=1e-6)
    value.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("tokens", "exclude_sink"), [(None, True), (3, True), (6, True), (3, False)])
def test_padding_changes_nothing(
    tiny_folder: dict[str, Path], tokens: int | None, exclude_sink: bool
) -> None:
    """Whatever the length of the batch, a sequence samples the same tokens and has the same value."""
    model, ids = open_tiny(tiny_folder["gpt2"]).eval(), some_ids(1)
    config = DispersionConfig(tokens=tokens, exclude_sink=exclude_sink)
    plain = run(model, config, ids[:, :5])[1]
    for length in (8, 12):
        mask = (torch.arange(length) < 5).long()[None]
        torch.testing.assert_close(run(model, config, ids[:, :length], attention_mask=mask)[1], plain)


def test_samples_are_rising_and_differ_by_layer_and_sequence_but_not_by_padding() -> None:
    tokens = sample(40, 3, (2, 100))
    assert tokens.shape == (3, 2, 40) and (tokens.diff(dim=-1) > 0).all()
    assert not torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0, 0], tokens[0, 1])
    padded = torch.zeros(2, 130, dtype=torch.bool)
    padded[:, 30:] = True  # left padding
    assert torch.equal(sample_tokens(40, range(3), padded, padded, (0, 0)), tokens + 30)
    assert torch.equal(sample_tokens(40, [0, 2], padded, padded, (0, 0)), tokens[[0, 2]] + 30)


def test_the_sink_is_the_first_real_token(tiny_folder: dict[str, Path]) -> None:
    model = open_tiny(tiny_folder["llama"])
    ids, mask = some_ids(1), torch.ones(1, 12, dtype=torch.long)
    mask[0, :3] = 0  # left padding
    config = DispersionConfig(tokens=None, exclude_sink=True, layers="last")
    value = run(model, config, ids, attention_mask=mask)[1]
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    torch.testing.assert_close(value, VARIANTS["angular"](states[-1][:, 4:], clamp=0.1)[0])


class Layers(torch.nn.Module):
    """Layers in a row, of which a pass skips some (`layerdrop`) and recomputes some with their hooks."""

    def __init__(self, depth: int, skipped: Collection[int] = (), recomputed: Collection[int] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(num_hidden_layers=depth)
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(depth)
        )
        self.skipped, self.recomputed, self.reentrant = skipped, recomputed, False

    def forward(self, x: torch.Tensor) -> Any:
        for index, layer in enumerate(self.layers):
            if index in self.recomputed:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
            elif index not in self.skipped:
                x = layer(x)
        return SimpleNamespace(last_hidden_state=x)


def some_vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def term_and_gradient(model: torch.nn.Module, config: DispersionConfig) -> tuple[torch.Tensor, ...]:
    """The dispersion of a pass over `some_vectors`, its gradient, and the layers that it is of."""
    term = DispersionLoss(config)
    with term.watch(model):
        model(some_vectors(2, 9, 8).requires_grad_())
        value = term.loss()
        value.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return value.detach(), gradient, torch.tensor(list(term.by_layer()))


@pytest.mark.parametrize(
    ("variant", "tokens", "depth", "skipped"),
    [("angular", None, 4, [0, 2]), ("angular", 4, 13, [1, 2, 11, 12]), ("l2_repel", 4, 4, [3])],
)
def test_skipped_layers_do_not_count_and_the_others_draw_their_own_tokens(
    variant: str, tokens: int | None, depth: int, skipped: list[int]
) -> None:
    model, config = Layers(depth, skipped), DispersionConfig(variant, tokens=tokens)
    value, gradient, layers = term_and_gradient(model, config)
    ran = [layer for layer in range(depth) if layer not in skipped or layer == depth - 1]
    assert layers.tolist() == ran
    model.zero_grad()
    everything = torch.arange(9).expand(depth, 2, 9)
    picks = sample(tokens, depth, (2, 9)) if tokens else everything
    with hidden_states(model) as seen:
        model(some_vectors(2, 9, 8))
        drawn = [
            state.gather(1, picks[layer, :, :, None].expand(-1, -1, 8))
            for layer, state in zip(ran, seen[-len(ran) :])
        ]
        plain = torch.stack([VARIANTS[variant](vectors, clamp=0.1) for vectors in drawn]).mean()
        plain.backward()
    torch.testing.assert_close(value, plain.detach())
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, expected)


def test_a_pass_that_skips_every_watched_layer_is_zero() -> None:
    model, term = Layers(2), DispersionLoss(DispersionConfig(layers="first_half"))
    with term.watch(model):
        losses = []
        for skipped in ([0], [], [0, 1], []):
            model.skipped = skipped
            model(some_vectors(2, 9, 8))
            losses.append(term.loss().item())
            assert [*term.by_layer()] == ([] if skipped else [0])
        assert losses == [0, losses[1], 0, losses[1]] and losses[1] != 0


@pytest.mark.parametrize("recomputed", [[0, 1, 2, 3], [1], [3]])
def test_layers_recomputed_with_their_hooks_count_once_among_plain_ones(recomputed: list[int]) -> None:
    """As in implementations that recompute a layer with its hooks, all layers or some."""
    config = DispersionConfig(tokens=4)
    plain, mixed = (term_and_gradient(Layers(4, recomputed=which), config) for which in ([], recomputed))
    torch.testing.assert_close(mixed, plain)


def test_layers_that_reentrant_checkpointing_hides_are_an_error_that_says_so() -> None:
    model, term = Layers(2, recomputed=[0, 1]), DispersionLoss(DispersionConfig())
    model.reentrant = True
    with term.watch(model), pytest.raises(ValueError, match=r"layer 0 ran without gradients.*use_reentrant"):
        model(some_vectors(2, 9, 8).requires_grad_())


def test_a_model_whose_output_may_be_logits_is_refused() -> None:
    model, term = Layers(2), DispersionLoss(DispersionConfig())
    model.forward = lambda x: model.layers[0](x)  # type: ignore[assignment]
    with term.watch(model), pytest.raises(ValueError, match=r"no last_hidden_state.*last layer out of"):
        model(some_vectors(2, 9, 8))


def test_a_sequence_without_a_pair_counts_as_zero(tiny_folder: dict[str, Path]) -> None:
    model, config = open_tiny(tiny_folder["llama"]).eval(), DispersionConfig(tokens=None)
    mask = (torch.arange(12) < torch.tensor([[12], [1]])).long()
    value = run(model, config, some_ids(), attention_mask=mask)[1]
    torch.testing.assert_close(value, run(model, config, some_ids()[:1])[1] / 2)
