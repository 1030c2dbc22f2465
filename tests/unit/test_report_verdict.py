"""The verdict's rules, each by numbers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from report_sample import comparison, difference, sample, single_arm
from scipy import stats

from edgedisp.core.results import TaskDifference
from edgedisp.evaluate import power
from edgedisp.evaluate.statistics import PERPLEXITY, Resampling
from edgedisp.evaluate.statistics import difference as paired
from edgedisp.report.claims import FEWEST_DOCUMENTS, PUBLISHED_POINTS, RULES, WIDEST_NULL, verdict
from edgedisp.report.comparisons import Z95, Comparison, comparisons, detectable, headline, holm, normal_p
from edgedisp.summary import differences_record


def entry(p: float) -> Comparison:
    """A comparison of which only p matters."""
    return Comparison("int4", "t", 1.0, 0.5, 1.5, "share", True, 10, 10, p)


def test_every_interval_contains_zero_no_measurable_difference_at_this_budget() -> None:
    said = verdict(sample(-0.0008, 0.0031))
    assert said["label"] == "no measurable difference"
    assert said["parts"][0] == "No measurable difference at this budget."
    for figure in (
        "-0.0008",
        "-0.0039 to +0.0023",
        "480 items from 412 documents",
        "40,960 training tokens",
        "11 other",
    ):
        assert figure in said["sentence"]
    seen = "A difference of 0.0044 nats per token (0.44 % of perplexity) or more would be found 4 times"
    assert f"{seen} out of 5." in said["sentence"]
    points = "The mean of 2 tasks, 960 items at int4, would show 2.9 points or more; the smallest published"
    assert f"{points} gain, 0.7 points, takes about 16,000 items." in said["sentence"]


def test_a_difference_below_the_noise_floor_is_none() -> None:
    summary = sample(-0.0081, 0.0028)
    assert verdict(summary)["label"] == "helps"
    summary["noise"]["int4"]["floor"] = 0.009
    said = verdict(summary)
    assert said["label"] == said["per_precision"]["int4"]["label"] == "no measurable difference"
    assert "no larger than what two scorings of the same model differ by (0.009 nats" in said["parts"][0]


def test_a_permutation_test_that_objects_is_heard() -> None:
    summary = sample(-0.0081, 0.0080)
    assert verdict(summary)["label"] == "helps"
    summary["comparison"]["dispersed"]["int4"]["heldout_perplexity"]["p_value"] = 0.061
    said = verdict(summary)
    assert said["label"] == "no measurable difference" and "p = 0.061" in said["parts"][0]


def test_without_a_difference_the_verdict_is_a_claim_at_most_one_time_in_twenty() -> None:
    rng, repetitions = np.random.default_rng(11), 400
    claims = 0
    for repetition in range(repetitions):
        summary = sample()
        for precision, by_task in summary["comparison"]["dispersed"].items():
            nll = rng.normal(3, 0.5, 30) * 100
            pair = [
                [{"id": k, "document": k, "nll": float(nll[k] + noise[k]), "tokens": 100} for k in range(30)]
                for noise in rng.normal(0, 2.0, (2, 30))
            ]
            change = paired(*pair, PERPLEXITY, Resampling(199, repetition))
            record = differences_record({"heldout_perplexity": TaskDifference("", {"perplexity": change})})
            by_task.update(record)
            summary["noise"][precision]["floor"] = 0.0
        claims += verdict(summary)["label"] in ("helps", "hurts")
    assert claims <= 0.05 * repetitions + 2 * math.sqrt(0.05 * 0.95 * repetitions)
    assert claims > 0


def test_a_wide_interval_that_the_test_objects_to_cannot_tell() -> None:
    summary = sample(-0.30, 0.29)
    summary["comparison"]["dispersed"]["int4"]["heldout_perplexity"]["p_value"] = 0.061
    assert verdict(summary)["label"] == "cannot tell at this size"


def test_an_objection_beside_a_supporting_test_that_survives_cannot_tell() -> None:
    summary = sample(-0.0081, 0.0028)
    summary["noise"]["int4"]["floor"] = 0.009
    summary["comparison"]["dispersed"]["int8"] = comparison(-0.05, 0.001)
    said = verdict(summary)
    assert said["label"] == "cannot tell at this size"
    assert said["per_precision"]["int4"]["label"] == "no measurable difference"


def test_arms_of_joined_runs_may_start_from_other_losses() -> None:
    summary = sample(-0.0081, 0.0028)
    summary["midtrain"]["dispersed"]["log"][0]["loss"] += 0.5
    assert "did not compute both alike" in verdict(summary)["sentence"]
    assert verdict({**summary, "runs": [{"title": "a"}, {"title": "b"}]})["label"] == "helps"


def test_a_loss_that_is_not_per_token_is_no_headline() -> None:
    summary = sample()
    for by_task in summary["comparison"]["dispersed"].values():
        loss = by_task.pop("heldout_perplexity")
        loss["nll_difference"] = {**difference(0.03, 0.001), "per": "item"}  # LAMBADA: one last word
        by_task["lambada_openai"] = loss
    said = verdict(summary)
    assert said["headline"]["task"] == "mean of tasks"
    assert "nats" not in said["sentence"] and said["per_precision"] == {}


def test_where_no_noise_floor_was_measured_the_rules_say_so() -> None:
    assert verdict({**sample(), "noise": {}})["rules"][-1].startswith("Here the noise floor was not")


def test_more_items_are_not_promised_to_take_away_the_luck_of_training() -> None:
    summary = sample()
    mean = summary["means"]["dispersed"]["int4"]
    mean |= {"low": mean["difference"] - 0.05, "high": mean["difference"] + 0.05}
    mean["seeds"] = {"item_low": mean["difference"] - 0.01, "item_high": mean["difference"] + 0.01}
    said = verdict(summary)["sentence"]
    assert "7.1 points or more; more of that is the luck of training than the choice of items" in said


def test_a_supporting_loss_below_the_noise_floor_is_not_counted() -> None:
    summary = sample()
    summary["comparison"]["dispersed"]["int8"] = comparison(-0.05, 0.001)
    assert "1 shows a difference" in verdict(summary)["sentence"]
    summary["noise"]["int8"]["floor"] = 0.06
    assert "None of the 11 other comparisons shows a difference" in verdict(summary)["sentence"]


def test_the_power_constants_are_those_of_the_normal_distribution() -> None:
    assert detectable(1.0) == pytest.approx(power.factor() / stats.norm.ppf(0.975), rel=1e-6)
    assert PUBLISHED_POINTS == power.PUBLISHED_POINTS


def test_interval_below_zero_helps_and_above_hurts() -> None:
    helps, hurts = verdict(sample(-0.0081, 0.0028)), verdict(sample(0.0081, 0.0028))
    assert (helps["label"], hurts["label"]) == ("helps", "hurts")
    assert helps["parts"][0] == "Dispersion helps at int4: perplexity 14.92 -> 14.80 (-0.81 %)."
    assert hurts["parts"][0] == "Dispersion hurts at int4: perplexity 14.92 -> 15.04 (+0.81 %)."
    assert "seed" in helps["parts"][-1]


def test_a_hair_on_a_supporting_test_is_no_claim() -> None:
    summary = sample()
    summary["comparison"]["dispersed"]["torch"]["heldout_cloze"].update(difference(0.03, 0.0299))
    said = verdict(summary)
    assert said["label"] == "no measurable difference"
    assert said["parts"][0] == "No measurable difference in held-out loss at int4."
    assert (
        "Of 11 other comparisons, 1 shows a difference (heldout_cloze at torch fp32 better)"
        in said["sentence"]
    )
    assert "none survives Holm's correction" in said["sentence"]


def test_a_strong_supporting_test_against_a_null_headline_cannot_tell() -> None:
    summary = sample()
    summary["comparison"]["dispersed"]["int8"]["heldout_cloze"].update(difference(-0.12, 0.03))
    said = verdict(summary)
    assert said["label"] == "cannot tell at this size"
    assert "1 survives Holm's correction: heldout_cloze at int8 worse" in said["sentence"]


def test_the_headline_decides_and_disagreement_is_told() -> None:
    summary = sample(-0.0081, 0.0028)
    summary["comparison"]["dispersed"]["fp32"] = comparison(0.02, 0.003)
    said = verdict(summary)
    assert said["label"] == "helps"
    assert "heldout_perplexity at onnx fp32 worse" in said["sentence"]
    assert said["per_precision"]["fp32"]["label"] == "hurts"
    assert said["per_precision"]["int4"]["label"] == "helps"
    assert said["per_precision"]["int8"]["label"] == "no measurable difference"


def test_a_smoke_run_claims_nothing() -> None:
    said = verdict({**sample(-0.5, 0.001), "smoke": True})
    assert said["label"] == "cannot tell at this size"
    assert "smoke run" in said["parts"][0]


@pytest.mark.parametrize(
    ("documents", "label"), [(FEWEST_DOCUMENTS - 1, "cannot tell at this size"), (FEWEST_DOCUMENTS, "helps")]
)
def test_too_few_documents_claim_nothing(documents: int, label: str) -> None:
    summary = sample(-0.0081, 0.0028)
    summary["comparison"]["dispersed"]["int4"]["heldout_perplexity"]["documents"] = documents
    assert verdict(summary)["label"] == label


@pytest.mark.parametrize(
    ("half", "label"),
    [(WIDEST_NULL * 0.99, "no measurable difference"), (WIDEST_NULL * 1.01, "cannot tell at this size")],
)
def test_a_wide_null_cannot_tell(half: float, label: str) -> None:
    assert verdict(sample(0.001, half))["label"] == label


def test_a_wide_null_says_what_it_would_cost_to_know() -> None:
    said = verdict(sample(0.001, 0.04))
    # 2.86 times as much as is to be seen would be found 4 times out of 5: it takes 8.2 times the documents.
    assert "less than 0.057 nats" in said["parts"][0] and "About 3,400 held-out" in said["parts"][0]
    assert verdict(sample(0.05, 0.04))["label"] == "hurts"  # wide, yet clear


def test_one_arm_alone_claims_nothing() -> None:
    said = verdict(single_arm())
    assert (said["label"], said["comparisons"]) == ("single arm", 0)
    assert "14.92" in said["sentence"]


def test_no_loss_compared_cannot_tell() -> None:
    assert verdict({**sample(), "comparison": {}})["label"] == "cannot tell at this size"
    tasks_only = {
        p: {"heldout_cloze": by["heldout_cloze"]} for p, by in sample()["comparison"]["dispersed"].items()
    }
    assert verdict({**sample(), "comparison": tasks_only})["label"] == "cannot tell at this size"


def test_identical_arms_are_told_apart_from_unseen_differences() -> None:
    assert "same loss everywhere" in verdict(sample(0.0, 0.0))["sentence"]


def test_headline_is_the_loss_at_the_fewest_bits_compared() -> None:
    found = headline(comparisons(sample()))
    assert found is not None
    assert (found.precision, found.task, found.unit) == ("int4", "heldout_perplexity", "nats")
    summary = sample()
    del summary["comparison"]["dispersed"]["int4"]
    said = verdict(summary)
    assert said["headline"]["precision"] == "int8"
    assert "int4 was built, but its loss was not compared." in said["sentence"]


def test_a_perplexity_without_loss_difference_is_compared_as_perplexity() -> None:
    summary = sample()
    for by_task in summary["comparison"]["dispersed"].values():
        del by_task["heldout_perplexity"]["nll_difference"]
    said = verdict(summary)
    assert said["label"] == "no measurable difference"
    assert "nats" not in said["sentence"]


def test_rules_are_listed() -> None:
    said = verdict(sample())
    assert said["rules"] == list(RULES)
    for label in ("helps", "hurts", "no measurable difference", "cannot tell at this size"):
        assert any(label in rule for rule in RULES)


def test_holm_equals_the_closed_test_of_bonferroni() -> None:
    """Second road: a hypothesis is rejected if every subset that holds it is rejected by Bonferroni."""
    ps = [0.001, 0.012, 0.02, 0.04, 0.3, 0.04]
    closed = []
    for index in range(len(ps)):
        others = [i for i in range(len(ps)) if i != index]
        subsets = [(index, *rest) for size in range(len(ps)) for rest in itertools.combinations(others, size)]
        closed.append(max(min(1.0, len(subset) * min(ps[i] for i in subset)) for subset in subsets))
    assert [one.p_holm for one in holm([entry(p) for p in ps])] == pytest.approx(closed)


def test_p_of_an_interval_agrees_with_scipy_and_with_the_interval() -> None:
    for value in (0.1, 0.5, -2.0):
        expected = 2 * stats.norm.sf(abs(value))
        assert normal_p(value, value - Z95, value + Z95) == pytest.approx(expected, rel=1e-6)
    assert normal_p(1.0, 0.0, 2.0) == pytest.approx(0.05, abs=1e-6)
    assert (normal_p(0.0, 0.0, 0.0), normal_p(1.0, 1.0, 1.0)) == (1.0, 0.0)


def test_a_recorded_p_is_preferred_and_one_that_respects_documents_first() -> None:
    summary = sample()
    summary["comparison"]["dispersed"]["int8"]["heldout_cloze"].update(mcnemar_p=0.125, p_value=0.5)
    summary["comparison"]["dispersed"]["int4"]["heldout_cloze"]["mcnemar_p"] = 0.125
    found = {(one.precision, one.task): one.p for one in comparisons(summary)}
    assert found["int4", "heldout_cloze"] == 0.125
    assert found["int8", "heldout_cloze"] == 0.5


def test_without_a_difference_a_claim_is_made_in_at_most_5_percent_of_builds() -> None:
    """2,000 builds with no true difference and exact normal intervals; twelve comparisons each."""
    rng = np.random.default_rng(0)
    builds, claims, nulls = 2000, 0, 0
    for _ in range(builds):
        summary: dict[str, Any] = {"arms": ["baseline", "dispersed"], "comparison": {}}
        for precision in ("torch", "fp32", "int8", "int4"):
            draws = rng.normal(size=3)
            by_task = comparison(draws[0] * 0.002, Z95 * 0.002)
            for task, draw in zip(("heldout_cloze", "heldout_continuation"), draws[1:]):
                by_task[task].update(difference(draw * 0.01, Z95 * 0.01))
            summary["comparison"][precision] = by_task
        label = verdict(summary)["label"]
        claims += label in ("helps", "hurts")
        nulls += label == "no measurable difference"
    assert claims / builds <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / builds)
    assert nulls / builds >= 0.89  # at most another 5 % end as "cannot tell" through Holm's survivors
