"""The real command with five arms and two seeds, on top of a finished build with two arms and one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import Ended
from tiny_build import write_recipe

from edgedisp.core.run import Run
from edgedisp.core.stage_folder import read
from edgedisp.pipeline.run_results import load

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

    results = load(run)
    _arms_start_alike(results)
    _all_are_compared(results)
    assert "All arms against the baseline, 2 seeds\nheldout_perplexity, nats per token" in ended.out
    assert "All arms against the baseline" in edgedisp("compare", run).out
    assert 'id="arms"' in (run / "report.html").read_text()
    assert "seed 2" in (run / "neftune-seed2" / "model" / "README.md").read_text()


def _losses(results: Run, name: str) -> list[float]:
    trainings = {**results.training, **{other: one.training for other, one in results.replicas.items()}}
    return [row["loss"] for row in trainings[name].log]


def _arms_start_alike(results: Run) -> None:
    """Arms of one seed see one model and one batch; noise is what sets an arm apart at the first loss."""
    for tail in ("", "-seed2"):
        baseline = _losses(results, f"baseline{tail}")
        for arm in ("dispersed", "strong", "active_forgetting"):
            assert _losses(results, f"{arm}{tail}")[0] == baseline[0]
        assert _losses(results, f"neftune{tail}")[0] != baseline[0]
        forgetting = _losses(results, f"active_forgetting{tail}")
        after = results.techniques["active_forgetting"]["active_forgetting"]
        assert forgetting[:after] == baseline[:after] and forgetting[after] != baseline[after]
    assert _losses(results, "baseline")[0] != _losses(results, "baseline-seed2")[0]  # another order
    weights = [one.weights_sha256 for arm in results.arms for one in results.trainings(arm).values()]
    assert len(set(weights)) == 10


def _all_are_compared(results: Run) -> None:
    assert results.seeds == [1, 2] and set(results.comparisons) == {"dispersed", *NEW}
    for by_precision in results.comparisons.values():
        for precision in ("torch", "int4"):
            loss = by_precision[precision]["heldout_perplexity"].main.nats
            assert loss and loss.seeds and len(loss.seeds.values) == 2
            assert loss.low <= loss.seeds.item_low <= loss.seeds.item_high <= loss.high  # type: ignore[operator]
    assert results.latency and {row.label for row in results.latency.rows} == {
        f"{arm}/int4" for arm in results.arms
    }
    assert [pair["same_graph"] for pair in results.latency.pairs] == [True] * 4


def test_an_arm_may_stand_alone(tmp_path: Path, edgedisp: Callable[..., Ended]) -> None:
    ended = edgedisp("build", "quickstart", "--smoke", "--out", tmp_path / "run", "--set", "arms=[neftune]")
    assert ended.code == 0, ended
    assert "Single arm: only neftune was built" in ended.out
