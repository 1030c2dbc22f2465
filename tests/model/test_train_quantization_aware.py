"""Quantization-aware training against a loop by hand; it starts late, resumes exactly, leaves the weights."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training import Interrupt, fit_tiny, open_tiny

from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.quantize.calibration import calibrated_start, gptq_model
from edgedisp.quantize.grid import Grid, dequantize, in_groups, quantize, round_to
from edgedisp.recipe import Adapter
from edgedisp.train.callbacks import QuantizationAware
from edgedisp.train.lora import attach
from edgedisp.train.quantized_weights import Rounding, round_weights, weights_of

BLOCKS = np.random.default_rng(0).integers(3, 300, (48, 16)).astype(np.uint32)
LAYERS, OUTER = Grid(4, 16, False), Grid(8, 32, True)


def nearest(name: str, weight: Tensor, grid: Grid) -> Tensor:
    return dequantize(quantize(weight, grid), grid)


ROUNDING: tuple[Rounding, Rounding] = (partial(nearest, grid=LAYERS), partial(nearest, grid=OUTER))


def aware(**options: Any) -> QuantizationAware:
    return QuantizationAware(*ROUNDING, **options)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def train(model: Any, folder: Path, **changes: Any) -> Any:
    defaults = {"steps": 4, "lr": 1e-2, "batch": 2, "precision": "fp32", "blocks": BLOCKS}
    return fit_tiny(model, folder, **{**defaults, **changes})


def by_hand(model: Any, steps: int) -> Any:
    """A plain loop: gradients of a rounded copy, given to AdamW on the model itself."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(steps):
        rounded = copy.deepcopy(model)
        round_weights(rounded, *ROUNDING)
        ids = torch.from_numpy(BLOCKS[2 * step : 2 * step + 2].astype(np.int64))
        rounded(input_ids=ids, labels=ids).loss.backward()
        for parameter, other in zip(model.parameters(), rounded.parameters()):
            parameter.grad = other.grad
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_weights_get_the_gradient_of_the_rounded_ones(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    trained, reference = open_tiny(tiny_folder[architecture]), open_tiny(tiny_folder[architecture])
    for module in (trained, reference):
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # GPT-2's; the two loops draw from other streams
    train(trained, tmp_path, schedule="constant", warmup=0.0, steps=2, callbacks=[aware()])
    by_hand(reference.train(), 2)
    for name, value in trained.state_dict().items():
        if name.endswith("c_attn.bias"):
            continue  # that of the keys has no gradient but noise, which Adam makes large
        # A weight that lies on the border of two cells may fall to either side in the last bit.
        difference = (value - reference.state_dict()[name]).abs()
        assert (difference > 1e-4).float().mean() < 5e-3, name


def test_before_its_start_nothing_is_rounded(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    logs = [
        train(open_tiny(tiny_folder["llama"]), tmp_path / name, steps=6, callbacks=callbacks).log
        for name, callbacks in (("plain", []), ("late", [aware(start=0.5)]))
    ]
    same = [plain["loss"] == late["loss"] for plain, late in zip(*logs)]
    assert same == [True, True, True, False, False, False]


@pytest.mark.parametrize("stop", [3, 7])
def test_a_resumed_run_continues_exactly(tiny_folder: dict[str, Path], tmp_path: Path, stop: int) -> None:
    """Rounding begins in step 4: before or after the process that is stopped, which `begin` is told."""
    options = {"steps": 8, "checkpoint_every": 2}
    whole, continued = open_tiny(tiny_folder["llama"]), open_tiny(tiny_folder["llama"])
    begun: list[bool] = []

    def callback() -> QuantizationAware:
        return aware(start=0.5, begin=lambda model, is_continued: begun.append(is_continued))

    unbroken = train(whole, tmp_path / "whole", callbacks=[callback()], **options)
    with pytest.raises(KeyboardInterrupt):
        interrupted = [callback(), Interrupt(stop)]
        train(open_tiny(tiny_folder["llama"]), tmp_path / "cut", callbacks=interrupted, **options)
    rest = train(continued, tmp_path / "cut", callbacks=[callback()], **options)
    assert rest.resumed_from == stop - 1 and begun == ([False, False] if stop == 3 else [False, False, True])
    check_equal(state(whole), state(continued))
    assert [row["loss"] for row in unbroken.log] == [row["loss"] for row in rest.log]


def test_a_training_that_raised_leaves_the_weights_themselves(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    model = open_tiny(tiny_folder["llama"])
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, callbacks=[aware(), Interrupt()])
    check_equal(state(model), before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_with_lora_the_layers_compute_with_the_rounded_merged_weight(
    tiny_folder: dict[str, Path], architecture: str
) -> None:
    base = open_tiny(tiny_folder[architecture])
    adapted = attach(base, decoder_layers(base), Adapter(kind="lora", rank=4), seed=0).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.05)
    ids = torch.from_numpy(BLOCKS[:2].astype(np.int64))
    merged = copy.deepcopy(adapted).merge_and_unload()
    round_weights(merged, *ROUNDING)
    callback = aware()
    callback.on_train_begin(None, _State(), None, model=adapted)
    plain = state(adapted)
    with torch.no_grad():
        callback.on_step_begin(None, _State(), None)
        found = adapted(input_ids=ids).logits
        callback.on_pre_optimizer_step(None, _State(), None)
        expected = merged(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    check_equal(state(adapted), plain)
    assert not any(".base_layer" in weight.name or "lora" in weight.name for weight in callback._weights)


class _State:
    global_step, max_steps = 0, 4


def test_what_cannot_be_rounded_in_training_is_refused(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    base = open_tiny(tiny_folder["llama"])
    adapted = attach(base, decoder_layers(base), Adapter(kind="lora", rank=4, dropout=0.1), seed=0)
    with pytest.raises(ValueError, match="dropout"):
        train(adapted, tmp_path, callbacks=[aware()])
    half = open_tiny(tiny_folder["llama"]).bfloat16()
    with pytest.raises(ValueError, match="bfloat16"):
        aware().on_train_begin(None, _State(), None, model=half)


def test_a_calibrated_start_is_the_model_that_gptq_makes(tiny_folder: dict[str, Path]) -> None:
    for architecture in ("llama", "gpt2"):
        started, calibrated = open_tiny(tiny_folder[architecture]), open_tiny(tiny_folder[architecture])
        scales = calibrated_start(started, BLOCKS[:8], lambda name: LAYERS)
        gptq_model(calibrated, BLOCKS[:8], LAYERS)

        def body(name: str, weight: Tensor, scales: Any = scales) -> Tensor:
            values = in_groups(weight, LAYERS.group)
            return dequantize(
                round_to(values, scales[name].scales, scales[name].zero_points, LAYERS, weight.shape[1]),
                LAYERS,
            )

        latent = {weight.name: weight.parameter.clone() for weight in weights_of(started, *ROUNDING)}
        round_weights(started, body, lambda name, weight: weight)
        moved = [
            not torch.equal(latent[weight.name], weight.parameter)
            for weight in weights_of(started, *ROUNDING)
        ]
        assert sum(moved) == len(scales)
        for name, value in calibrated.state_dict().items():
            torch.testing.assert_close(started.state_dict()[name], value, rtol=1e-5, atol=1e-6)
