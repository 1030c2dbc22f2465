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
from edgedisp.data import synthetic_documents
from edgedisp.pipeline import build_plan, prepare, training
from edgedisp.pipeline.stage import Inputs
from edgedisp.recipe import Recipe, Train, load
from edgedisp.train.performance import time_steps
from edgedisp.train.trainer import PackedDataset

RECIPE = """\
name: tiny
model: {{base: {base}, architecture: llama}}
data: {{train: [{{source: {text}}}], heldout: 20%, context: 256, isolate_documents: {isolate}}}
train: {{tokens: 4k, lr: 1e-3, batch: 2, precision: fp32}}
"""


def prepared(base: Path, text: Path, folder: Path, isolate: bool) -> tuple[Recipe, Path, dict[str, Any]]:
    """The recipe, the folder of its corpus, and the stage's results."""
    path, corpus = folder / "tiny.yaml", folder / "corpus"
    corpus.mkdir(parents=True)
    path.write_text(RECIPE.format(base=base, text=text, isolate=str(isolate).lower()))
    recipe, stage = load(path), build_plan.corpus(load(path))
    return recipe, corpus, prepare.corpus(stage.options, Inputs(stage.files, base=base), corpus, silent)


def trained(base: Path, text: Path, folder: Path, isolate: bool) -> tuple[Path, dict[str, Any]]:
    """The corpus, and the results of the dispersed arm, trained by the stages of a build."""
    recipe, corpus, _ = prepared(base, text, folder, isolate)
    output_dir = folder / "run" / "dispersed" / "model"
    output_dir.mkdir(parents=True)
    arm = next(run for run in recipe.arm_runs if run.name == "dispersed")
    options = build_plan.training(recipe, arm).options
    return corpus, training.train(options, Inputs(base=base, corpus=corpus), output_dir, silent)


def test_an_end_of_text_written_in_a_text_is_no_border_and_is_counted(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    texts = [document.text for document in synthetic_documents(20, seed=0)]
    texts[1:1] = [f"<|im_start|>user\n{texts[1]}", None, texts[2], f"{texts[3]}<|endoftext|>{texts[4]}"]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    _, corpus, results = prepared(tiny_folder["llama"], path, tmp_path / "run", isolate=True)
    end_of_text = json.loads((corpus / "packing.json").read_text())["end_of_text"]
    passes = (np.load(corpus / "tokens.npy") == end_of_text).sum() / results["train_documents"]
    assert passes == pytest.approx(results["epochs"], abs=0.1)  # one border for each document
    text = results["text"]
    assert text["special_tokens_as_text"] == {"<|endoftext|>": 1} and text["rendered_documents"] == 1
    note = "text: 24 rows of 1 file, 2 dropped (1 null, 1 duplicate): 22 documents, "
    assert results["notes"][0].startswith(note)


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
