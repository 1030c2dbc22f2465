"""The real command with quantization-aware training: what is trained is what ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_build import write_documents

from edgedisp import models
from edgedisp.cli import main
from edgedisp.core.stage_folder import read
from edgedisp.graph.session import OnnxModel, at_accuracy_level
from edgedisp.pipeline.options import BundleRounding
from edgedisp.pipeline.rounding import SCALES, trained_roundings
from edgedisp.recipe import load
from edgedisp.train.quantized_weights import round_weights

RECIPE = """\
name: tiny
model: {{base: {base}, architecture: llama}}
data: {{train: [{{source: text.jsonl}}], heldout: 20%, context: 32}}
train:
  tokens: 1k
  lr: 1e-2
  dispersion: {{weight: 0.1, tokens: 16}}
  quantization_aware: {aware}
  adapter: {adapter}
precisions: [int4]
quantize: {{int4: {{method: {method}, calibration_tokens: 256}}}}
verify: {{tokens: 64, int4_top1: 0, int4_kl: 5}}
evaluate: {{tasks: [heldout_perplexity], limit: 2, perplexity_tokens: 200, bootstrap: 50}}
latency: {{prompt: 4, generate: 2, repetitions: 1, threads: 1}}
"""
ARMS = ("baseline", "dispersed")
LATE, LORA = "{precision: int4, start: 0.5}", "{kind: lora, rank: 4}"
BUILDS = {
    "rtn": {"aware": "int4", "adapter": "null", "method": "rtn"},
    "gptq": {"aware": LATE, "adapter": "null", "method": "gptq"},
    "lora": {"aware": "int4", "adapter": LORA, "method": "rtn"},
}


@pytest.fixture(scope="module", params=list(BUILDS))
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_folder: dict[str, Path]
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("aware")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(base=tiny_folder["llama"], **BUILDS[request.param]))
    write_documents(folder / "text.jsonl", 80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["edgedisp", "build", str(recipe), "--out", str(folder / "run")])
        main()
    return request.param, folder


def results(folder: Path) -> dict[str, Any]:
    record = read(folder)
    assert record is not None
    return record.results


def rounding_of(folder: Path) -> BundleRounding:
    return BundleRounding(4, load(folder / "tiny.yaml").quantize.int4)


@pytest.mark.parametrize("arm", ARMS)
def test_the_graph_in_fp32_arithmetic_gives_the_trained_models_logits_and_text(
    built: tuple[str, Path], arm: str
) -> None:
    _, folder = built
    model, bundle = folder / "run" / arm / "model", folder / "run" / arm / "int4"
    rounded = models.load(model)
    round_weights(rounded, *trained_roundings(rounding_of(folder), model))
    exact = OnnxModel(bundle, 1, graph=at_accuracy_level(bundle, 0))
    blocks = np.load(folder / "run" / "corpus" / "heldout.npy")[:4].astype(np.int64)
    with torch.no_grad():
        expected = rounded(input_ids=torch.from_numpy(blocks), use_cache=False).logits.numpy()
    assert np.abs(expected - exact(blocks, np.ones_like(blocks))).max() < 1e-3
    reference = models.TorchModel(rounded)
    for row in blocks:
        prompt = row[:8].tolist()
        assert reference.greedy(prompt, 20, frozenset()) == exact.greedy(prompt, 20, frozenset())
    as_trained = results(folder / "run" / arm / "measure-int4")["parity"]["as_trained"]
    assert as_trained["max_abs_difference"] < 1e-3 and as_trained["greedy_agreement"] == 1


def test_the_weights_left_behind_are_not_the_rounded_ones_and_scales_lie_beside_them(
    built: tuple[str, Path],
) -> None:
    name, folder = built
    for arm in ARMS:
        model = folder / "run" / arm / "model"
        assert (model / SCALES).is_file() == (name == "gptq")
        plain, rounded = models.load(model), models.load(model)
        for key in round_weights(rounded, *trained_roundings(rounding_of(folder), model)):
            assert not torch.equal(plain.get_parameter(key), rounded.get_parameter(key))
        assert results(folder / "run" / arm / "int4")["is_trained"] is True
