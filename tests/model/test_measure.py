"""Measuring a torch model, its fp32 bundle and an int4 one: one pass each, over the same held-out blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_twins import VOCABULARY, TwinStore

from edgedisp import data, models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.files import from_json
from edgedisp.core.progress import silent
from edgedisp.core.results import Measurement
from edgedisp.dispersion.condensation import measure_model, summary
from edgedisp.pipeline import measure as stage
from edgedisp.pipeline.options import ItemsOptions, MeasureOptions, ParityOptions
from edgedisp.pipeline.prepare import items
from edgedisp.pipeline.stage import Inputs
from edgedisp.recipe import Evaluate

ITEMS = ItemsOptions(Evaluate(tasks=("heldout_perplexity",), limit=4), context=32, seed=0)
PARITY = ParityOptions(tokens=64, limits={"top1_agreement": 0.0})
OPTIONS = MeasureOptions(ITEMS, threads=1, bootstrap=50, divergence_tokens=96, parity=PARITY)


class Run:
    """Folders of a run, and measuring into them."""

    def __init__(self, root: Path, store: TwinStore) -> None:
        self.root, self.store = root, store
        corpus = root / "corpus"
        corpus.mkdir()
        documents = data.synthetic_documents(6, seed=1)
        rows = [json.dumps({"id": document.id, "text": document.text}) for document in documents]
        (corpus / "heldout.jsonl").write_text("\n".join(rows))
        blocks = np.random.default_rng(0).integers(3, VOCABULARY, (20, 32))
        np.save(corpus / "heldout.npy", blocks.astype(np.uint16))
        (root / "items").mkdir()
        model = store.model_dir("llama")
        items(ITEMS, Inputs(base=model, corpus=corpus), root / "items", silent)

    def measure(self, name: str, options: MeasureOptions = OPTIONS, **inputs: Path) -> Measurement:
        model, output = self.store.model_dir("llama"), self.root / name
        output.mkdir()
        folders = {name: self.root / name for name in ("corpus", "items")}
        results = stage.measure(options, Inputs(model=model, base=model, **folders, **inputs), output, silent)
        return from_json(Measurement, results)


@pytest.fixture
def run(tmp_path: Path, twins: TwinStore) -> Run:
    return Run(tmp_path, twins)


def test_torch_and_bundles_are_measured_on_the_same_blocks_and_items(run: Run) -> None:
    fp32, int4 = run.store.fp32("llama"), run.store.quantized("llama", 4, group=32)
    trained = run.measure("torch")
    exact = run.measure("fp32", bundle=fp32, reference=run.root / "torch")
    rounded = run.measure("int4", bundle=int4, parent=fp32, baseline=fp32, reference=run.root / "torch")

    blocks = np.load(run.root / "corpus" / "heldout.npy")[:16].astype(np.int64)
    expected = measure_model(models.load(run.store.model_dir("llama")), torch.from_numpy(blocks), silent)
    condensation: Any = trained.condensation
    assert condensation.sequences == 16 and condensation.change is None
    mean_cosine = pytest.approx(summary(expected).mean_cosine.value, abs=1e-6)
    assert condensation.mean_cosine.value == mean_cosine
    assert not trained.divergence and trained.parity is None

    changes: list[Any] = [result.condensation and result.condensation.change for result in (exact, rounded)]
    assert abs(changes[0].mean_cosine.value) < 1e-5 < abs(changes[1].mean_cosine.value)

    assert exact.parity is not None and exact.parity.passed and exact.parity.max_abs_difference < 1e-3
    assert not exact.divergence and rounded.divergence["parent"].tokens == 96  # three blocks of 32
    assert rounded.divergence["parent"] == rounded.divergence["baseline"]
    assert rounded.divergence["parent"].mean_kl > 0

    scores = [result.scores["heldout_perplexity"] for result in (trained, exact, rounded)]
    losses = [score.main.estimate.value for score in scores]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] != losses[1]
    items = [json.loads((run.root / name / "items.json").read_text()) for name in ("torch", "int4")]
    assert len({result["heldout_perplexity"]["score"]["items_sha256"] for result in items}) == 1


def test_a_task_that_could_be_read_before_must_be_read_now(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = stage.task_suite
    gone = {"piqa": "piqa: gone"}
    monkeypatch.setattr(stage, "task_suite", lambda *inputs: replace(suite(*inputs), missing=gone))
    with pytest.raises(BuildFailed, match=r"piqa: gone\. .*the same command continues"):
        run.measure("torch")


def test_a_bundle_that_disagrees_with_torch_stops_the_build(run: Run) -> None:
    options = MeasureOptions(ITEMS, 1, parity=ParityOptions(tokens=64, limits={"mean_kl": 1e-9}))
    with pytest.raises(BuildFailed, match=r"mean_kl is .*limit is 1e-09"):
        run.measure("int4", options, bundle=run.store.quantized("llama", 4))
