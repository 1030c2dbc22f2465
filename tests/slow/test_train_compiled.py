"""Compiled layers and models compute what plain ones do, dispersion included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import open_tiny
from transformers import TrainingArguments

from edgedisp import DispersionConfig, DispersionLoss, DispersionTrainer
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.dispersion.pairwise_kernel import pairwise_loss
from edgedisp.train.performance import compiled_layers


def test_loss_term_and_gradients_are_those_of_the_plain_layers(tiny_folder: dict[str, Path]) -> None:
    model = open_tiny(tiny_folder["llama"]).train()
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
        assert all("forward" in vars(layer) for layer in decoder_layers(model))
        compiled = step()
    for expected, value in zip(plain, compiled):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


def test_a_compiled_model_that_was_trained_before_is_watched(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    """What was compiled without the term's hooks must not be run again."""
    ids = torch.randint(3, 400, (4, 12), generator=torch.Generator().manual_seed(0))
    rows: Any = [{"input_ids": row, "labels": row} for row in ids]
    config = DispersionConfig(tokens=6)
    logged = []
    for dispersion, compiled in ((config, False), (None, True), (config, True)):
        options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, logging_steps=1, report_to=[], use_cpu=True, **options
        )
        model = open_tiny(tiny_folder["llama"])
        trainer = DispersionTrainer(model=model, args=args, train_dataset=rows, dispersion=dispersion)
        trainer.train()
        logged.append(next(row for row in trainer.state.log_history if "loss" in row))
    assert "dispersion" not in logged[1]
    assert logged[2]["dispersion"] == pytest.approx(logged[0]["dispersion"], rel=1e-5)


def test_the_loss_over_all_pairs_compiles_as_one_graph() -> None:
    vectors = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.arange(300)[None] < torch.tensor([[300], [250]])
    compiled = torch.compile(
        lambda v: pairwise_loss("angular", v, mask=mask).sum(), backend="aot_eager", fullgraph=True
    )
    value, plain = compiled(vectors), pairwise_loss("angular", vectors, mask=mask).sum()
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(*(torch.autograd.grad(each, vectors)[0] for each in (value, plain)))
