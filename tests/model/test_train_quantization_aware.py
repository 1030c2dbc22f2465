"""Quantization-aware training against a loop by hand; it starts late, resumes exactly, leaves the weights."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training import BLOCKS, Interrupt, fit_tiny, flat, open_tiny

from edgedisp.core.progress import silent
from edgedisp.pipeline.options import BundleRounding
from edgedisp.pipeline.rounding import SCALES, aware_callback
from edgedisp.quantize.calibration import CalibrationText, calibrated_start, gptq_model
from edgedisp.quantize.grid import Grid, dequantize, in_groups, quantize, round_to
from edgedisp.recipe import Adapter, QuantizeBits
from edgedisp.train.callbacks import QuantizationAware
from edgedisp.train.lora import attach
from edgedisp.train.quantized_weights import Rounding, round_weights, weights_of

LAYERS, OUTER = Grid(4, 16, False), Grid(8, 32, True)
FIRST_STEP: Any = SimpleNamespace(global_step=0, max_steps=4)


def nearest(name: str, weight: Tensor, grid: Grid) -> Tensor:
    return dequantize(quantize(weight, grid), grid)


ROUNDING: tuple[Rounding, Rounding] = (partial(nearest, grid=LAYERS), partial(nearest, grid=OUTER))


def aware(**options: Any) -> QuantizationAware:
    return QuantizationAware(*ROUNDING, **options)


def train(model: Any, folder: Path, **changes: Any) -> Any:
    return fit_tiny(model, folder, **{"steps": 4, "lr": 1e-2, "batch": 2, "precision": "fp32", **changes})


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


@pytest.mark.parametrize("stop", [3, 7])
def test_rounding_begins_late_and_a_resumed_run_continues_exactly(
    tiny_folder: dict[str, Path], tmp_path: Path, stop: int
) -> None:
    """Rounding begins in step 4: before or after the process that is stopped, which `begin` is told."""
    options = {"steps": 8, "checkpoint_every": 2}
    plain, whole, continued = (open_tiny(tiny_folder["llama"]) for _ in range(3))
    calls: list[bool] = []

    def callback() -> QuantizationAware:
        return aware(start=0.5, begin=lambda model, is_continued: calls.append(is_continued))

    unrounded = train(plain, tmp_path / "plain", **options)
    unbroken = train(whole, tmp_path / "whole", callbacks=[callback()], **options)
    same = [row["loss"] == other["loss"] for row, other in zip(unrounded.log, unbroken.log)]
    assert same == [True] * 4 + [False] * 4
    with pytest.raises(KeyboardInterrupt):
        interrupted = [callback(), Interrupt(stop)]
        train(open_tiny(tiny_folder["llama"]), tmp_path / "cut", callbacks=interrupted, **options)
    rest = train(continued, tmp_path / "cut", callbacks=[callback()], **options)
    assert rest.resumed_from == stop - 1 and calls == ([False, False] if stop == 3 else [False, False, True])
    assert torch.equal(flat(whole), flat(continued))
    assert [row["loss"] for row in unbroken.log] == [row["loss"] for row in rest.log]


def test_rank_0_writes_gptqs_scales_and_a_continued_run_reads_them_on_the_models_device(
    tiny_folder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounding = BundleRounding(4, QuantizeBits(method="gptq", group=16, calibration_tokens=256))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = open_tiny(tiny_folder["llama"]).to(device)

    def rounded(step: int) -> Tensor:
        state: Any = SimpleNamespace(global_step=step, max_steps=4)
        callback = aware_callback(rounding, 0.0, CalibrationText(BLOCKS), tmp_path, silent)
        callback.on_train_begin(None, state, None, model=model)
        callback.on_step_begin(None, state, None, model=model)
        weights = flat(model)
        callback.on_pre_optimizer_step(None, state, None)
        return weights

    monkeypatch.setenv("LOCAL_RANK", "1")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        model.load_state_dict(open_tiny(tiny_folder["llama"]).state_dict())
        calibrated = rounded(step=0)
        assert (tmp_path / SCALES).is_file() == (rank == "0")
    written = (tmp_path / SCALES).stat()
    assert torch.equal(rounded(step=2), calibrated) and (tmp_path / SCALES).stat() == written
    assert [*(tmp_path / "quantization").iterdir()] == [tmp_path / SCALES]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_with_lora_the_layers_compute_with_the_rounded_merged_weight(
    tiny_folder: dict[str, Path], architecture: str
) -> None:
    base = open_tiny(tiny_folder[architecture])
    adapted = attach(base, Adapter(kind="lora", rank=4), seed=0).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.05)
    ids = torch.from_numpy(BLOCKS[:2].astype(np.int64))
    merged = copy.deepcopy(adapted).merge_and_unload()
    plain = {weight.name for weight in weights_of(merged, *ROUNDING)}
    assert {weight.name for weight in weights_of(adapted, *ROUNDING)} == plain
    round_weights(merged, *ROUNDING)
    callback, before = aware(), flat(adapted).clone()
    callback.on_train_begin(None, FIRST_STEP, None, model=adapted)
    with torch.no_grad():
        callback.on_step_begin(None, FIRST_STEP, None)
        logits = adapted(input_ids=ids).logits
        callback.on_pre_optimizer_step(None, FIRST_STEP, None)
        torch.testing.assert_close(logits, merged(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
    assert torch.equal(flat(adapted), before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_calibrated_start_is_the_model_that_gptq_makes(
    tiny_folder: dict[str, Path], architecture: str
) -> None:
    started, calibrated = open_tiny(tiny_folder[architecture]), open_tiny(tiny_folder[architecture])
    text = CalibrationText(BLOCKS[:8])
    scales = calibrated_start(started, text, LAYERS)
    gptq_model(calibrated, text, LAYERS)

    def on_scales(name: str, weight: Tensor) -> Tensor:
        groups, columns = in_groups(weight, LAYERS.group), weight.shape[1]
        return dequantize(round_to(groups, scales[name], LAYERS, columns), LAYERS)

    latent = {weight.name: weight.parameter.clone() for weight in weights_of(started, *ROUNDING)}
    round_weights(started, on_scales, lambda name, weight: weight)
    moved = {
        weight.name
        for weight in weights_of(started, *ROUNDING)
        if not torch.equal(latent[weight.name], weight.parameter)
    }
    assert moved == set(scales)
    for name, value in calibrated.state_dict().items():
        torch.testing.assert_close(started.state_dict()[name], value, rtol=1e-5, atol=1e-6)
