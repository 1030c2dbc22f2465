"""What a build records of divergence and of noise, against the models themselves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ended

from edgedisp.evaluate.divergence import compare
from edgedisp.graph.session import OnnxModel
from edgedisp.models import load_tokenizer
from edgedisp.stages.noise import _floor


def told(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def test_a_bundles_divergence_is_that_of_its_logits(built: tuple[Path, Path, Ended]) -> None:
    _, run, _ = built
    record = told(run, "dispersed/divergence-int4/divergence.json")
    held = np.load(run / "corpus" / "heldout.npy").astype(np.int64)
    blocks = held[: record["parent"]["tokens"] // held.shape[1]]
    names = ("dispersed/int4", "dispersed/fp32", "baseline/int4")
    models = {name: OnnxModel(run / name, 1) for name in names}
    logits = {
        name: np.concatenate([opened(block[None], np.ones_like(block[None])) for block in blocks])
        for name, opened in models.items()
    }
    for reference, folder in (("parent", "dispersed/fp32"), ("baseline", "baseline/int4")):
        expected = compare(logits[folder], logits["dispersed/int4"])
        for key, value in expected.items():
            assert record[reference][key] == pytest.approx(value, rel=1e-6), key
    assert record["parent"]["mean_kl"] > 0


def test_the_worst_tokens_stand_in_their_text(built: tuple[Path, Path, Ended]) -> None:
    _, run, _ = built
    tokenizer = load_tokenizer(run / "baseline" / "model")
    held = np.load(run / "corpus" / "heldout.npy")
    worst = told(run, "baseline/divergence-int4/divergence.json")["parent"]["worst"]
    assert [one["kl"] for one in worst] == sorted((one["kl"] for one in worst), reverse=True)
    for one in worst:
        block, position = held[one["block"]], one["position"]
        start = max(0, position - 23)
        assert one["context"] == tokenizer.decode(block[start : position + 1].tolist())
        follows = block[position + 1 : position + 2].tolist()
        assert one["truth"] == (tokenizer.decode(follows) if follows else None)
        assert one["reference"] == tokenizer.decode([one["reference_token"]])


def test_an_fp32_bundle_is_compared_with_the_baselines_alone(built: tuple[Path, Path, Ended]) -> None:
    _, run, _ = built
    record = told(run, "dispersed/divergence-fp32/divergence.json")
    assert record["parent"] is None and record["baseline"]["mean_kl"] > 0
    assert not (run / "baseline" / "divergence-fp32").exists()


@pytest.mark.parametrize("precision", ["torch", "fp32", "int8", "int4"])
def test_two_scorings_of_one_model_differ_by_little(built: tuple[Path, Path, Ended], precision: str) -> None:
    _, run, _ = built
    record = told(run, f"baseline/noise-{precision}/record.json")["results"]
    assert set(record["variants"]) == {"threads", "attention"}
    limit = 1e-5 if precision in ("torch", "fp32") else 0.05
    assert 0 <= record["floor"] < limit
    for shift in record["variants"].values():
        assert record["floor"] >= abs(shift["difference"])


def test_the_floor_of_a_mean_shrinks_with_the_documents_it_is_over() -> None:
    shift = {"difference": 0.0, "low": -0.02, "high": 0.02}
    assert _floor(shift, 25, 25) == 0.02
    assert _floor(shift, 25, 100) == pytest.approx(0.01)
    assert _floor({**shift, "difference": 0.015}, 25, 10**6) == 0.015  # a shift does not average out
    assert _floor({"difference": -0.003, "low": None, "high": None}, 1, 1) == 0.003
    assert math.isfinite(_floor(shift, 1, 10**9))
