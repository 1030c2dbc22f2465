"""A linear map is rounded under the inputs that it has in the quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_twins as twins
import pytest
import torch
from torch import Tensor, nn

from edgedisp import BadInput
from edgedisp.dispersion.collect import decoder_layers
from edgedisp.quantize.calibrate import LINEAR, calibrate
from edgedisp.quantize.grid import Grid, dequantize, quantize

GRID = Grid(4, 16, False)
BLOCKS = torch.randint(0, twins.VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))


def second_moments(model: nn.Module, blocks: Tensor) -> dict[str, Tensor]:
    """A second road: hooks on the whole model, one plain forward pass for all blocks at once."""
    found = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            found[name] = x.T @ x / len(x)

        return hook

    layers = decoder_layers(model)
    names = {module: name for name, module in model.named_modules()}
    linear = [module for module in layers.modules() if isinstance(module, LINEAR)]
    handles = [module.register_forward_pre_hook(keep(names[module])) for module in linear]
    with torch.no_grad():
        model(input_ids=blocks, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """Rounds to nearest; what `calibrate` handed over as H."""
    seen = {}

    def rounding(weights: dict[str, Tensor], second: Tensor) -> dict[str, Tensor]:
        for name, weight in weights.items():
            assert weight.shape[1] == len(second) and name not in seen
            seen[name] = second.clone()
        return {name: dequantize(quantize(weight, GRID), GRID) for name, weight in weights.items()}

    calibrate(model, decoder_layers(model), BLOCKS, rounding)
    return seen


@pytest.mark.parametrize("form", twins.FORMS)
def test_each_map_is_rounded_under_its_inputs_in_the_quantized_model(tmp_path: Path, form: str) -> None:
    model = twins.make(tmp_path, form)
    before = second_moments(model, BLOCKS)
    seen = rounded(model)
    after = second_moments(model, BLOCKS)
    assert list(seen) and set(seen) == set(after)
    for name, second in seen.items():
        torch.testing.assert_close(second, after[name], rtol=2e-3, atol=2e-4 * float(after[name].abs().max()))
    last = list(seen)[-1]  # the quantized model is another one, or the test would say nothing
    assert not torch.allclose(before[last], after[last], rtol=1e-2)


@pytest.mark.parametrize("form", twins.FAMILIES)
def test_the_layers_linear_maps_are_on_the_grid_afterwards_and_nothing_else_changes(
    tmp_path: Path, form: str
) -> None:
    model, untouched = twins.make(tmp_path, form), twins.make(tmp_path, form)
    names = set(rounded(model))
    for (name, module), (_, original) in zip(model.named_modules(), untouched.named_modules()):
        for key, parameter in module.named_parameters(recurse=False):
            plain = dict(original.named_parameters(recurse=False))[key]
            if name in names and key == "weight":
                turned = not isinstance(module, nn.Linear)
                values = plain.T if turned else plain
                expected = dequantize(quantize(values.detach(), GRID), GRID)
                torch.testing.assert_close(parameter.detach().T if turned else parameter.detach(), expected)
            else:
                assert torch.equal(parameter, plain)


def test_maps_come_in_the_order_of_computation(tmp_path: Path) -> None:
    order = [name.split(".")[-1] for name in rounded(twins.make(tmp_path, "llama"))]
    layer = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert order == layer * 2


def test_no_hook_is_left_and_no_text_is_refused(tmp_path: Path) -> None:
    model = twins.make(tmp_path, "llama")
    rounded(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(BadInput, match="calibration"):
        calibrate(model, decoder_layers(model), BLOCKS[:0], lambda weights, second: weights)
