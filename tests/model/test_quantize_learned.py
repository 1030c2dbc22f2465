"""Learned scales: their gradient by autograd, their training by a plain loop, and that they resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train_quantization_aware import BLOCKS, BODY, ROUNDING, Stop, check_equal, opened, settings, state
from torch import Tensor, nn
from torch.func import functional_call

from edgedisp.quantize.grid import Grid, dequantize, in_groups, quantize, ranges, storable
from edgedisp.quantize.learned import RATE, LearnedScales
from edgedisp.quantize.start import Scales
from edgedisp.train.quantization_aware import LEARNED, QuantizationAware
from edgedisp.train.rounded import weights_of
from edgedisp.train.trainer import fit

GRIDS = [Grid(4, 16, False), Grid(4, 32, True), Grid(2, 16, True), Grid(8, 16, False)]


def nearest(grid: Grid) -> LearnedScales:
    def scales(name: str, weight: Tensor) -> Scales:
        return Scales(*ranges(in_groups(weight, grid.group), grid))

    return LearnedScales(lambda name: grid, scales)


def held(weight: Tensor, start: Scales, stretch: Tensor, grid: Grid) -> Tensor:
    """The held weight as one expression: autograd sees the rounding as the identity, the cut as it is."""
    values = in_groups(weight, grid.group)
    scales = start.scales * torch.exp(RATE * stretch)
    scales = (scales * (storable(scales) / scales).detach())[..., None]
    center = float(grid.middle) if start.zero_points is None else start.zero_points[..., None].float()
    steps = values / scales + center
    integers = (steps + (steps.round() - steps).detach()).clamp(0, grid.highest)
    return ((integers - center) * scales).reshape(len(weight), -1)[:, : weight.shape[1]]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("columns", [64, 40])
def test_the_gradient_is_that_of_the_rounding_passed_through(grid: Grid, columns: int) -> None:
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(6, columns, generator=drawn)
    outer = torch.randn(6, columns, generator=drawn)
    rounding = nearest(grid)
    # Some scales so small that values are cut off, some larger than the range.
    stretch = (torch.randn(rounding.shape("w", weight), generator=drawn) / (2 * RATE)).requires_grad_()
    start = Scales(*ranges(in_groups(weight, grid.group), grid))
    expected = held(weight, start, stretch, grid)
    torch.testing.assert_close(rounding.rounded("w", weight, stretch.detach()), expected.detach())
    (expected * outer).sum().backward()
    found = rounding.gradient("w", weight, stretch.detach(), outer)
    assert stretch.grad is not None
    torch.testing.assert_close(found, stretch.grad, rtol=1e-4, atol=1e-4)
    steps = weight.abs().max() / start.scales.abs().min()
    assert steps > 1 and not torch.equal(found, torch.zeros_like(found))


def test_without_stretch_the_method_is_as_it_was() -> None:
    weight = torch.randn(4, 48, generator=torch.Generator().manual_seed(1))
    for grid in GRIDS:
        rounding = nearest(grid)
        plain = dequantize(quantize(weight, grid), grid)
        assert torch.equal(rounding.rounded("w", weight, torch.zeros(rounding.shape("w", weight))), plain)


def learned(**options: Any) -> QuantizationAware:
    return QuantizationAware(*ROUNDING, grid="learned", learned=nearest(BODY), **options)


def by_hand(model: Any, chosen: Any) -> tuple[Any, dict[str, Tensor]]:
    """A plain loop over autograd: what is held is an expression of weight and stretch."""
    rounding = nearest(BODY)
    weights = list(weights_of(model, *ROUNDING))
    stretches = {
        weight.name: nn.Parameter(torch.zeros(rounding.shape(weight.name, weight.values())))
        for weight in weights
        if not weight.is_end
    }
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": [*matrices, *stretches.values()], "weight_decay": chosen.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=chosen.lr, betas=chosen.betas)
    for step in range(chosen.steps):
        new = {}
        for weight in weights:
            plain = weight.values()
            fixed = weight.rounding(weight.name, plain)
            if weight.name in stretches:
                start = Scales(*ranges(in_groups(plain, BODY.group), BODY))
                fixed = held(plain, start, stretches[weight.name], BODY)
            fixed = fixed.T if weight.turned else fixed
            new[weight.name] = fixed + weight.parameter - weight.parameter.detach()
        ids = torch.from_numpy(BLOCKS[chosen.batch * step : chosen.batch * (step + 1)].astype(np.int64))
        optimizer.zero_grad()
        functional_call(model, new, kwargs={"input_ids": ids, "labels": ids}).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(model.parameters()), chosen.clip)
        for stretch in stretches.values():  # they see the clipped gradient, and are no part of its norm
            assert stretch.grad is not None
            stretch.grad *= min(1.0, chosen.clip / float(norm))
        optimizer.step()
    return model, {name: stretch.detach() for name, stretch in stretches.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scales_are_trained_as_by_hand(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    chosen = settings(schedule="constant", warmup=0.0, steps=2, lr=1e-3)
    trained, reference = opened(tiny_folder[architecture]), opened(tiny_folder[architecture])
    for module in (trained, reference):
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # GPT-2's; the two roads draw from other streams
    callback = learned()
    callback.attach(trained)
    fit(trained, BLOCKS, chosen, checkpoints=tmp_path, callbacks=[callback])
    found = callback.take(trained)
    assert not hasattr(trained, LEARNED)
    reference, expected = by_hand(reference.train(), chosen)
    assert found.keys() == expected.keys()
    for name, stretch in found.items():
        assert (stretch != 0).any()
        difference = (stretch - expected[name]).abs()
        assert (difference > 1e-4).float().mean() < 0.02, name
    for name, value in trained.state_dict().items():
        if name.endswith("c_attn.bias"):
            continue  # that of the keys has no gradient but noise, which Adam makes large
        assert ((value - reference.state_dict()[name]).abs() > 1e-4).float().mean() < 0.02, name


@pytest.mark.parametrize("stopped_in", [3, 5])
def test_learned_scales_resume_exactly(tiny_folder: dict[str, Path], tmp_path: Path, stopped_in: int) -> None:
    chosen = settings(steps=8, checkpoint_every=2)
    results = []
    for name, stop in (("whole", -1), ("broken", stopped_in)):
        folder = tmp_path / name
        folder.mkdir()
        for step in dict.fromkeys((stop, -1)):
            model, callback = opened(tiny_folder["llama"]), learned(start=0.5, ramp=0.25)
            callback.attach(model)
            try:
                done = fit(model, BLOCKS, chosen, checkpoints=folder, callbacks=[callback, Stop(step)])
            except KeyboardInterrupt:
                assert step == stop
        assert bool(done.resumed_from) == (stop != -1)
        results.append((state(model), [row["loss"] for row in done.log]))
    check_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert any(name.startswith(LEARNED) and value.any() for name, value in results[0][0].items())


def test_a_model_that_was_not_prepared_is_refused(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attach"):
        fit(opened(tiny_folder["llama"]), BLOCKS, settings(), checkpoints=tmp_path, callbacks=[learned()])
