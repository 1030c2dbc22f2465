"""The real command with five arms and two seeds, on top of a finished build with two arms and one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended
from tiny_build import write_recipe

from edgedisp.core.stage_folder import read
from edgedisp.report.page import report_json

ARMS = "[baseline, dispersed, {name: strong, dispersion: {weight: 5.0}}, neftune, active_forgetting]"
NEW = ("strong", "neftune", "active_forgetting")
COMMON = (
    "--set", "precisions=[int4]", "--set", "targets=[]", "--set", "latency.repetitions=1",
    "--set", "evaluate.tasks=[heldout_perplexity, heldout_cloze]",
)  # fmt: skip


def test_more_arms_and_seeds_train_what_is_new_and_are_all_told(
    tmp_path: Path,
    tiny_folder: dict[str, Path],
    text_file: Path,
    edgedisp: Callable[..., Ended],
) -> None:
    recipe, run = write_recipe(tmp_path, tiny_folder["llama"], text_file.name), tmp_path / "run"
    first = edgedisp("build", recipe, "--out", run, *COMMON)
    assert first.code == 0, first
    assert "All arms" not in first.out
    before = {arm: read(run / arm / "model") for arm in ("baseline", "dispersed")}

    ended = edgedisp("build", recipe, "--out", run, *COMMON, "--set", f"arms={ARMS}", "--set", "seeds=2")
    assert ended.code == 0, ended
    ran = {line.split("] ")[1].split(":")[0] for line in ended.err.splitlines() if ": done in" in line}
    trained = {name for name in ran if name.endswith("/model")}
    twice = [f"{arm}-seed2" for arm in ("baseline", "dispersed", *NEW)]  # the recipe's seed is 1
    assert trained == {f"{arm}/model" for arm in (*NEW, *twice)}
    for arm, record in before.items():
        after = read(run / arm / "model")
        assert record and after and record.content == after.content

    summary = json.loads((run / "report.json").read_text())["summary"]
    _arms_start_alike(summary)
    _all_are_compared(summary)
    assert "All arms against the baseline: heldout_perplexity, nats per token, 2 seeds" in ended.out
    assert "All arms against the baseline" in edgedisp("compare", run).out
    assert 'id="arms"' in (run / "report.html").read_text()
    assert "seed 2" in (run / "neftune-seed2" / "model" / "README.md").read_text()
    assert json.loads(report_json(summary))["verdict"]["seeds"] == 2


def _losses(summary: dict[str, Any], name: str) -> list[float]:
    trainings = {other: replica["midtrain"] for other, replica in summary["replicas"].items()}
    training = {**summary["midtrain"], **trainings}[name]
    return [row["loss"] for row in training["log"]]


def _arms_start_alike(summary: dict[str, Any]) -> None:
    """Arms of one seed see one model and one batch; noise is what sets an arm apart at the first loss."""
    for tail in ("", "-seed2"):
        baseline = _losses(summary, f"baseline{tail}")
        for arm in ("dispersed", "strong", "active_forgetting"):
            assert _losses(summary, f"{arm}{tail}")[0] == baseline[0]
        assert _losses(summary, f"neftune{tail}")[0] != baseline[0]
        forgetting = _losses(summary, f"active_forgetting{tail}")
        after = summary["techniques"]["active_forgetting"]["active_forgetting"]
        assert forgetting[:after] == baseline[:after] and forgetting[after] != baseline[after]
    assert _losses(summary, "baseline")[0] != _losses(summary, "baseline-seed2")[0]  # another order
    weights = [training["weights_sha256"] for training in summary["midtrain"].values()]
    weights += [replica["midtrain"]["weights_sha256"] for replica in summary["replicas"].values()]
    assert len(set(weights)) == 10


def _all_are_compared(summary: dict[str, Any]) -> None:
    assert summary["seeds"] == [1, 2] and set(summary["comparison"]) == {"dispersed", *NEW}
    for arm, by_precision in summary["comparison"].items():
        for precision in ("torch", "int4"):
            loss = by_precision[precision]["heldout_perplexity"]["nll_difference"]
            scores = [summary["replicas"][f"{one}-seed2"]["accuracy"] for one in ("baseline", arm)]
            values = [score[precision]["heldout_perplexity"]["value"] for score in scores]
            assert loss["seeds"]["n"] == 2 and len(loss["seeds"]["values"]) == 2
            assert loss["low"] <= loss["seeds"]["item_low"] <= loss["seeds"]["item_high"] <= loss["high"]
            assert (loss["seeds"]["values"][1] > 0) == (values[1] > values[0])
    labels = {row["label"] for row in summary["latency"]["rows"]}
    assert labels == {f"{arm}/int4" for arm in summary["arms"]}
    assert all(pair["same_graph"]["same"] for pair in summary["latency"]["pairs"])
    assert len(summary["latency"]["pairs"]) == 4


@pytest.mark.parametrize("arms", ["[dispersed, strong]", "[neftune]"])
def test_arms_that_are_not_known_or_stand_alone(
    arms: str,
    tmp_path: Path,
    edgedisp: Callable[..., Ended],
) -> None:
    ended = edgedisp("build", "quickstart", "--smoke", "--out", tmp_path / "run", "--set", f"arms={arms}")
    if "strong" in arms:
        assert ended.code == 2 and "arms.1: (choices: baseline, dispersed" in ended.err
        assert not (tmp_path / "run").exists()
        return
    assert ended.code == 0, ended
    assert "Single arm: only neftune was built" in ended.out
