"""One rule says better or worse: the verdict's. No table, grid or plot contradicts it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from report_sample import CLOZE, LOSS, chat_sample, loss_difference, sample, several_arms, share_difference

from edgedisp.core.results import AS_GIVEN, Estimate
from edgedisp.core.run import Run
from edgedisp.report.comparisons import NOT_CLEAR, comparisons, holm
from edgedisp.report.results_table import difference, table, table_text
from edgedisp.report.sections import scores_section
from edgedisp.report.verdict import (
    CANNOT_TELL,
    FEWEST_DOCUMENTS,
    HELPS,
    HURTS,
    NULL,
    SINGLE,
    summary,
    verdict,
)


def closed_test(ps: list[float]) -> list[float]:
    """Holm's corrected p by its definition: the largest Bonferroni p of all sets that hold the hypothesis."""
    others = [[p for other, p in enumerate(ps) if other != index] for index in range(len(ps))]
    return [
        max(
            min(1.0, (size + 1) * min(p, *subset, 2.0))
            for size in range(len(ps))
            for subset in itertools.combinations(others[index], size)
        )
        for index, p in enumerate(ps)
    ]


def random_run(seed: int) -> Run:
    """A run with three arms whose comparisons are random, many of them near the limits of the rule."""
    rng = np.random.default_rng(seed)
    run = several_arms()

    def tasks() -> dict[str, object]:
        loss, p = rng.normal(0, 0.004), float(rng.uniform(0.001, 0.12))
        share, q = rng.normal(0, 0.03), float(rng.uniform(0.001, 0.12))
        return {LOSS: loss_difference(loss, 0.003, p), CLOZE: share_difference(share, 0.03, q)}

    compared = {arm: {name: tasks() for name in run.precisions} for arm in run.compared_arms}
    return replace(run, comparisons=compared, seeds=[0, 1, 2])  # type: ignore[arg-type]


def test_no_cell_says_better_or_worse_where_the_rule_says_not_clear() -> None:
    for run in map(random_run, range(25)):
        rows = comparisons(run)
        outcomes = {(row.arm, row.precision, row.task): row.outcome for row in rows}
        for (arm, precision, task), outcome in outcomes.items():
            row = next(row for row in table(run).rows if row.precision == precision)
            assert row.cells[task][difference(arm)].outcome == outcome
        for grid in scores_section(run).grids:
            assert {line[-1] for line in grid.rows} & {"better", "worse"} <= set(outcomes.values())
        result, first = verdict(run), next((row for row in rows if row.is_headline), None)
        if result.label in (HELPS, HURTS):
            assert first is not None and first.outcome == {HELPS: "better", HURTS: "worse"}[result.label]
        for precision, label in result.per_precision.items():
            assert label not in (HELPS, HURTS) or outcomes["dispersed", precision, LOSS] != NOT_CLEAR


def test_an_interval_without_0_is_not_enough() -> None:
    run = sample(-0.004, 0.0035, p=0.07)
    assert verdict(run).label == NULL and "p = 0.070" in verdict(run).sentence
    cell = table(run).rows[-1].cells[LOSS][difference("dispersed")]
    assert cell.estimate.excludes_zero and cell.outcome == NOT_CLEAR
    assert "*" not in table_text(table(run)).split("Brackets")[0]


def test_a_difference_within_the_noise_floor_is_none() -> None:
    run = sample(-0.000008, 0.000002, p=0.001)
    assert verdict(run).label == NULL and "two scorings of the same model" in verdict(run).sentence


@pytest.mark.parametrize(
    ("value", "seeds", "label", "claim"),
    [
        (-0.006, 3, HELPS, "Dispersion helps at int4: perplexity 12.00 -> 11.93 (-0.60 %)."),
        (0.006, 3, HURTS, "Dispersion hurts at int4: perplexity"),
        (-0.006, 2, "better", "This dispersed model is better than this baseline at int4: perplexity"),
        (0.006, 1, "worse", "This dispersed model is worse than this baseline at int4: perplexity"),
    ],
)
def test_a_clear_headline_is_about_dispersion_from_three_seeds_on(
    value: float, seeds: int, label: str, claim: str
) -> None:
    result = verdict(replace(sample(value, 0.003, p=0.002), seeds=list(range(seeds))))
    assert result.label == result.per_precision["int4"] == label and result.parts[0].startswith(claim)
    assert ("with dispersion" in result.sentence) == (seeds >= 3)


def test_models_from_elsewhere_are_compared_by_name() -> None:
    tasks = {LOSS: loss_difference(-0.006, 0.003, 0.002)}
    run = replace(sample(), precisions=[AS_GIVEN], comparisons={"dispersed": {AS_GIVEN: tasks}}, seeds=[])
    assert verdict(run).sentence.startswith("Dispersed is better than the baseline: perplexity")
    assert "How these models were trained is not known" in verdict(run).sentence


