"""The int4 bundle whose weights' bits, groups and methods are searched for, under the recipe's budget.

Sensitivities are measured on the training text, never on what is scored later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import read
from edgedisp.quantize.knapsack import Solution
from edgedisp.quantize.mixed_precision import MixedPrecision, Search, SearchText
from edgedisp.quantize.onnx_rewrite import quantize_assigned
from edgedisp.recipe import Quantize


def quantize_searched(
    section: Quantize,
    seed: int,
    parent: Path,
    model_folder: Path,
    corpus_folder: Path,
    own: Path,
    progress: Progress,
    decided: Path | None = None,
) -> dict[str, Any]:
    """`decided`: the bundle of the arm whose search decides for this one too; None searches.

    The record is that of `quantize_assigned`, with `search`: {goal, size_bytes} and, of a search, {trials}
    and what `Search.record` gives, with gptq also what its own rounding came to; else {decided_by,
    measured_kl, perplexity_increase}.

    BadInput when the goal is out of reach, saying what is not; BuildFailed when gptq ends above the limit.
    """
    int4 = section.int4
    is_gptq = int4.method == "gptq"
    opened = models.load(model_folder)
    tokens = np.load(corpus_folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    text = SearchText.of(tokens, opened, int4.calibration_tokens if is_gptq else None)
    search: dict[str, Any] = {
        "goal": {"budget": section.budget, "max_perplexity_increase": section.max_perplexity_increase}
    }
    if decided is None:
        searched = Search(
            parent, opened, text, accuracy_level=int4.accuracy_level, seed=seed, progress=progress
        )
        chosen, trials = _solve(section, searched)
        search |= {**searched.record(chosen), "trials": trials}
        assignment = searched.assignment(chosen)
        blocks, cost = searched.round(assignment)
        if is_gptq:
            search["gptq"] = cost
            _check_limit(section.max_perplexity_increase, cost["perplexity_increase"])
    else:
        there = read(decided)
        if there is None:
            raise BuildFailed(f"{decided}: the bundle whose search decides is gone; build again")
        follower = MixedPrecision(parent, opened, text, seed=seed, progress=progress)
        assignment = follower.assignment_of(there.results["by_tensor"], int4.accuracy_level)
        blocks, cost = follower.round(assignment)
        search |= {"decided_by": decided.parent.name, "tokens": follower.reference.tokens}
        search |= {"perplexity_tokens": sum(map(len, text.blocks)), **cost}
    record = quantize_assigned(parent, own, assignment, blocks=blocks, progress=progress)
    if section.budget is not None and record["size_bytes"] > section.budget:
        raise BuildFailed(f"the bundle takes {record['size_bytes']} bytes, the budget is {section.budget}")
    search["size_bytes"] = record["size_bytes"]
    if is_gptq:
        record["by_tensor"] = [
            row | {"method": "gptq"} if row["component"] not in ("embedding", "head") else row
            for row in record["by_tensor"]
        ]
    named = {"bits": 4, "method": "gptq" if is_gptq else "search", "accuracy_level": int4.accuracy_level}
    return {**named, **record, "search": search}


def _solve(section: Quantize, search: Search) -> tuple[Solution, list[dict[str, float]]]:
    if section.budget is not None:
        return search.within(section.budget), []
    if section.max_perplexity_increase is None:
        raise ValueError("a search needs a goal")
    return search.below(section.max_perplexity_increase)


def _check_limit(limit: float | None, found: float) -> None:
    """What was searched held the limit with weights rounded one by one; gptq's must as well."""
    if limit is not None and found > limit:
        raise BuildFailed(
            f"quantize.max_perplexity_increase: after gptq, perplexity on the training text is {found:.2%} "
            f"higher, the limit is {limit:.2%}; another method or more calibration_tokens may hold it"
        )
