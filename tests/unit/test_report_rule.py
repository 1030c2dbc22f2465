"""One rule says better or worse: the verdict's. No table, grid or plot contradicts it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from report_sample import CLOZE, LOSS, loss_difference, sample, several_arms, share_difference

from edgedisp.core.results import Estimate
from edgedisp.core.run import Run
from edgedisp.report import arms_text, table, table_text, verdict
from edgedisp.report.comparisons import NOT_CLEAR, comparisons, headline, holm
from edgedisp.report.result_sections import arms_section, scores_section
from edgedisp.report.verdict import CANNOT_TELL, FEWEST_DOCUMENTS, HELPS, HURTS, NULL, SINGLE


def closed_test(ps: list[float]) -> list[float]:
    """Holm's corrected p by its definition: the largest Bonferroni p of all sets that hold the hypothesis."""
    rest = [[p for other, p in enumerate(ps) if other != place] for place in range(len(ps))]
    return [
        max(
            min(1.0, (size + 1) * min(p, *subset, 2.0))
            for size in range(len(ps))
            for subset in _smallest(rest[place], size)
        )
        for place, p in enumerate(ps)
    ]


def _smallest(ps: list[float], size: int) -> list[tuple[float, ...]]:
    """Of all sets of a size those with each possible minimum; the others give the same p."""
    if len(ps) < 7:
        return list(itertools.combinations(ps, size))
    ordered = sorted(ps, reverse=True)
    return [tuple(ordered[max(0, last - size) : last]) for last in range(size, len(ps) + 1)]


def random_run(seed: int) -> Run:
    """A run with three arms whose comparisons are random, many of them near the limits of the rule."""
    rng = np.random.default_rng(seed)
    run = several_arms()

    def tasks() -> dict[str, object]:
        loss, p = rng.normal(0, 0.004), float(rng.uniform(0.001, 0.12))
        share, q = rng.normal(0, 0.03), float(rng.uniform(0.001, 0.12))
        return {LOSS: loss_difference(loss, 0.003, p), CLOZE: share_difference(share, 0.03, q)}

    compared = {arm: {name: tasks() for name in run.precisions} for arm in run.compared_arms}
    return replace(run, comparisons=compared)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(25))
def test_no_cell_says_better_or_worse_where_the_rule_says_not_clear(seed: int) -> None:
    run = random_run(seed)
    rows = comparisons(run)
    outcomes = {(row.arm, row.precision, row.task): row.outcome for row in rows}
    for all_arms in (False, True):
        whole = table(run, all_arms)
        for row in whole.rows:
            for task, cells in row.differences.items():
                for arm, cell in cells.items():
                    assert cell.outcome == outcomes[arm, row.precision, task]
    for grid in (*arms_section(run).grids, *scores_section(run).grids):
        for line in grid.rows:
            if line[-1] in ("better", "worse"):
                assert line[-1] in outcomes.values()
    said = verdict(run)
    if said.label in (HELPS, HURTS):
        assert headline(rows).outcome == {HELPS: "better", HURTS: "worse"}[said.label]  # type: ignore[union-attr]
    for precision, label in said.per_precision.items():
        if label in (HELPS, HURTS):
            assert outcomes["dispersed", precision, LOSS] != NOT_CLEAR


def test_an_interval_without_0_is_not_enough() -> None:
    run = sample(-0.004, 0.0035, p=0.07)
    assert verdict(run).label == NULL and "p = 0.070" in verdict(run).sentence
    cell = table(run).rows[-1].differences[LOSS]["dispersed"]
    assert (
        cell.estimate.excludes_zero
        and cell.outcome == NOT_CLEAR
        and "*" not in cell.text(table(run).metrics[0])
    )
    assert "*" not in table_text(table(run)).split("[low, high]")[0]


def test_a_difference_within_the_noise_floor_is_none() -> None:
    run = sample(-0.000008, 0.000002, p=0.001)
    assert verdict(run).label == NULL and "two scorings of the same model" in verdict(run).sentence


