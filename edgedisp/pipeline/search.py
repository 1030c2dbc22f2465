"""The int4 bundle whose weights' bits, groups and methods are searched for, under the recipe's budget.

Sensitivities are measured on the training text, never on what is scored later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import read
from edgedisp.pipeline.options import SearchOptions
from edgedisp.quantize.knapsack import Solution
from edgedisp.quantize.mixed_precision import MixedPrecision, Search, SearchText
from edgedisp.quantize.onnx_rewrite import quantize_assigned


@dataclass(frozen=True)
class SearchInputs:
    """bundle: the fp32 one. decider: the bundle of the arm whose search decides for this one too."""

    bundle: Path
    model: Path
    corpus: Path
    decider: Path | None = None


def quantize_searched(
    options: SearchOptions, *, output_dir: Path, progress: Progress, **folders: Path
) -> dict[str, Any]:
    """Search, or take the assignment of the arm that decides; `folders` as in SearchInputs.

    The record is that of `quantize_assigned`, with `search`: {goal, size_bytes} and, of a search, {trials}
    and what `Search.record` gives, with gptq also what its own rounding came to; else {decided_by,
    measured_kl, perplexity_increase}.

    BadInput when the goal is out of reach, saying what is not; BuildFailed when gptq ends above the limit.
    """
    int4, seed, inputs = options.int4, options.seed, SearchInputs(**folders)
    bundle, decider = inputs.bundle, inputs.decider
    is_gptq = int4.method == "gptq"
    torch_model = models.load(inputs.model)
    tokens = np.load(inputs.corpus / "tokens.npy", mmap_mode="r", allow_pickle=False)
    text = SearchText.of(tokens, torch_model, int4.calibration_tokens if is_gptq else None)
    search: dict[str, Any] = {
        "goal": {"budget": options.budget, "max_perplexity_increase": options.max_perplexity_increase}
    }
    if decider is None:
        searched = Search(
            bundle, torch_model, text, accuracy_level=int4.accuracy_level, seed=seed, progress=progress
        )
        chosen, trials = _solve(options, searched)
        search |= {**searched.record(chosen), "trials": trials}
        assignment = searched.assignment(chosen)
        blocks, cost = searched.round(assignment)
        if is_gptq:
            search["gptq"] = cost
            _check_limit(options.max_perplexity_increase, cost["perplexity_increase"])
    else:
        there = read(decider)
        if there is None:
            raise BuildFailed(f"{decider}: the bundle whose search decides is gone; build again")
        follower = MixedPrecision(bundle, torch_model, text, seed=seed, progress=progress)
        assignment = follower.assignment_of(there.results["by_tensor"], int4.accuracy_level)
        blocks, cost = follower.round(assignment)
        search |= {"decided_by": decider.parent.name, "tokens": follower.reference.tokens}
        search |= {"perplexity_tokens": sum(map(len, text.blocks)), **cost}
    record = quantize_assigned(bundle, output_dir, assignment, blocks=blocks, progress=progress)
    if options.budget is not None and record["size_bytes"] > options.budget:
        raise BuildFailed(f"the bundle takes {record['size_bytes']} bytes, the budget is {options.budget}")
    search["size_bytes"] = record["size_bytes"]
    if is_gptq:
        record["by_tensor"] = [
            row | {"method": "gptq"} if row["component"] not in ("embedding", "head") else row
            for row in record["by_tensor"]
        ]
    named = {"bits": 4, "method": "gptq" if is_gptq else "search", "accuracy_level": int4.accuracy_level}
    return {**named, **record, "search": search}


def _solve(options: SearchOptions, search: Search) -> tuple[Solution, list[dict[str, float]]]:
    if options.budget is not None:
        return search.within(options.budget), []
    if options.max_perplexity_increase is None:
        raise ValueError("a search needs a goal")
    return search.below(options.max_perplexity_increase)


def _check_limit(limit: float | None, found: float) -> None:
    """What was searched held the limit with weights rounded one by one; gptq's must as well."""
    if limit is not None and found > limit:
        raise BuildFailed(
            f"quantize.max_perplexity_increase: after gptq, perplexity on the training text is {found:.2%} "
            f"higher, the limit is {limit:.2%}; another method or more calibration_tokens may hold it"
        )
