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

BLOCKS = torch.randint(3, 400, (3, 20), generator=torch.Generator().manual_seed(5))


def run(folder: Path, output_dir: Path, every: int | None, **options: Any) -> tuple[Any, Training]:
    model = open_tiny(folder)
    if every is not None:
        options |= {"watch_blocks": BLOCKS, "watch_every": every}
    term = DispersionConfig(tokens=8)
    return model, fit_tiny(model, output_dir, checkpoint_every=3, dispersion=term, **options)


def test_a_watch_leaves_the_weights_alone_and_a_resumed_run_has_its_rows(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    folder = tiny_folder["gpt2"]  # its dropout draws from the global random stream
    plain, _ = run(folder, tmp_path / "plain", None)
    watched, whole = run(folder, tmp_path / "whole", 2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", 2, callbacks=[Interrupt(4)])
    continued, resumed = run(folder, tmp_path / "cut", 2)
    assert resumed.resumed_from == 3
    assert torch.equal(flat(plain), flat(watched)) and torch.equal(flat(plain), flat(continued))
    assert [row["step"] for row in whole.watched] == [0, 2, 4, 6]
    for row, expected in zip(resumed.watched, whole.watched, strict=True):
        assert {**row, "seconds": 0} == {**expected, "seconds": 0}
    assert 0 < whole.watch_seconds < whole.seconds
    for row, model in ((whole.watched[0], open_tiny(folder).eval()), (whole.watched[-1], watched)):
        # During the run the forward pass is autocast to bf16.
        assert row["cosine_by_layer"] == pytest.approx(quick_condensation(model, BLOCKS), abs=0.02)


def test_tensorboard_holds_the_losses_and_the_watched_figures(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"report_to": ("tensorboard",), "log_dir": tmp_path / "logs", "run_name": "run/dispersed"}
    _, result = run(tiny_folder["llama"], tmp_path / "checkpoints", 3, **options)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()

    def scalars(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(f"train/{tag}")}

    for tag, name in (("cross_entropy", "loss"), ("dispersion", "dispersion"), ("grad_norm", "grad_norm")):
        assert scalars(tag) == pytest.approx({row["step"]: row[name] for row in result.log}, rel=1e-5)
    total = {row["step"]: row["loss"] + 0.1 * row["dispersion"] for row in result.log}
    assert scalars("loss") == pytest.approx(total, rel=1e-4)
    assert set(scalars("cosine_by_layer/mean")) == {3, 6}
    for layer in range(3):
        expected = {row["step"]: row["cosine_by_layer"][layer] for row in result.watched[1:]}
        assert scalars(f"cosine_by_layer/{layer:02d}") == pytest.approx(expected, rel=1e-5)
