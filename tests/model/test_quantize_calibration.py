"""A linear map is rounded under the inputs that it has in the quantized model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgedisp.core.errors import BadInput
from edgedisp.data.packing import PADDING, pack_rows
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.quantize import calibration
from edgedisp.quantize.calibration import LINEAR, RIDGE, CalibrationText, calibrate, layer_calls
from edgedisp.quantize.grid import Blocks, Grid, dequantize, quantize

GRID = Grid(4, 16, False)
BLOCKS = torch.randint(0, twins.VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
TEXT = CalibrationText(BLOCKS.numpy())


def inputs(model: nn.Module, names: Iterable[str], texts: Sequence[Tensor] = (BLOCKS,)) -> dict[str, Tensor]:
    """A second road: module name -> its input [tokens, features], from plain passes of the whole model over
    each of `texts`."""
    result: dict[str, Tensor] = {}
    modules = {model.get_submodule(name): name for name in names}

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        name, x = modules[module], args[0].reshape(-1, args[0].shape[-1]).double()
        result[name] = torch.cat([result[name], x]) if name in result else x

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    with torch.no_grad():
        for text in texts:
            model(input_ids=text, use_cache=False)
    for handle in handles:
        handle.remove()
    return result


def second_moments(model: nn.Module, texts: Sequence[Tensor] = (BLOCKS,)) -> dict[str, Tensor]:
    """Parameter name -> E[x x^T] of the inputs of every linear map of the layers."""
    layers = decoder_layers(model)
    linear = {module for module in layers.modules() if isinstance(module, LINEAR)}
    names = [name for name, module in model.named_modules() if module in linear]
    return {f"{name}.weight": (x.T @ x / len(x)).float() for name, x in inputs(model, names, texts).items()}


@dataclass
class Call:
    """What GPTQ was called with for a parameter, and what the parameter became."""

    weight: Tensor
    second: Tensor
    value: Tensor


def rounded(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, text: CalibrationText = TEXT
) -> dict[str, Call]:
    """`calibrate`, with rounding to nearest in the place of GPTQ."""
    calls = dict[str, Call]()

    def nearest(weights: dict[str, Tensor], second: Tensor, grid: Grid) -> dict[str, tuple[Blocks, Tensor]]:
        blocks = {name: quantize(weight, grid) for name, weight in weights.items()}
        for name, weight in weights.items():
            assert name not in calls
            calls[name] = Call(weight.clone(), second.clone(), dequantize(blocks[name], grid))
        return {name: (blocks[name], weight) for name, weight in weights.items()}

    monkeypatch.setattr(calibration, "_round", nearest)
    calibrate(model, text, GRID)
    return calls


@pytest.mark.parametrize("form", [*twins.FAMILIES, twins.UNTIED])
def test_maps_see_their_quantized_inputs(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = twins.make(tmp_path, form)
    before = second_moments(model)
    calls = rounded(model, monkeypatch)
    after = second_moments(model)
    assert calls and set(calls) == set(after)
    for name, call in calls.items():
        atol = 2e-4 * float(after[name].abs().max())
        torch.testing.assert_close(call.second, after[name], rtol=2e-3, atol=atol)
    last = list(calls)[-1]  # the quantized model is another one, or the test would say nothing
    assert not torch.allclose(before[last], after[last], rtol=1e-2)
    untouched = twins.make(tmp_path, form)
    for name, parameter in model.named_parameters():
        expected = calls[name].value if name in calls else untouched.get_parameter(name)
        assert torch.equal(parameter, expected) or torch.equal(parameter.mT, expected)  # Conv1D
    with pytest.raises(BadInput, match="calibration"):
        calibrate(model, TEXT[:0], GRID)


@pytest.mark.parametrize("form", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_rows_in_one_block_are_calibrated_on_as_if_each_stood_alone(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(2, twins.VOCABULARY, length, np.uint32) for length in (30, 7, 12, 25, 18)]
    targets = [(ids, np.ones(len(ids), bool)) for ids in rows]
    text = CalibrationText(*pack_rows(targets, range(len(rows)), 40, padding=1))
    assert len(text.tokens) == 3 and (text.marks & PADDING != 0).any()
    model = twins.make(tmp_path, form)
    calls = rounded(model, monkeypatch, text)
    after = second_moments(model, [torch.from_numpy(ids.astype(np.int64))[None] for ids in rows])
    for name, call in calls.items():
        atol = 2e-4 * float(after[name].abs().max())
        torch.testing.assert_close(call.second, after[name], rtol=2e-3, atol=atol)


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
        calls, states = layer_calls(model, layers, TEXT[:1])
        waves = calls[0].waves(states)
    names = {module: name for name, module in layers[0].named_modules()}
    assert sum(len(modules) for modules, _ in waves) == sum(isinstance(module, LINEAR) for module in names)
    assert {names[modules[0]] for modules, stream in waves if stream is not None} == WRITERS[form]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_correction_is_a_ridge_regression_on_what_the_unrounded_model_gives(
    tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = twins.make(tmp_path, "llama"), twins.make(tmp_path, "llama")
    monkeypatch.setattr(calibration, "CORRECTION", share)
    corrected = rounded(model, monkeypatch)
    layer = "model.layers.1."
    streams = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
    maps = ["self_attn.q_proj", "mlp.up_proj", *streams]
    names = [layer + name for name in [*maps, *streams.values()]]
    now, before = inputs(model, names), inputs(plain, names)
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
        moved = corrected[f"{layer}{name}.weight"].weight.double() - weight
        assert moved.norm() > 0.01 * weight.norm()
        torch.testing.assert_close(moved, share * change, rtol=1e-3, atol=1e-3 * float(change.abs().max()))