@pytest.mark.parametrize(("value", "label"), [(-0.006, HELPS), (0.006, HURTS)])
def test_a_clear_headline_helps_or_hurts(value: float, label: str) -> None:
    said = verdict(sample(value, 0.003, p=0.002))
    assert said.label == label and said.parts[0].startswith(f"Dispersion {label} at int4: perplexity")


def test_supporting_comparisons_are_one_family_without_the_headline() -> None:
    run = several_arms()
    rows = comparisons(run)
    family = [row for row in rows if not row.is_headline]
    assert len(family) == len(rows) - 1 == 15
    expected = closed_test([row.p for row in family])
    assert [row.p_holm for row in family] == pytest.approx(expected)
    grid = scores_section(run).grids[0]
    texts = ["headline" if row.is_headline else f"{row.p_holm:.3f}" for row in rows]
    assert [line[-2] for line in grid.rows] == texts


def test_a_supporting_comparison_clear_alone_does_not_count() -> None:
    run = sample(cloze=0.03)
    row = next(row for row in comparisons(run) if row.task == CLOZE and row.precision == "int8")
    assert row.is_clear and row.outcome == NOT_CLEAR
    assert "none survives Holm's correction" in verdict(run).sentence


def test_supporting_comparisons_that_survive_contradict_a_null_headline() -> None:
    said = verdict(sample(cloze=0.0001))
    assert said.label == CANNOT_TELL and "supporting tests do" in said.parts[0]


def test_holm_agrees_with_statsmodels_for_ties_and_order() -> None:
    rows = [
        replace(comparisons(sample())[0], estimate=Estimate(1.0, p=p))
        for p in (0.04, 0.01, 0.04, 0.5, 0.0004)
    ]
    expected = closed_test([row.p for row in rows])
    assert [row.p_holm for row in holm(rows)] == pytest.approx(expected)


def test_p_is_read_off_the_interval_where_no_test_was_made() -> None:
    assert Estimate(1.959964, 0.0, 2 * 1.959964).test_p == pytest.approx(0.05, abs=1e-6)
    assert Estimate(0.0, 0.0, 0.0).test_p == 1.0 and Estimate(0.1, 0.1, 0.1).test_p == 0.0
    assert Estimate(0.1).test_p is None


def test_why_nothing_is_claimed() -> None:
    assert "smoke run" in verdict(replace(sample(-0.006, 0.003, p=0.001), smoke=True)).sentence
    assert verdict(sample(half=0.05)).label == CANNOT_TELL
    assert "documents are needed" in verdict(sample(half=0.05)).sentence
    unlike = sample()
    log = [{"step": 1, "loss": 9.0}]
    training = {**unlike.training, "dispersed": replace(unlike.training["dispersed"], log=log)}
    assert "losses before the first update differ" in verdict(replace(unlike, training=training)).sentence
    few = {LOSS: loss_difference(-0.006, 0.003, 0.001)}
    main = few[LOSS].main
    short = replace(main, estimate=replace(main.estimate, documents=FEWEST_DOCUMENTS - 1))
    run = replace(
        unlike, comparisons={"dispersed": {"int4": {LOSS: replace(few[LOSS], metrics={"perplexity": short})}}}
    )
    assert verdict(run).label == CANNOT_TELL and "19 held-out documents" in verdict(run).sentence


def test_without_a_loss_the_mean_over_tasks_is_the_headline() -> None:
    run = sample()
    only = {"dispersed": {"int4": {CLOZE: share_difference(0.0, 0.03, 1.0)}}}
    said = verdict(replace(run, comparisons=only))
    assert (
        said.headline is not None and said.headline.task == "mean of tasks" and said.headline.unit == "share"
    )
    assert said.label == CANNOT_TELL  # 2 points wide, the smallest published gain is 0.7


def test_a_single_arm_claims_nothing() -> None:
    run = sample()
    alone = replace(run, arms=["baseline"], comparisons={}, means={})
    assert verdict(alone).label == SINGLE and "14.20" in verdict(alone).sentence
    assert arms_text(alone) == ""


def test_several_seeds_are_named_with_their_spread() -> None:
    said = verdict(several_arms(seeds=2))
    assert "2 seeds differ by" in said.sentence
    assert math.isclose(said.headline.estimate.seeds.sd, 0.0007)  # type: ignore[union-attr, arg-type]
