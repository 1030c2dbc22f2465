"""The int4 bundle whose weights' bits, groups and methods are searched for, under the recipe's budget.

Sensitivities are measured on the training text, never on what is scored later.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import read
from edgedisp.quantize.candidates import METHODS_TRIED
from edgedisp.quantize.decided import Decided
from edgedisp.quantize.made import Made
from edgedisp.quantize.mixed import Search
from edgedisp.quantize.rewrite import quantize_assigned
from edgedisp.quantize.search import Solution
from edgedisp.recipe import Quantize
from edgedisp.stages.calibration import by_gptq, calibration_text, opened_search
from edgedisp.stages.texts import blocks_of, pieces_of


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

    The record is that of `quantize_assigned`, with `search`: {goal, size_bytes, perplexity_increase,
    trials} and what `Search.record` gives; with gptq also what its own rounding came to.

    BadInput when the goal is out of reach, saying what is not; BuildFailed when gptq ends above the limit.
    """
    int4 = section.int4
    is_gptq = int4.method == "gptq"
    if decided is not None:
        return _as_decided(section, seed, parent, model_folder, corpus_folder, own, progress, decided)
    search = opened_search(section, seed, parent, model_folder, corpus_folder, METHODS_TRIED, progress)
    chosen, trials = _solve(section, search)
    found = {"perplexity_increase": search.increase(chosen), **search.record(chosen), "trials": trials}
    if is_gptq:
        search.release()
        text = calibration_text(int4, corpus_folder)
        made = by_gptq(search.module_grids(chosen), search.model, text, progress)
        search.add_ends(made, chosen)
        found["gptq"] = search.as_it_is(chosen)
        _hold(section.max_perplexity_increase, found["gptq"]["perplexity_increase"])
    else:
        made = search.made(chosen)
    assignment = search.assignment(chosen)
    record = quantize_assigned(parent, own, assignment, made=made, progress=progress)
    if section.budget is not None and record["size_bytes"] > section.budget:
        raise BuildFailed(f"the bundle takes {record['size_bytes']} bytes, the budget is {section.budget}")
    if is_gptq:
        inner = set(search.inner_names)
        record["by_tensor"] = [
            row | {"method": "gptq"} if row["name"] in inner else row for row in record["by_tensor"]
        ]
    goal = {"budget": section.budget, "max_perplexity_increase": section.max_perplexity_increase}
    named = {"bits": 4, "method": "gptq" if is_gptq else "search"}
    searched = {"goal": goal, "size_bytes": record["size_bytes"], **found}
    levels = {"accuracy_level": int4.accuracy_level}
    return named | record | levels | {"search": searched}


def _as_decided(
    section: Quantize,
    seed: int,
    parent: Path,
    model_folder: Path,
    corpus_folder: Path,
    own: Path,
    progress: Progress,
    decided: Path,
) -> dict[str, Any]:
    """The bundle of an arm that follows another one's search."""
    int4, there = section.int4, read(decided)
    if there is None:
        raise BuildFailed(f"{decided}: the bundle whose search decides is gone; build again")
    tokens = np.load(corpus_folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    opened = models.load(model_folder)
    followed = Decided(
        parent,
        opened,
        there.results["by_tensor"],
        pieces_of(tokens, opened),
        blocks_of(tokens),
        accuracy_level=int4.accuracy_level,
        seed=seed,
        progress=progress,
    )
    if int4.method == "gptq":
        text, again = calibration_text(int4, corpus_folder), copy.deepcopy(opened)
        made = by_gptq(followed.module_grids(), again, text, progress)
    else:
        made = Made()
    followed.add(made, ends_alone=int4.method == "gptq")
    record = quantize_assigned(parent, own, followed.assignment, made=made, progress=progress)
    record["by_tensor"] = [
        row | {"method": decider["method"]}
        for row, decider in zip(record["by_tensor"], there.results["by_tensor"], strict=True)
    ]
    goal = {"budget": section.budget, "max_perplexity_increase": section.max_perplexity_increase}
    search = {
        "goal": goal,
        "size_bytes": record["size_bytes"],
        "decided_by": decided.parent.name,
        "tokens": sum(map(len, followed.pieces)),
        "perplexity_tokens": sum(map(len, followed.blocks)),
        **followed.cost(made),
    }
    named = {"bits": 4, "method": there.results["method"]}
    return named | record | {"accuracy_level": int4.accuracy_level, "search": search}


def _solve(section: Quantize, search: Search) -> tuple[Solution, list[dict[str, float]]]:
    if section.budget is not None:
        return search.within(section.budget), []
    if section.max_perplexity_increase is None:
        raise ValueError("a search needs a goal")
    return search.below(section.max_perplexity_increase)


def _hold(limit: float | None, found: float) -> None:
    """What was searched held the limit with weights rounded one by one; gptq's must as well."""
    if limit is not None and found > limit:
        raise BuildFailed(
            f"quantize.max_perplexity_increase: after gptq, perplexity on the training text is {found:.2%} "
            f"higher, the limit is {limit:.2%}; another method or more calibration_tokens may hold it"
        )
