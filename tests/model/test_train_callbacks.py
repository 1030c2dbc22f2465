"""NEFTune, embedding dropout, active forgetting: by their formulas, apart from the model's dropout."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training import Gradients, Interrupt, fit_tiny, flat, open_tiny
from transformers import TrainerCallback

from edgedisp.core.results import Training
from edgedisp.train.callbacks import TECHNIQUES, ActiveForgetting, EmbeddingDropout, NoisyEmbedding

BLOCKS = np.random.default_rng(0).integers(3, 400, (48, 12))
ARCHITECTURES = ["gemma3_text", "gpt2"]  # a scaled embedding, and one to which positions are added


def train(model: Any, folder: Path, callbacks: Any, **changes: Any) -> Training:
    options = {"precision": "fp32", "warmup": 0.0, "blocks": BLOCKS, "seed": 5, **changes}
    return fit_tiny(model, folder, callbacks=list(callbacks), **options)


class Seen(TrainerCallback):
    """What the embedding returns in each training pass, in step order."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hook = kwargs["model"].get_input_embeddings().register_forward_hook
        hook(lambda module, inputs, output: self.outputs.append(output.detach().clone()))


def changes_seen(
    folder: Path, callback: TrainerCallback, out: Path, **changes: Any
) -> list[tuple[Tensor, Tensor]]:
    """(what the embedding returns without the callback, with it) for each micro-batch; nothing is learnt."""
    runs = []
    for name, callbacks in (("plain", []), ("changed", [callback])):
        seen = Seen()
        train(open_tiny(folder), out / name, [*callbacks, seen], lr=1e-12, **changes)
        runs.append(seen.outputs)
    return list(zip(*runs, strict=True))


# ---------------------------------------------------------------- noise and dropout


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_noise_is_uniform_within_alpha_over_the_root_of_tokens_and_features(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    pairs = changes_seen(tiny_folder[architecture], NoisyEmbedding(5.0, 1), tmp_path)
    noise = torch.cat([after - before for before, after in pairs])
    bound = 5.0 / math.sqrt(noise.shape[1] * noise.shape[2])
    rounding = 1e-6 * float(pairs[0][0].abs().max())
    assert noise.abs().max() <= bound + rounding
    scaled = (noise.flatten() / bound).double()
    count = scaled.numel()  # the mean is 0 +- 1/sqrt(3 n), the square 1/3 +- 0.3/sqrt(n)
    assert abs(scaled.mean()) < 5 / math.sqrt(3 * count)
    assert abs(scaled.square().mean() - 1 / 3) < 5 * 0.3 / math.sqrt(count)
    assert abs(torch.corrcoef(noise.flatten(1)[:2])[0, 1]) < 5 / math.sqrt(noise[0].numel())


def test_dropout_zeroes_its_share_and_keeps_the_expectation(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    pairs = changes_seen(tiny_folder["llama"], EmbeddingDropout(0.25, 1), tmp_path)
    before, after = (torch.cat(part) for part in zip(*pairs))
    dropped = after == 0
    assert abs(dropped.double().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / dropped.numel())
    torch.testing.assert_close(after[~dropped], before[~dropped] / 0.75)


@pytest.mark.parametrize("callback", [NoisyEmbedding(5.0, 3), EmbeddingDropout(0.3, 3)])
def test_a_sequence_is_changed_alike_however_the_batch_is_cut(
    tiny_folder: dict[str, Path], tmp_path: Path, callback: TrainerCallback
) -> None:
    seen = []
    for batch, accumulate in ((4, 1), (1, 4)):
        options = {"steps": 3, "batch": batch, "accumulate": accumulate}
        changed = changes_seen(tiny_folder["llama"], callback, tmp_path / str(batch), **options)
        seen.append(torch.cat([after for _, after in changed]))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0][:4], seen[0][4:8])


@pytest.mark.parametrize("techniques", [{"embedding_dropout": 0.2}, {"active_forgetting": 2, "neftune": 5.0}])
def test_a_resumed_run_ends_with_the_same_weights(
    tiny_folder: dict[str, Path], tmp_path: Path, techniques: dict[str, float]
) -> None:
    def callbacks(seed: int) -> list[TrainerCallback]:
        return [TECHNIQUES[name](value, seed) for name, value in techniques.items()]

    whole, cut, other = (open_tiny(tiny_folder["gpt2"]) for _ in range(3))
    train(whole, tmp_path / "whole", callbacks(1))
    interrupted = [*callbacks(1), Interrupt(3)]
    with pytest.raises(KeyboardInterrupt):
        train(open_tiny(tiny_folder["gpt2"]), tmp_path / "cut", interrupted, checkpoint_every=2)
    again = train(cut, tmp_path / "cut", callbacks(1), checkpoint_every=2)
    assert again.resumed_from == 2 and torch.equal(flat(whole), flat(cut))
    train(other, tmp_path / "other", callbacks(2))
    assert not torch.equal(flat(whole), flat(other))


# ---------------------------------------------------------------- active forgetting


class Watch(TrainerCallback):
    """The embedding, the first layer's weight and the embedding's optimizer state after each step."""

    def __init__(self) -> None:
        self.embeddings: list[Tensor] = []
        self.moments: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weight = kwargs["model"].get_input_embeddings().weight
        self.embeddings.append(weight.detach().clone())
        self.moments.append(copy.deepcopy(kwargs["optimizer"].state[weight]))


@pytest.mark.parametrize(("every", "resets"), [(2, [2, 4]), (6, [])])
def test_resets_come_every_so_many_steps_but_never_last(
    tiny_folder: dict[str, Path], tmp_path: Path, every: int, resets: list[int]
) -> None:
    seen = Watch()
    train(open_tiny(tiny_folder["llama"]), tmp_path, [ActiveForgetting(every, 0), seen])
    fresh = [step for step, moment in enumerate(seen.moments, 1) if not moment["exp_avg"].any()]
    assert fresh == resets
    for step in resets:
        assert not seen.moments[step - 1]["exp_avg_sq"].any() and seen.moments[step - 1]["step"] == 0
    drawn = [seen.embeddings[step - 1] for step in resets]
    assert len(drawn) < 2 or not torch.equal(drawn[0], drawn[1])


def test_after_a_reset_the_embedding_takes_the_steps_of_an_adamw_of_its_own(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    """Second road: torch's AdamW on the embedding alone, at the schedule restarted for each stretch."""
    every, steps, rate = 3, 7, 1e-2
    gradients = Gradients()  # the embedding's come first
    seen = Watch()
    callbacks = [ActiveForgetting(every, 0), gradients, seen]
    train(open_tiny(tiny_folder["llama"]), tmp_path, callbacks, steps=steps, lr=rate, warmup=1 / steps)
    for start in (3, 6):
        weight = nn.Parameter(seen.embeddings[start - 1].clone())
        optimizer = torch.optim.AdamW([weight], lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
        length = min(every, steps - start)
        for step in range(start, min(start + every, steps)):
            done = (step - start) * steps / length  # steps of the whole run's schedule
            share = done if done < 1 else (1 + math.cos(math.pi * (done - 1) / (steps - 1))) / 2
            optimizer.param_groups[0]["lr"] = rate * share
            weight.grad = gradients.seen[step][: weight.numel()].view_as(weight)
            optimizer.step()
            if (step + 1) % every or step + 1 == steps:  # what follows the last step of a stretch is a reset
                torch.testing.assert_close(weight.detach(), seen.embeddings[step], rtol=1e-4, atol=1e-6)
