"""The Fisher score of a rounding against the KL divergence that it causes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import pytest
import torch
from torch import Tensor

from edgedisp.graph.export import export
from edgedisp.quantize.grid import Grid, dequantize
from edgedisp.quantize.onnx_rewrite import Choice
from edgedisp.quantize.onnx_weights import find_uses, read_graph
from edgedisp.quantize.sensitivity import (
    Measured,
    Text,
    changed,
    find_units,
    loss,
    measure,
    moments,
    read_unit,
    shares,
)

UNTIED = "llama, untied, biases, wide heads"
FORMS = ["llama", "qwen3", "gemma3_text", "gpt2", UNTIED]


def rounded(weight: Tensor, choice: Choice, importance: Tensor | None) -> Tensor:
    return dequantize(choice.blocks(weight, importance), choice.grid)


def pieces(count: int, tokens: int = 24, seed: int = 0) -> list[torch.Tensor]:
    """Without the padding token, whose row of a twin's embedding is zero: a norm of nothing."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, twins.VOCABULARY, (tokens,), generator=generator) for _ in range(count)]


def exported(folder: Path, form: str, **changes: Any) -> tuple[Any, Path]:
    model = twins.make(folder / "model", form, **changes)
    (folder / "fp32").mkdir()
    export(folder / "model", folder / "fp32", threads=1)
    return model, folder / "fp32"


@pytest.mark.parametrize("form", FORMS)
def test_units_are_the_graphs_weights_as_parts_of_the_model(tmp_path: Path, form: str) -> None:
    model, bundle = exported(tmp_path, form)
    units = find_units(bundle, model)
    assert {unit.name for unit in units} == set(find_uses(read_graph(bundle).graph))
    assert sum(unit.outer for unit in units) == (2 if form == UNTIED else 1)
    assert sum(unit.embeds for unit in units) == 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unit = next(unit for unit in units if not unit.outer)
    with changed(model, [unit], lambda unit, weight: weight + 1):
        moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
        assert moved == {f"{name}.weight" for name in unit.modules}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", ["llama", "gemma3_text", "gpt2"])
def test_the_score_of_a_small_error_is_near_the_divergence_it_causes(tmp_path: Path, form: str) -> None:
    """Errors without structure, as the score assumes, in weights that are no larger than a trained model's.
    Errors of q, k and v at different tokens add up where attention averages, so theirs cost more."""
    model, bundle = exported(tmp_path, form, initializer_range=0.06)
    units, text = find_units(bundle, model), pieces(12)
    known = moments(model, units, text, seed=0)
    measured = Text(model, text)
    generator = torch.Generator().manual_seed(1)
    ratios = []
    for unit in units:
        spread, true, scored = read_unit(model, unit).std(), 0.0, 0.0
        for _ in range(6):  # one error alone can be worth a third of what its like are worth on average
            error = 0.01 * spread * torch.randn(unit.rows, unit.columns, generator=generator)
            with changed(model, [unit], lambda unit, weight, error=error: weight + error):
                true += measured.kl(model)
            scored += known[unit.name].fisher(error)
        ratios.append(true / scored)
    for unit, ratio in zip(units, ratios):
        most = 8.0 if "qkv" in unit.name else 2.0
        assert 0.5 < ratio < most, (unit.name, ratios)
    assert 0.75 < np.exp(np.mean(np.log(ratios))) < 1.6, ratios


def test_the_shares_of_the_weights_add_up_to_the_loss_of_all(tmp_path: Path) -> None:
    model, bundle = exported(tmp_path, "llama", initializer_range=0.08)
    units, text = find_units(bundle, model), pieces(6)
    measured, usual = Text(model, text), Choice(Grid(4, 32, False))
    found = measure(model, units, measured, lambda _, weight: rounded(weight, usual, None))
    with changed(model, units, lambda _, weight: rounded(weight, usual, None)):
        whole = measured.kl(model)
    assert sum(shares(found).values()) == pytest.approx(whole, rel=0.1)
    assert measured.kl(model) == pytest.approx(0, abs=1e-6)  # the weights are back


def test_a_share_that_the_text_cannot_tell_is_the_expected_one() -> None:
    told = {"a": Measured(0.01, 0.02, 1e-9), "b": Measured(0.01, 0.04, 1e-9)}
    assert shares(told) == pytest.approx({"a": 0.015, "b": 0.025})
    unsure = {name: Measured(one.alone, one.last, 1e3) for name, one in told.items()}
    assert shares(unsure) == pytest.approx({"a": 0.02, "b": 0.02})  # 3 times as much among others
    assert shares({"a": Measured(0.01, -0.5, 1e-9)}) == {"a": 0.0025}


def test_the_divergence_and_the_loss_are_those_of_the_formulas(tmp_path: Path) -> None:
    model, text = twins.make(tmp_path, "llama"), pieces(3)
    other = twins.make(tmp_path / "other", "llama", initializer_range=0.16)
    p, q = (
        np.concatenate([twins.torch_logits(one, piece.tolist()) for piece in text]).astype(np.float64)
        for one in (model, other)
    )
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    expected = (np.exp(p) * (p - q)).sum(-1).mean()
    assert Text(model, text).kl(other) == pytest.approx(expected, rel=1e-4)
    assert Text(model, text).kl(model) == pytest.approx(0, abs=1e-6)
    p = p.reshape(3, 24, -1)
    nll = -np.mean([p[i, t, text[i][t + 1]] for i in range(3) for t in range(23)])
    assert loss(model, text) == pytest.approx(nll, rel=1e-5)
