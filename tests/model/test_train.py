"""Training: the twin is fair, the optimisation is the configured one, failures stop it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import BLOCKS, Gradients, fit_tiny, flat, open_tiny
from transformers.trainer_callback import TrainerCallback

from edgedisp.core.errors import NotFinite
from edgedisp.dispersion.losses import DispersionConfig
from edgedisp.train.trainer import newest_checkpoint


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_weight_zero_gives_bit_identical_weights_to_dispersion_off(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str, precision: str
) -> None:
    # GPT-2 has dropout: it would see the difference if dispersion drew from the global random stream.
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    weights = {}
    for name, weight in (("off", None), ("zero", 0.0), ("on", 0.5), ("again", 0.5)):
        model = open_tiny(tiny_folder[architecture])
        term = None if weight is None else DispersionConfig(weight=weight, tokens=8)
        fit_tiny(model, tmp_path / name, precision=precision, dispersion=term)
        weights[name] = flat(model)
        assert model.config.use_cache and weights[name].dtype == torch.float32
    assert torch.equal(weights["off"], weights["zero"])
    assert torch.equal(weights["on"], weights["again"])
    assert not torch.equal(weights["off"], weights["on"])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_gradient_checkpointing_changes_no_gradient(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    plain, checkpointed = Gradients(), Gradients()
    for name, gradients in (("plain", plain), ("checkpointed", checkpointed)):
        options = {"dispersion": DispersionConfig(weight=2.0, tokens=8), "steps": 1, "precision": "fp32"}
        options |= {"callbacks": [gradients], "gradient_checkpointing": gradients is checkpointed}
        fit_tiny(open_tiny(tiny_folder["llama"]), tmp_path / name, **options)
    torch.testing.assert_close(checkpointed.seen, plain.seen, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_logged_loss_is_the_plain_cross_entropy(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    model = open_tiny(tiny_folder[architecture])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # GPT-2's
    ids = torch.from_numpy(BLOCKS[:4].astype(np.int64))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    term = DispersionConfig(weight=5.0)
    result = fit_tiny(model, tmp_path, steps=1, lr=1e-12, warmup=0, precision="fp32", dispersion=term)
    assert result.chunked_cross_entropy
    assert result.log[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_second_training_of_one_model_is_in_its_own_precision(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    model = open_tiny(tiny_folder["llama"])
    fit_tiny(model, tmp_path / "first", steps=2, precision="fp32")
    fresh = open_tiny(tiny_folder["llama"])
    fresh.load_state_dict(model.state_dict())
    logs = [fit_tiny(each, tmp_path / name, steps=2).log for name, each in (("a", model), ("b", fresh))]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    plain = open_tiny(tiny_folder["llama"]).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        ids = torch.arange(3, 19)[None]
        assert torch.equal(model(ids).logits, plain(ids).logits)  # in float32 afterwards


class Decay(TrainerCallback):
    """The weight decay of each parameter, by its id."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        groups = kwargs["optimizer"].param_groups
        self.of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_weight_decay_leaves_norms_and_biases_alone_and_the_gradient_is_clipped(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    decay, gradients = Decay(), Gradients()
    model = open_tiny(tiny_folder[architecture])
    options = {"weight_decay": 0.3, "clip": 0.5, "callbacks": [decay, gradients]}
    result = fit_tiny(model, tmp_path, steps=3, **options)
    assert decay.of == {id(p): 0.3 if p.dim() > 1 else 0.0 for p in model.parameters()}
    assert min(row["grad_norm"] for row in result.log) > 0.5  # before clipping
    assert [float(gradient.norm()) for gradient in gradients.seen] == pytest.approx([0.5] * 3, rel=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_follows_its_schedule(
    tiny_folder: dict[str, Path], tmp_path: Path, schedule: str
) -> None:
    steps, warm = 10, 4
    options = {"steps": steps, "batch": 1, "warmup": warm / steps, "schedule": schedule, "lr": 0.5}
    result = fit_tiny(open_tiny(tiny_folder["llama"]), tmp_path, **options)

    def share(step: int) -> float:  # of the peak
        if step < warm:
            return step / warm
        gone = (step - warm) / (steps - warm)
        return {"cosine": (1 + math.cos(math.pi * gone)) / 2, "linear": 1 - gone, "constant": 1.0}[schedule]

    assert [row["lr"] for row in result.log] == pytest.approx([0.5 * share(step) for step in range(steps)])


def test_the_token_budget_is_read_block_by_block_in_order(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    inputs: list[torch.Tensor] = []
    model = open_tiny(tiny_folder["llama"])
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    result = fit_tiny(model, tmp_path, steps=3, batch=2, accumulate=2)
    blocks = [ids for ids in inputs if ids.shape[1] == BLOCKS.shape[1]]  # others probe the model's logits
    assert torch.equal(torch.cat(blocks), torch.from_numpy(BLOCKS[:12].astype(np.int64)))
    assert result.tokens == 12 * BLOCKS.shape[1]
    with pytest.raises(ValueError, match="need 400 blocks of tokens, 64 were given"):
        fit_tiny(model, tmp_path, steps=100)


class Spoil(TrainerCallback):
    """Puts a NaN into one weight before a step, as a hardware fault or an overflow would."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            with torch.no_grad():
                kwargs["model"].model.layers[1].mlp.up_proj.weight[0, 0] = math.nan


@pytest.mark.parametrize("dispersion", [DispersionConfig(tokens=8), None], ids=["dispersed", "baseline"])
def test_a_loss_that_is_nan_stops_training_and_keeps_the_last_checkpoint(
    tiny_folder: dict[str, Path], tmp_path: Path, dispersion: DispersionConfig | None
) -> None:
    options = {"steps": 8, "checkpoint_every": 2, "dispersion": dispersion}
    with pytest.raises(NotFinite) as stopped:
        fit_tiny(open_tiny(tiny_folder["llama"]), tmp_path, callbacks=[Spoil()], **options)
    message = str(stopped.value)
    assert "in step 6" in message and "cross-entropy is nan" in message
    assert ("the dispersion loss is nan at layer 1 (of 2 watched)" in message) == (dispersion is not None)
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-4'}" in message
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert fit_tiny(open_tiny(tiny_folder["llama"]), tmp_path, **options).resumed_from == 4


def test_a_gradient_that_is_not_finite_stops_training_before_a_weight_is_changed(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    model = open_tiny(tiny_folder["llama"])
    before = flat(model).clone()
    model.model.norm.weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    with pytest.raises(NotFinite, match=r"in step 1: the norm of the gradient is inf.* no checkpoint yet"):
        fit_tiny(model, tmp_path)
    assert torch.equal(flat(model), before)
