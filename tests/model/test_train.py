"""Training: the twin is fair, the optimisation is the one that was asked for, what goes wrong stops it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from edgedisp.core.errors import BuildFailed
from edgedisp.dispersion.config import DispersionConfig
from edgedisp.train.memory import recompute_activations
from edgedisp.train.mixin import NotFinite
from edgedisp.train.trainer import Fit, TrainSettings, fit, last_checkpoint

BLOCKS = np.random.default_rng(0).integers(3, 400, (64, 24)).astype(np.uint32)
ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_neox"]


def open_tiny(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def settings_of(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"steps": 6, "lr": 1e-3, "batch": 4, **changes})


def trained(
    folder: Path, checkpoints: Path, dispersion: DispersionConfig | None, **changes: object
) -> torch.Tensor:
    model = open_tiny(folder)
    fit(model, BLOCKS, settings_of(**changes), checkpoints=checkpoints, dispersion=dispersion)
    return flat(model)


class Kept(TrainerCallback):
    """Keeps copies of what only callbacks see."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.decay: dict[str, float] = {}
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        named = dict(known["model"].named_parameters())
        self.gradients.append({name: one.grad.clone() for name, one in named.items() if one.grad is not None})
        total = torch.stack([gradient.norm() for gradient in self.gradients[-1].values()]).norm()
        self.norms.append(float(total))
        for group in known["optimizer"].param_groups:
            for name, one in named.items():
                if any(one is held for held in group["params"]):
                    self.decay[name] = group["weight_decay"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_weight_zero_gives_bit_identical_weights_to_dispersion_off(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str, precision: str
) -> None:
    # GPT-2 has dropout: it would see the difference if dispersion drew from the global random stream.
    folder = tiny_folder[architecture]
    off = trained(folder, tmp_path / "off", None, precision=precision)
    zero = trained(folder, tmp_path / "zero", DispersionConfig(weight=0.0, tokens=8), precision=precision)
    on = trained(folder, tmp_path / "on", DispersionConfig(weight=0.5, tokens=8), precision=precision)
    assert torch.equal(off, zero)
    assert not torch.equal(off, on)


def test_the_same_settings_give_the_same_weights(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    runs = [trained(tiny_folder["gpt2"], tmp_path / str(i), DispersionConfig(tokens=8)) for i in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("tokens", [None, 8])
def test_accumulated_micro_batches_are_one_big_batch(
    tiny_folder: dict[str, Path], tmp_path: Path, tokens: int | None
) -> None:
    # The norm is of plain gradients: AdamW's first step would hide their scale.
    norms, weights = [], []
    for batch, accumulate in ((8, 1), (2, 4)):
        settings = settings_of(steps=2, batch=batch, accumulate=accumulate, warmup=0, precision="fp32")
        model = open_tiny(tiny_folder["llama"])
        done = fit(
            model,
            BLOCKS,
            settings,
            checkpoints=tmp_path / f"{batch}",
            dispersion=DispersionConfig(weight=0.7, tokens=tokens),
        )
        norms.append([(row["loss"], row["dispersion"], row["grad_norm"]) for row in done.log])
        weights.append(flat(model))
    np.testing.assert_allclose(norms[0], norms[1], rtol=2e-5)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-5)


def test_gradient_checkpointing_changes_no_gradient(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    runs = []
    for on in (False, True):
        kept = Kept()
        settings = settings_of(steps=1, precision="fp32", gradient_checkpointing=on)
        fit(
            open_tiny(tiny_folder["llama"]),
            BLOCKS,
            settings,
            checkpoints=tmp_path / str(on),
            dispersion=DispersionConfig(weight=2.0, tokens=8),
            callbacks=[kept],
        )
        runs.append(kept.gradients[0])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("came_with", [False, True])
def test_a_model_recomputes_its_activations_after_training_as_it_did_before(
    tiny_folder: dict[str, Path], tmp_path: Path, came_with: bool, raises: bool
) -> None:
    class Failing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            if raises:
                raise KeyboardInterrupt

    def state(model: Any) -> list[Any]:
        """Each module's flag and function, and the hooks on it."""
        names = ("gradient_checkpointing", "_gradient_checkpointing_func")
        modules = list(model.modules())
        told = [tuple(getattr(module, name, None) for name in names) for module in modules]
        return [*told, *(dict(module._forward_hooks) for module in modules)]

    model = open_tiny(tiny_folder["llama"])
    if came_with:
        recompute_activations(model)
    before = state(model)
    settings = settings_of(steps=1, gradient_checkpointing=True)
    with pytest.raises(KeyboardInterrupt) if raises else nullcontext():
        fit(model, BLOCKS, settings, checkpoints=tmp_path, callbacks=[Failing()])
    assert state(model) == before
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == came_with
    assert bool(model.get_input_embeddings()._forward_hooks) == came_with


def test_training_leaves_the_cache_of_generation_on(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    model = open_tiny(tiny_folder["llama"])
    fit(model, BLOCKS, settings_of(steps=1), checkpoints=tmp_path)
    assert model.config.use_cache


@pytest.mark.parametrize("fused_head", [True, False])
def test_logged_loss_is_the_plain_cross_entropy(
    tiny_folder: dict[str, Path], tmp_path: Path, fused_head: bool
) -> None:
    model = open_tiny(tiny_folder["llama"])
    ids = torch.from_numpy(BLOCKS[:4].astype(np.int64))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    settings = settings_of(steps=1, lr=0.0, warmup=0, precision="fp32", fused_head=fused_head)
    done = fit(model, BLOCKS, settings, checkpoints=tmp_path, dispersion=DispersionConfig(weight=5.0))
    assert done.fused_head == fused_head
    assert done.log[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_run_is_the_same_with_and_without_the_fused_head(
    tiny_folder: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    logs = []
    for fused_head in (True, False):
        settings = settings_of(steps=8, precision=precision, fused_head=fused_head)
        folder = tmp_path / str(fused_head)
        logs.append(fit(open_tiny(tiny_folder["qwen3"]), BLOCKS, settings, checkpoints=folder).log)
    losses = [[row["loss"] for row in log] for log in logs]
    np.testing.assert_allclose(*losses, rtol=1e-5 if precision == "fp32" else 5e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_weights_stay_float32_in_either_precision(
    tiny_folder: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    kept = Kept()
    model = open_tiny(tiny_folder["llama"])
    fit(model, BLOCKS, settings_of(steps=1, precision=precision), checkpoints=tmp_path, callbacks=[kept])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in kept.gradients[0].values()} == {torch.float32}


def test_a_model_trained_in_bf16_computes_in_float32_afterwards(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    model = open_tiny(tiny_folder["llama"])
    fit(model, BLOCKS, settings_of(steps=2, precision="bf16"), checkpoints=tmp_path)
    fresh = open_tiny(tiny_folder["llama"]).eval()
    fresh.load_state_dict(model.state_dict())
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)
    assert "forward" not in vars(model)


def test_a_second_training_of_one_model_is_in_its_own_precision(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    model = open_tiny(tiny_folder["llama"])
    fit(model, BLOCKS, settings_of(steps=2, precision="fp32"), checkpoints=tmp_path / "first")
    fresh = open_tiny(tiny_folder["llama"])
    fresh.load_state_dict(model.state_dict())
    losses = {}
    for name, each in (("again", model), ("fresh", fresh)):
        log = fit(each, BLOCKS, settings_of(steps=2, precision="bf16"), checkpoints=tmp_path / name).log
        losses[name] = [row["loss"] for row in log]
    assert losses["again"] == losses["fresh"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weight_decay_leaves_norms_and_biases_alone(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    kept = Kept()
    model = open_tiny(tiny_folder[architecture])
    settings = settings_of(steps=1, weight_decay=0.3)
    fit(model, BLOCKS, settings, checkpoints=tmp_path, callbacks=[kept])
    assert set(kept.decay) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert kept.decay[name] == (0.3 if parameter.dim() > 1 else 0.0), name


def test_the_gradient_is_clipped_to_its_norm(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    kept = Kept()
    settings = settings_of(steps=3, clip=0.5)
    done = fit(open_tiny(tiny_folder["llama"]), BLOCKS, settings, checkpoints=tmp_path, callbacks=[kept])
    assert min(row["grad_norm"] or 0 for row in done.log) > 0.5  # as it was before
    assert kept.norms == pytest.approx([0.5] * 3, rel=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_follows_its_schedule(
    tiny_folder: dict[str, Path], tmp_path: Path, schedule: str
) -> None:
    steps, warm = 10, 4
    settings = settings_of(steps=steps, batch=1, warmup=warm / steps, schedule=schedule, lr=0.5)
    done = fit(open_tiny(tiny_folder["llama"]), BLOCKS, settings, checkpoints=tmp_path)

    def share(step: int) -> float:  # of the peak, in the update that is counted from 0
        if step < warm:
            return step / warm
        gone = (step - warm) / (steps - warm)
        return {"cosine": (1 + math.cos(math.pi * gone)) / 2, "linear": 1 - gone, "constant": 1.0}[schedule]

    assert [row["lr"] for row in done.log] == pytest.approx([0.5 * share(step) for step in range(steps)])


def test_the_token_budget_is_read_block_by_block_in_the_order_given(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    seen: list[torch.Tensor] = []
    model = open_tiny(tiny_folder["llama"])
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0]))
    settings = settings_of(steps=3, batch=2, accumulate=2, fused_head=False)
    done = fit(model, BLOCKS, settings, checkpoints=tmp_path)
    assert torch.equal(torch.cat(seen), torch.from_numpy(BLOCKS[:12].astype(np.int64)))
    assert done.tokens == 12 * BLOCKS.shape[1]


def test_training_leaves_the_global_random_streams_as_they_were(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    trained(tiny_folder["gpt2"], tmp_path, DispersionConfig(tokens=8), steps=1)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_too_few_blocks_are_refused(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    settings = TrainSettings(steps=100, lr=1e-3)
    with pytest.raises(ValueError, match="need 400 blocks of tokens, 64 were given"):
        fit(open_tiny(tiny_folder["llama"]), BLOCKS, settings, checkpoints=tmp_path)


class Spoil(TrainerCallback):
    """Puts a NaN into one weight before a step, as a hardware fault or an overflow would."""

    def __init__(self, step: int, layer: int) -> None:
        self._step, self._layer = step, layer  # a fault is not part of what the run is

    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if state.global_step == self._step:
            with torch.no_grad():
                known["model"].model.layers[self._layer].mlp.up_proj.weight[0, 0] = math.nan


@pytest.mark.parametrize("dispersion", [DispersionConfig(tokens=8), None], ids=["dispersed", "baseline"])
def test_a_loss_that_is_nan_stops_training_and_keeps_the_last_checkpoint(
    tiny_folder: dict[str, Path], tmp_path: Path, dispersion: DispersionConfig | None
) -> None:
    def run(spoil: list[TrainerCallback]) -> Fit:
        settings = settings_of(steps=8, checkpoint_every=2)
        model = open_tiny(tiny_folder["llama"])
        return fit(model, BLOCKS, settings, checkpoints=tmp_path, dispersion=dispersion, callbacks=spoil)

    with pytest.raises(NotFinite) as stopped:
        run([Spoil(step=5, layer=1)])
    words = str(stopped.value)
    assert isinstance(stopped.value, BuildFailed)
    assert "in step 6" in words and "cross-entropy is nan" in words
    assert ("the dispersion loss is nan at layer 1 (of 2 watched)" in words) == (dispersion is not None)
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-4'}" in words
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    # A run of the same kind goes on from there.
    assert run([Spoil(step=99, layer=0)]).resumed_from == 4


def test_a_gradient_that_is_not_finite_stops_training_before_a_weight_is_changed(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    model = open_tiny(tiny_folder["llama"])
    before = flat(model).clone()
    norm = model.model.norm.weight
    norm.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    with pytest.raises(NotFinite, match=r"in step 1: the norm of the gradient is inf.* no checkpoint yet"):
        fit(model, BLOCKS, settings_of(), checkpoints=tmp_path)
    assert torch.equal(flat(model), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_too_a_nan_stops_before_a_weight_is_changed(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    model = open_tiny(tiny_folder["llama"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    before = flat(model).clone()
    with pytest.raises(NotFinite, match="in step 1: the dispersion loss is nan at layer 1"):
        fit(model, BLOCKS, settings_of(), checkpoints=tmp_path, dispersion=DispersionConfig(tokens=8))
    assert torch.equal(flat(model).cpu().nan_to_num(9.0), before.nan_to_num(9.0))
