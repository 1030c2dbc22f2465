"""A linear map is rounded under the inputs that it has in the quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_twins as twins
import pytest
import torch
from torch import Tensor, nn

from edgedisp.core.errors import BadInput
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.quantize.calibration import RIDGE, Wave, calibrate
from edgedisp.quantize.grid import Grid, dequantize, quantize
from edgedisp.quantize.layer_inputs import LINEAR, layer_calls, residual_of, states_before

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
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    linear = [module for module in layers.modules() if isinstance(module, LINEAR)]
    handles = [module.register_forward_pre_hook(keep(names[module])) for module in linear]
    with torch.no_grad():
        model(input_ids=blocks, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def to_nearest(wave: Wave) -> dict[str, Tensor]:
    return {name: dequantize(quantize(weight, GRID), GRID) for name, weight in wave.weights.items()}


def rounded(model: nn.Module) -> dict[str, Tensor]:
    """Rounds to nearest; what `calibrate` handed over as H."""
    seen = {}

    def rounding(wave: Wave) -> dict[str, Tensor]:
        for name, weight in wave.weights.items():
            assert weight.shape[1] == len(wave.second) and name not in seen
            seen[name] = wave.second.clone()
        return to_nearest(wave)

    calibrate(model, BLOCKS, rounding, 0.0)
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


def test_no_hook_is_left_and_no_text_is_refused(tmp_path: Path) -> None:
    model = twins.make(tmp_path, "llama")
    rounded(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(BadInput, match="calibration"):
        calibrate(model, BLOCKS[:0], lambda wave: wave.weights, 0.0)


# Whose outputs are added straight to the residual stream; in Gemma a norm lies between, in NeoX's parallel
# form the stream gets both branches at once.
WRITERS = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "opt": {"self_attn.out_proj", "fc2"},
    "gemma3_text": set(),
}


@pytest.mark.parametrize("form", WRITERS)
def test_the_residual_stream_is_found_by_value(tmp_path: Path, form: str) -> None:
    model = twins.make(tmp_path, form).eval()
    layers = decoder_layers(model)
    with torch.no_grad():
        call = layer_calls(model, layers, BLOCKS[0])[0]
        state = states_before(model, layers[0], BLOCKS[0])
        found = {
            name: residual_of(call, module, state)
            for name, module in layers[0].named_modules()
            if isinstance(module, LINEAR)
        }
    assert {name for name, source in found.items() if source is not None} == WRITERS[form]


def reads(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Module name -> its input [tokens, features], from one plain pass of the whole model."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[name] = args[0].reshape(-1, args[0].shape[-1]).double()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    with torch.no_grad():
        model(input_ids=BLOCKS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_correction_is_a_ridge_regression_on_what_the_unrounded_model_gives(
    tmp_path: Path, share: float
) -> None:
    model, plain = twins.make(tmp_path, "llama"), twins.make(tmp_path, "llama")
    wanted: dict[str, Tensor] = {}

    def rounding(wave: Wave) -> dict[str, Tensor]:
        wanted.update({name: weight.double() for name, weight in wave.weights.items()})
        return to_nearest(wave)

    calibrate(model, BLOCKS, rounding, share)
    layer = "model.layers.1."
    streams = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
    maps = ["self_attn.q_proj", "mlp.up_proj", *streams]
    names = [layer + name for name in [*maps, *streams.values()]]
    now, before = reads(model, names), reads(plain, names)
    for name in maps:
        x, x0 = now[layer + name], before[layer + name]
        weight = plain.get_submodule(layer + name).weight.detach().double()
        target = (x0 - x) @ weight.T
        if name in streams:
            target += before[layer + streams[name]] - now[layer + streams[name]]
        ridge = RIDGE * x.square().mean() * len(x)
        rows = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
        targets = torch.cat([target, torch.zeros(x.shape[1], len(weight), dtype=torch.float64)])
        change = torch.linalg.lstsq(rows, targets).solution.T
        moved = wanted[f"{layer}{name}.weight"] - weight
        assert moved.norm() > 0.01 * weight.norm()
        torch.testing.assert_close(moved, share * change, rtol=1e-3, atol=1e-3 * float(change.abs().max()))


def test_correction_leaves_the_first_maps_and_every_other_parameter_alone(tmp_path: Path) -> None:
    """Nothing was rounded before the first maps; and the unrounded weights are put back whole."""
    model, untouched = twins.make(tmp_path, "llama"), twins.make(tmp_path, "llama")
    held: dict[str, Tensor] = {}

    def rounding(wave: Wave) -> dict[str, Tensor]:
        for name, weight in wave.weights.items():
            assert held or torch.equal(weight, untouched.get_parameter(name))
        found = to_nearest(wave)
        held.update(found)
        return found

    calibrate(model, BLOCKS, rounding, 1.0)
    for name, parameter in model.named_parameters():
        expected = held[name] if name in held else untouched.get_parameter(name)
        assert torch.equal(parameter, expected)
    assert not any(module._forward_hooks for module in model.modules())
