"""Condensation watched as a model trains: the right figures, and a run that does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import Interrupt, fit_tiny, flat, open_tiny

from edgedisp.core.results import Training
from edgedisp.dispersion.condensation import quick_condensation
from edgedisp.dispersion.losses import DispersionConfig
from edgedisp.train.dispersion_trainer import CondensationWatch

BLOCKS = torch.randint(3, 400, (3, 20), generator=torch.Generator().manual_seed(5))


def run(
    folder: Path, output_dir: Path, watch: CondensationWatch | None, **options: Any
) -> tuple[Any, Training]:
    model = open_tiny(folder)
    term = DispersionConfig(tokens=8)
    return model, fit_tiny(model, output_dir, checkpoint_every=3, dispersion=term, watch=watch, **options)


def watching(every: int) -> CondensationWatch:
    return CondensationWatch(BLOCKS, every)


# GPT-2 has dropout, which draws from the global random stream.
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_weights_are_bit_identical_with_and_without_a_watch(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    folder = tiny_folder[architecture]
    plain, _ = run(folder, tmp_path / "plain", None)
    watched, result = run(folder, tmp_path / "watched", watching(2))
    assert torch.equal(flat(plain), flat(watched))
    assert [row["step"] for row in result.watched] == [0, 2, 4, 6]


def test_the_rows_tell_the_model_as_it_was_at_their_step(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    before = quick_condensation(open_tiny(tiny_folder["llama"]).eval(), BLOCKS)
    model, result = run(tiny_folder["llama"], tmp_path, watching(4))
    assert [row["step"] for row in result.watched] == [0, 4, 6]
    for row, expected in (
        (result.watched[0], before),
        (result.watched[-1], quick_condensation(model, BLOCKS)),
    ):
        # During the run the forward pass is autocast to bf16.
        assert row["cosine_by_layer"] == pytest.approx(expected, abs=0.02)
    assert 0 < result.watch_seconds < result.seconds


def test_a_resumed_run_has_the_rows_of_the_whole(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    _, whole = run(tiny_folder["llama"], tmp_path / "whole", watching(2))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder["llama"], tmp_path / "cut", watching(2), callbacks=[Interrupt(4)])
    _, resumed = run(tiny_folder["llama"], tmp_path / "cut", watching(2))
    assert resumed.resumed_from == 3
    for row, expected in zip(resumed.watched, whole.watched, strict=True):
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}


def test_tensorboard_holds_the_losses_and_the_watched_figures(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "logs"
    options = {"report_to": ("tensorboard",), "log_dir": logs, "run_name": "run/dispersed"}
    _, result = run(tiny_folder["llama"], tmp_path / "c", watching(3), **options)
    events = EventAccumulator(str(logs))
    events.Reload()
    scalars = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    for tag, name in (("cross_entropy", "loss"), ("dispersion", "dispersion"), ("grad_norm", "grad_norm")):
        assert scalars[f"train/{tag}"] == [
            (row["step"], pytest.approx(row[name], rel=1e-5)) for row in result.log
        ]
    total = [row["loss"] + 0.1 * row["dispersion"] for row in result.log]  # type: ignore[operator]
    assert [value for _, value in scalars["train/loss"]] == pytest.approx(total, rel=1e-4)
    assert [step for step, _ in scalars["train/cosine_by_layer/mean"]] == [3, 6]
    for layer in range(3):
        expected = [row["cosine_by_layer"][layer] for row in result.watched[1:]]
        values = [value for _, value in scalars[f"train/cosine_by_layer/{layer:02d}"]]
        assert values == pytest.approx(expected, rel=1e-5)
