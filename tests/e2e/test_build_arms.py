"""The real command with five arms and two seeds, on top of a finished build with two arms and one."""

from __future__ import annotations

from pathlib import Path

from tiny_build import Command, write_recipe

from edgedisp.core.run import Run
from edgedisp.core.stage_folder import read
from edgedisp.pipeline.run_results import load

ARMS = "[baseline, dispersed, {name: strong, dispersion: {weight: 5.0}}, neftune, active_forgetting]"
NEW = ("strong", "neftune", "active_forgetting")
COMMON = (
    "--set", "precisions=[int4]", "--set", "targets=[]", "--set", "latency.repetitions=1",
    "--set", "evaluate.tasks=[heldout_perplexity, heldout_cloze]",
)  # fmt: skip


def test_more_arms_and_seeds_train_what_is_new_and_all_are_compared(
    tmp_path: Path, tiny_folder: dict[str, Path], text_file: Path, edgedisp: Command
) -> None:
    recipe, run = write_recipe(tmp_path, tiny_folder["llama"], text_file.name), tmp_path / "run"
    first = edgedisp("build", recipe, "--out", run, *COMMON)
    assert first.code == 0, first
    before = {arm: read(run / arm / "model") for arm in ("baseline", "dispersed")}

    ended = edgedisp("build", recipe, "--out", run, *COMMON, "--set", f"arms={ARMS}", "--set", "seeds=2")
    assert ended.code == 0, ended
    trainings = {name for name in ended.stages if name.endswith("/model")}
    second_seed = [f"{arm}-seed2" for arm in ("baseline", "dispersed", *NEW)]  # the recipe's seed is 1
    assert trainings == {f"{arm}/model" for arm in (*NEW, *second_seed)}
    for arm, record in before.items():
        after = read(run / arm / "model")
        assert record and after and record.content == after.content

    results = load(run)
    _check_arms_start_alike(results)
    _check_all_are_compared(results)
    assert "neftune - baseline" in ended.out and "neftune - baseline" in edgedisp("compare", run).out
    assert "Luck of training" in (run / "report.html").read_text()
    assert "seed 2" in (run / "neftune-seed2" / "model" / "README.md").read_text()


def _check_arms_start_alike(results: Run) -> None:
    """Arms of one seed see one model and one batch; noise is what sets an arm apart at the first loss."""
    trainings = {**results.training, **{name: run.training for name, run in results.replicas.items()}}
    losses = {name: [row["loss"] for row in training.log] for name, training in trainings.items()}
    for seed in ("", "-seed2"):
        baseline = losses[f"baseline{seed}"]
        for arm in ("dispersed", "strong", "active_forgetting"):
            assert losses[f"{arm}{seed}"][0] == baseline[0]
        assert losses[f"neftune{seed}"][0] != baseline[0]
        forgetting = losses[f"active_forgetting{seed}"]
        after = results.techniques["active_forgetting"]["active_forgetting"]
        assert forgetting[:after] == baseline[:after] and forgetting[after] != baseline[after]
    assert losses["baseline"][0] != losses["baseline-seed2"][0]  # another order
    assert len({training.weights_sha256 for training in trainings.values()}) == 10


def _check_all_are_compared(results: Run) -> None:
    assert results.seeds == [1, 2] and set(results.comparisons) == {"dispersed", *NEW}
    for by_precision in results.comparisons.values():
        for precision in ("torch", "int4"):
            loss = by_precision[precision]["heldout_perplexity"].main.nats
            assert loss and loss.seeds and len(loss.seeds.values) == 2
            assert loss.low <= loss.seeds.item_low <= loss.seeds.item_high <= loss.high  # type: ignore[operator]
    assert results.latency
    assert {row.label for row in results.latency.rows} == {f"{arm}/int4" for arm in results.arms}
    assert [pair["same_graph"] for pair in results.latency.pairs] == [True] * 4


def test_an_arm_may_stand_alone(tmp_path: Path, edgedisp: Command) -> None:
    ended = edgedisp("build", "wikipedia", "--smoke", "--out", tmp_path / "run", "--set", "arms=[neftune]")
    assert ended.code == 0, ended
    assert "Single arm: only neftune was built" in ended.out
