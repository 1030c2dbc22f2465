"""Compiled layers compute what plain ones do, and a model is its old self afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgedisp.dispersion.config import DispersionConfig
from edgedisp.dispersion.hooks import DispersionLoss
from edgedisp.train import compiled as room
from edgedisp.train.compiled import compiled_layers, why_not_compiled


def open_tiny(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def test_loss_term_and_gradients_are_those_of_the_plain_layers(tiny_folder: dict[str, Path]) -> None:
    model = open_tiny(tiny_folder["llama"])
    if (reason := why_not_compiled(model)) is not None:
        pytest.skip(reason)
    ids = torch.randint(3, 400, (2, 16), generator=torch.Generator().manual_seed(0))

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        term = DispersionLoss(DispersionConfig(tokens=8))
        with term.watch(model):
            loss = model(ids, labels=ids, use_cache=False).loss
            value = term.loss()
            (loss + value).backward()
        return [loss.detach(), value.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = step()
    with compiled_layers(model):
        assert all("forward" in vars(layer) for layer in room._layers(model))
        found = step()
    for one, other in zip(plain, found):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert not any("forward" in vars(layer) for layer in room._layers(model))


def test_without_a_compiler_the_reason_says_what_to_install(
    tiny_folder: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model = open_tiny(tiny_folder["gpt2"])
    with pytest.raises(ValueError, match=r"no C\+\+ compiler \(g\+\+, clang\+\+, c\+\+\): install one"):
        compiled_layers(model).__enter__()


def test_a_model_without_layers_is_refused() -> None:
    assert "no transformer layers" in str(why_not_compiled(torch.nn.Linear(2, 2)))
