"""The training stage: what a recipe says about packing, watching and reporting arrives in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgedisp.core.progress import silent
from edgedisp.pipeline import build_plan, prepare, training
from edgedisp.pipeline.stage import Inputs
from edgedisp.recipe import Recipe, Train, load
from edgedisp.train.performance import time_steps
from edgedisp.train.trainer import PackedDataset

RECIPE = """\
name: tiny
model: {{base: {base}, architecture: llama}}
data: {{train: [{{source: {text}}}], heldout: 20%, context: 256, isolate_documents: {walls}}}
train: {{tokens: 4k, lr: 1e-3, batch: 2, precision: fp32, watch_every: {every}, report_to: [{report}]}}
"""


def trained(
    tiny_folder: dict[str, Path],
    text: Path,
    folder: Path,
    *,
    walls: str = "false",
    every: str = "null",
    report: str = "",
) -> tuple[Recipe, Path, dict[str, Any]]:
    """The recipe, the run's folder and the record of its dispersed arm, trained by the stages of a build."""
    path = folder / "tiny.yaml"
    base = tiny_folder["llama"]
    path.write_text(RECIPE.format(base=base, text=text, walls=walls, every=every, report=report))
    recipe = load(path)
    corpus, own = folder / "run" / "corpus", folder / "run" / "dispersed" / "model.partial"
    corpus.mkdir(parents=True)
    own.mkdir(parents=True)
    stage = build_plan.corpus(recipe)
    prepare.corpus(stage.options, Inputs(stage.files, base=base), corpus, silent)
    arm = next(run for run in recipe.arm_runs if run.name == "dispersed")
    options = build_plan.training(recipe, arm).options
    done = training.train(options, Inputs(base=base, corpus=corpus), own, silent)
    return recipe, folder / "run", done


def first_loss(base: Path, data: PackedDataset) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    items = [data[index] for index in range(2)]
    with torch.no_grad():
        inputs = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return float(model(**inputs, use_cache=False).loss)


def test_isolated_documents_are_trained_on_as_such(
    tiny_folder: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    base, losses = tiny_folder["llama"], {}
    for walls in ("true", "false"):
        folder = tmp_path / walls
        folder.mkdir()
        _, run, done = trained(tiny_folder, text_file, folder, walls=walls)
        packed = np.load(run / "corpus" / "tokens.npy")
        packing = json.loads((run / "corpus" / "packing.json").read_text())
        assert (packed[:2, :-1] == packing["end_of_text"]).any()  # there is a wall to build
        data = PackedDataset(packed, packing["end_of_text"] if walls == "true" else None)
        losses[walls] = done["log"][0]["loss"]
        assert done["tokens_per_s"] > 0 and done["seconds"] > done["watch_seconds"] > 0
        assert losses[walls] == pytest.approx(first_loss(base, data), rel=1e-5)
    assert losses["true"] != pytest.approx(losses["false"], rel=1e-3)


def test_the_probe_times_the_steps_that_training_takes(tiny_folder: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder["llama"], dtype=torch.float32)
    found = time_steps(model, Train(tokens=1, lr=1e-3), 32, seed=0)
    assert min(found["micro_step_s"], found["forward_s_per_token"], found["optimizer_s"]) > 0
