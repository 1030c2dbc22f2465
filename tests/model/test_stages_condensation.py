"""The stages that measure condensation: on which blocks, against what, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgedisp.core.progress import silent
from edgedisp.graph.export import export
from edgedisp.pipeline import Stage, stages
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.recipe import load
from edgedisp.stages import bundle_condensation, condensation
from edgedisp.stages.condensation import CONDENSATION_SEQUENCES, MEASURED


@pytest.fixture(scope="module")
def run(tiny_folder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with more held-out blocks than are measured, bundles, and folders for the stages."""
    root = tmp_path_factory.mktemp("run")
    for name in ("corpus", "fp32", "int8", "baseline", "dispersed", "on_fp32", "on_int8"):
        (root / name).mkdir()
    held = np.random.default_rng(0).integers(5, 100, (CONDENSATION_SEQUENCES + 3, 16), dtype=np.uint32)
    np.save(root / "corpus" / "heldout.npy", held)
    export(tiny_folder["llama"], root / "fp32", threads=1)
    quantize_bundle(root / "fp32", root / "int8", bits=8)
    return root


def test_an_arm_is_measured_on_held_out_blocks_and_compared_with_the_baseline(
    run: Path, tiny_folder: dict[str, Path]
) -> None:
    baseline = condensation(tiny_folder["llama"], run / "corpus", None, run / "baseline", silent)
    assert baseline["sequences"] == CONDENSATION_SEQUENCES and not {"change", "by_sequence"} & set(baseline)
    kept = json.loads((run / "baseline" / MEASURED).read_text())
    assert len(kept["by_sequence"]["cosine_raw"]) == CONDENSATION_SEQUENCES
    other = condensation(tiny_folder["qwen3"], run / "corpus", run / "baseline", run / "dispersed", silent)
    expected = other["layers"][2]["cosine_raw"] - baseline["layers"][2]["cosine_raw"]
    assert other["change"]["layers"][2]["cosine_raw"]["difference"] == pytest.approx(expected)


def test_a_bundle_is_compared_with_the_torch_model_of_its_arm(run: Path) -> None:
    for precision, most in (("fp32", 1e-5), ("int8", 0.1)):
        own = run / f"on_{precision}"
        found = bundle_condensation(run / precision, run / "baseline", run / "corpus", 1, own, silent)
        changed = [abs(row["cosine_raw"]["difference"]) for row in found["change"]["layers"]]
        assert len(changed) == 3 and max(changed) < most
        assert (own / MEASURED).is_file() and "by_sequence" not in found
    assert max(changed) > 1e-5


def walk(tmp_path: Path, text_file: Path, arms: str) -> list[Stage]:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: one\nmodel: {base: ., architecture: llama}\n"
        f"data: {{train: [{{source: {text_file}}}], context: 16}}\n"
        f"train: {{tokens: 1k, lr: 1e-4}}\nprecisions: [fp32, int4]\ntargets: []\narms: {arms}\n"
    )
    return stages(load(recipe), threads=1)


def test_the_baseline_is_measured_before_those_that_are_compared_with_it(
    tmp_path: Path, text_file: Path
) -> None:
    found = {stage.name: stage for stage in walk(tmp_path, text_file, "[dispersed, baseline]")}
    assert found["baseline/condensation"].reads == ("baseline/model", "corpus")
    assert found["dispersed/condensation"].reads[-1] == "baseline/condensation"
    seen: set[str] = set()
    for name, stage in found.items():
        assert set(stage.reads) <= seen
        seen.add(name)


def test_every_precision_of_every_arm_is_measured(tmp_path: Path, text_file: Path) -> None:
    found = {stage.name: stage.reads for stage in walk(tmp_path, text_file, "[dispersed]")}
    assert found["dispersed/condensation"] == ("dispersed/model", "corpus")  # nothing to compare with
    for precision in ("fp32", "int4"):
        name = f"dispersed/condensation-{precision}"
        assert found[name] == (f"dispersed/{precision}", "dispersed/condensation", "corpus")
