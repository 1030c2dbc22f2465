"""The training stage: what a recipe says about packing and watching arrives in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import open_tiny

from edgedisp.core.progress import silent
from edgedisp.pipeline import build_plan, prepare, training
from edgedisp.pipeline.stage import Inputs
from edgedisp.recipe import Train, load
from edgedisp.train.performance import time_steps
from edgedisp.train.trainer import PackedDataset

RECIPE = """\
name: tiny
model: {{base: {base}, architecture: llama}}
data: {{train: [{{source: {text}}}], heldout: 20%, context: 256, isolate_documents: {isolate}}}
train: {{tokens: 4k, lr: 1e-3, batch: 2, precision: fp32}}
"""


def trained(base: Path, text: Path, folder: Path, isolate: bool) -> tuple[Path, dict[str, Any]]:
    """The corpus, and the results of the dispersed arm, trained by the stages of a build."""
    folder.mkdir()
    path, corpus, output_dir = folder / "tiny.yaml", folder / "corpus", folder / "run" / "dispersed" / "model"
    path.write_text(RECIPE.format(base=base, text=text, isolate=str(isolate).lower()))
    recipe, stage = load(path), build_plan.corpus(load(path))
    corpus.mkdir()
    output_dir.mkdir(parents=True)
    prepare.corpus(stage.options, Inputs(stage.files, base=base), corpus, silent)
    arm = next(run for run in recipe.arm_runs if run.name == "dispersed")
    options = build_plan.training(recipe, arm).options
    return corpus, training.train(options, Inputs(base=base, corpus=corpus), output_dir, silent)


def first_loss(base: Path, data: PackedDataset) -> float:
    items = [data[index] for index in range(2)]
    with torch.no_grad():
        inputs = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return float(open_tiny(base)(**inputs, use_cache=False).loss)


def test_isolated_documents_are_trained_on_as_such(
    tiny_folder: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    base, losses = tiny_folder["llama"], []
    for isolate in (True, False):
        corpus, results = trained(base, text_file, tmp_path / str(isolate), isolate)
        packed = np.load(corpus / "tokens.npy")
        end_of_text = json.loads((corpus / "packing.json").read_text())["end_of_text"]
        assert (packed[:2, :-1] == end_of_text).any()  # there is a border between documents
        data = PackedDataset(packed, end_of_text if isolate else None)
        losses.append(results["log"][0]["loss"])
        assert losses[-1] == pytest.approx(first_loss(base, data), rel=1e-5)
        assert results["tokens_per_s"] > 0 and results["seconds"] > results["watch_seconds"] > 0
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_the_probe_times_the_steps_that_training_takes(tiny_folder: dict[str, Path]) -> None:
    times = time_steps(open_tiny(tiny_folder["llama"]), Train(tokens=1, lr=1e-3), 32, seed=0)
    assert min(times["micro_step_s"], times["forward_s_per_token"], times["optimizer_s"]) > 0