def test_supporting_comparisons_are_one_family_without_the_headline() -> None:
    rows = comparisons(several_arms())
    family = [row for row in rows if not row.is_headline]
    assert len(family) == len(rows) - 1 == 15
    assert [row.p_holm for row in family] == [row.p_holm for row in holm(family)]
    run = sample(cloze=0.03)
    row = next(row for row in comparisons(run) if row.task == CLOZE and row.precision == "int8")
    assert row.is_clear and row.outcome == NOT_CLEAR
    assert "none survives Holm's correction" in verdict(run).sentence
    result = verdict(sample(cloze=0.0001))
    assert result.label == CANNOT_TELL and "supporting tests do" in result.parts[0]


def test_holm_agrees_with_its_definition_for_ties_and_order() -> None:
    row = comparisons(sample())[0]
    rows = [replace(row, estimate=Estimate(1.0, p=p)) for p in (0.04, 0.01, 0.04, 0.5, 0.0004)]
    assert [row.p_holm for row in holm(rows)] == pytest.approx(closed_test([row.p for row in rows]))


def test_p_is_read_off_the_interval_where_no_test_was_made() -> None:
    assert Estimate(1.959964, 0.0, 2 * 1.959964).test_p == pytest.approx(0.05, abs=1e-6)
    assert Estimate(0.0, 0.0, 0.0).test_p == 1.0 and Estimate(0.1, 0.1, 0.1).test_p == 0.0
    assert Estimate(0.1).test_p is None


def test_why_nothing_is_claimed() -> None:
    assert "smoke run" in verdict(replace(sample(-0.006, 0.003, p=0.001), smoke=True)).sentence
    wide = verdict(sample(half=0.05))
    assert wide.label == CANNOT_TELL and "documents are needed" in wide.sentence
    run = sample()
    other = replace(run.training["dispersed"], log=[{"step": 1, "loss": 9.0}])
    different = replace(run, training={**run.training, "dispersed": other})
    assert "losses before the first update differ" in verdict(different).sentence
    main = loss_difference(-0.006, 0.003, 0.001).main
    short = replace(main, estimate=replace(main.estimate, documents=FEWEST_DOCUMENTS - 1))
    tasks = {LOSS: replace(loss_difference(-0.006, 0.003, 0.001), metrics={"perplexity": short})}
    few = verdict(replace(run, comparisons={"dispersed": {"int4": tasks}}))
    assert few.label == CANNOT_TELL and "19 held-out documents" in few.sentence
    alone = replace(sample(), arms=["baseline"], comparisons={}, means={})
    assert verdict(alone).label == SINGLE


def test_without_a_loss_the_mean_over_tasks_is_the_headline() -> None:
    only = {"dispersed": {"int4": {CLOZE: share_difference(0.0, 0.03, 1.0)}}}
    result = verdict(replace(sample(), comparisons=only))
    assert result.headline is not None and result.headline.unit == "share"
    assert result.headline.task == "mean of tasks"
    assert result.label == CANNOT_TELL  # 2 points wide, the smallest published gain is 0.7


def test_the_verdict_tells_the_spread_of_several_seeds() -> None:
    result = verdict(several_arms(seeds=2))
    assert "2 seeds differ by" in result.sentence
    assert math.isclose(result.headline.estimate.seeds.sd, 0.0007)  # type: ignore[union-attr, arg-type]


def test_exact_answers_are_the_headline_where_they_were_asked_for() -> None:
    null = verdict(chat_sample())
    assert null.label == NULL and null.parts[1].startswith(
        "A difference of 5.9 points or more would be found"
    )
    assert "exact answers at int4, dispersed - baseline, is +0.7 points" in null.sentence
    better = verdict(chat_sample((0.72, 0.71, 0.74))).parts[0]
    assert better.endswith("model is better than this baseline at int4: 64.0 % -> 74.0 % exact answers.")


def test_it_works_where_the_arms_clearly_beat_the_base() -> None:
    works, cost, _ = summary(chat_sample())
    assert works.answer == "Yes. Exact answers at int4: base 0.0 %, baseline 64.0 %, dispersed 64.7 %."
    assert "5.5 times smaller" in cost.answer and "exact answers: 72.0 % -> 64.7 %" in cost.answer
    assert summary(chat_sample((0.0, 0.0, 0.01)))[0].answer.startswith("In part.")
    assert summary(replace(chat_sample(), smoke=True))[0].answer.startswith("Exact answers")
