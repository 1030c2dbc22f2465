"""Results of tasks paired over seeds, averaged over tasks, and compared after quantization; power."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from score_items import FEW, losses, result

from edgedisp.core.results import Estimate, Seeds
from edgedisp.evaluate.comparison import (
    TaskResult,
    average_task,
    common_items,
    compare_task,
    detectable_accuracy,
    detectable_loss,
    loss_survival,
    mean_difference,
    verdict,
)
from edgedisp.evaluate.statistics import ACCURACY, PERPLEXITY, Resampling, difference, score, with_power

DOCUMENTS, WINDOWS = 40, 3


def test_task_results_are_averaged_and_compared_over_seeds() -> None:
    seeds = [losses(np.random.default_rng([9, seed]), 20, 2, 0.01 * seed, 0.02) for seed in range(3)]
    hard = seeds[0][0]  # the same items in each seed
    before, after = (
        [
            result("t", [{**item, "nll": other["nll"]} for item, other in zip(hard, items)], PERPLEXITY)
            for items in side
        ]
        for side in zip(*seeds)
    )
    compared, mean = compare_task(list(zip(before, after)), FEW), average_task(after, FEW)
    assert mean.main.estimate == score([result.items for result in after], PERPLEXITY, FEW)
    assert compared.main == difference([(a.items, b.items) for a, b in zip(before, after)], PERPLEXITY, FEW)
    assert compared.main.second == mean.main.estimate.value
    assert compared.main.estimate.seeds and mean.main.estimate.seeds
    assert average_task(before[:1]) == before[0].score
    with pytest.raises(ValueError, match="only the same items"):
        average_task([before[0], result("t", hard[1:], PERPLEXITY)])
    cut = common_items([before[0], result("t", hard[1:], PERPLEXITY)])
    assert [len(part.items) for part in cut] == [39, 39] and compare_task([(cut[0], cut[1])], FEW)


# Means over tasks


def task(name: str, right: Any, chance: float | None = None) -> TaskResult:
    items = [
        {"id": k, "document": k, "accuracy": float(share), "nll": 3.0 + share, "tokens": 2}
        for k, share in enumerate(right)
    ]
    return result(name, items, PERPLEXITY if name == "loss" else ACCURACY, chance)


def means(before: dict[str, TaskResult], after: dict[str, TaskResult]) -> Any:
    compared = {name: compare_task([(before[name], after[name])], FEW) for name in before}
    scores = [{name: result.score for name, result in side.items()} for side in (before, after)]
    return mean_difference(*scores, compared)


def test_each_task_counts_once_and_the_intervals_add_as_squares() -> None:
    rng = np.random.default_rng(0)
    shares = {"a": (20, 0.5), "b": (200, 0.6)}
    before, after = ({k: task(k, rng.random(n) < p) for k, (n, p) in shares.items()} for _ in range(2))
    mean = means(before, after)
    parts: Any = [compare_task([(before[name], after[name])], FEW).main.estimate for name in ("a", "b")]
    assert mean.estimate.value == pytest.approx(sum(part.value for part in parts) / 2)
    for bound, sign in (("low", 1), ("high", -1)):
        half = math.hypot(*(part.value - getattr(part, bound) for part in parts)) / 2
        assert mean.estimate.value - getattr(mean.estimate, bound) == pytest.approx(sign * half)
    assert mean.tasks == ("a", "b") and mean.estimate.n == 220
    assert mean.second - mean.first == pytest.approx(mean.estimate.value)


def test_losses_scores_to_100_and_tasks_at_chance_are_left_out() -> None:
    rng = np.random.default_rng(1)
    shares = {"good": 0.7, "also": 0.8, "guessed": 0.2, "loss": 0.5, "bleu": 0.6}
    sides = [
        {
            name: task(name, (rng.random(60) < share) * (40.0 if name == "bleu" else 1.0), 0.25)
            for name, share in shares.items()
        }
        for _ in range(2)
    ]
    mean = means(*sides)
    assert mean.tasks == ("good", "also") and mean.left_out == {"guessed": "at chance"}
    assert sides[0]["guessed"].score.is_at_chance and not sides[0]["good"].score.is_at_chance
    assert means(*({"good": side["good"], "loss": side["loss"]} for side in sides)) is None


def test_the_luck_of_seeds_is_shared_by_the_tasks_and_widens_the_interval() -> None:
    rng = np.random.default_rng(6)
    first = {name: rng.random(200) < 0.5 for name in "ab"}
    before = {name: task(name, right) for name, right in first.items()}
    afters = [
        {name: task(name, np.where(rng.random(200) < abs(luck), luck > 0, first[name])) for name in first}
        for luck in (0.0, 0.3, -0.3)  # a seed that is good at one task is good at the other
    ]
    pairs = {name: [(before[name], after[name]) for after in afters] for name in "ab"}
    compared: Any = {name: compare_task(pairs[name], FEW) for name in "ab"}
    scores = [{name: side[name].score for name in "ab"} for side in (before, afters[0])]
    mean: Any = mean_difference(*scores, compared)
    spread = mean.estimate.seeds.sd
    by_task = [compared[name].main.estimate.seeds.sd for name in "ab"]
    assert spread > 0.8 * min(by_task)  # not divided by the root of two
    assert mean.estimate.half_width > 4.30 * spread / math.sqrt(3) * 0.99


# After quantization


def of_losses(losses: np.ndarray, tokens: np.ndarray) -> TaskResult:
    """losses: nats per token, [documents, windows]."""
    items = [
        {"id": f"{d}#{w}", "document": f"d{d}", "nll": float(losses[d, w] * count), "tokens": int(count)}
        for (d, w), count in np.ndenumerate(tokens)
    ]
    return result("loss", items, PERPLEXITY)


def four(full: float, quantized: float) -> tuple[list[list[TaskResult]], np.ndarray, np.ndarray]:
    """Results of four models with these mean differences; losses [4, documents, windows]; tokens."""
    rng, size = np.random.default_rng(2), (DOCUMENTS, WINDOWS)
    hard, cost = 3 + rng.normal(size=size), 0.2 + 0.05 * rng.normal(size=size)
    noise, tokens = 0.002 * rng.normal(size=(2, *size)), rng.integers(20, 200, size)
    losses = np.stack([hard, hard + full + noise[0], hard + cost, hard + cost + quantized + noise[1]])
    return [[of_losses(model, tokens)] for model in losses], losses, tokens


def test_the_differences_are_the_direct_formula_with_the_intervals_of_the_paired_comparison() -> None:
    results, losses, tokens = four(-0.03, -0.02)
    resampling = Resampling(500, 3)
    survival = loss_survival(results, resampling)
    means = (losses * tokens).sum(axis=(1, 2)) / tokens.sum()
    assert survival.change.value == pytest.approx((means[3] - means[2]) - (means[1] - means[0]))
    for estimate, model in ((survival.full, 0), (survival.quantized, 2)):
        pair = results[model][0].items, results[model + 1][0].items
        alone: Any = difference([pair], PERPLEXITY, resampling).nats
        bounds = (estimate.value, estimate.low, estimate.high)
        assert bounds == pytest.approx((alone.value, alone.low, alone.high))
    assert survival.change.n == DOCUMENTS * WINDOWS and survival.change.documents == DOCUMENTS


def test_the_words_follow_the_intervals() -> None:
    cases = {
        "nothing": (0.0, -0.03), "kept": (-0.03, -0.03), "weaker": (-0.03, -0.01),
        "stronger": (-0.03, -0.06), "reversed": (-0.03, 0.03), "unclear": (-0.03, 0.0),
    }  # fmt: skip
    for word, (full, quantized) in cases.items():
        assert loss_survival(four(full, quantized)[0]).verdict == word
    assert loss_survival(four(0.03, 0.01)[0]).verdict == "weaker"
    clear, around = Estimate(0.15, 0.1, 0.2), Estimate(0.1, -0.1, 0.2)
    assert verdict(clear, clear, around) == "kept" and verdict(around, clear, clear) == "nothing"


def test_power_is_the_textbooks_for_many_items_and_less_for_few() -> None:
    assert detectable_accuracy(10**5) == pytest.approx(2.8016 * math.sqrt(0.06 / 10**5), rel=0.01)
    assert detectable_loss(10**5, "int8") == pytest.approx(2.8016 * 0.0105 / math.sqrt(10**5), rel=1e-3)
    assert detectable_loss(20, "int8") == pytest.approx(2.954 * 0.0105 / math.sqrt(20), rel=1e-3)
    assert [detectable_accuracy(items) for items in (1, 5)] == [1.0, 1.0]  # 5 against 0: p is 0.0625
    assert detectable_accuracy(6) < 1.0
    many, few = (with_power(Estimate(0, -1, 1, documents=n)).detectable for n in (10**6, 20))
    assert many == pytest.approx(2.8016 / 1.96, rel=1e-3) and few == pytest.approx(1.475, abs=1e-3)
    seeds = Seeds((0.0, 0.1, 0.2), 0.1, -0.6, 0.6)
    both = with_power(Estimate(0, -1, 1, documents=20, seeds=seeds)).detectable
    assert both == pytest.approx(math.hypot(0.6 * few, 0.8 * 2.039), abs=1e-3)
