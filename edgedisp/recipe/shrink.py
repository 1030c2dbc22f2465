"""`smoke`: the same recipe, cut down so that every stage runs in a minute on two cores.

What is proven stays: architecture, adapter, dispersion, arms, precisions, schedule, optimizer, quantization.
What costs time is cut: tokens, sequence length, documents, items, repetitions. The base is replaced by a tiny
random twin of its architecture (models/tiny_model.py), so that no weights are fetched.
"""

from __future__ import annotations

from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.recipe.kinds import HELDOUT_TASKS
from edgedisp.recipe.schema import Origin, Recipe

STEPS = 8
"""Optimizer steps: enough for a warm-up, a resume from the checkpoint in the middle, and a schedule."""
DOCUMENTS = 200
"""Documents read from each source: a tenth of them held out is enough for eight items."""

SEEDS = 2
"""Trainings of each arm: enough for a variance between seeds."""


def smoke(recipe: Recipe, where: str | None = None) -> Recipe:
    """The recipe for `--smoke`, named `<name>-smoke`. `where` is the place to name in an error.

    Raises BadInput if `model.architecture` is not given: the twin is made without opening the base.
    """
    if recipe.model.architecture is None:
        raise BadInput(
            f"{where or recipe.path or recipe.name}: model.architecture: missing; --smoke builds a tiny twin "
            "without opening the base, so it needs the model_type of the base's config.json, such as llama, "
            "qwen3, gemma3_text or gpt2"
        )
    cut = recipe.model_dump()
    data, train, evaluate = cut["data"], cut["train"], cut["evaluate"]
    cut["name"] = recipe.name if recipe.name.endswith("-smoke") else f"{recipe.name[:94]}-smoke"
    data["context"] = min(data["context"], 128)
    data["heldout"] = max(data["heldout"], 0.1)
    for source in data["train"]:
        source["limit"] = min(source["limit"] or DOCUMENTS, DOCUMENTS)
    train["batch"], train["accumulate"] = min(train["batch"], 4), min(train["accumulate"], 2)
    train["tokens"] = STEPS * train["batch"] * train["accumulate"] * data["context"]
    train["checkpoint_every"] = STEPS // 2
    if train["dispersion"] and not isinstance(train["dispersion"]["layers"], str):
        train["dispersion"]["layers"] = "all"  # the twin has two layers; a listed one may not exist
    cut["arms"] = [_small_arm(arm) for arm in cut["arms"]]
    cut["seeds"] = min(cut["seeds"], SEEDS)
    # Tasks of lm-evaluation-harness need a hub for their items, unless the user has them in a folder.
    if evaluate["tasks_path"] is None:
        evaluate["tasks"] = [task for task in evaluate["tasks"] if task.startswith("heldout")] or list(
            HELDOUT_TASKS
        )
    evaluate["limit"], evaluate["bootstrap"] = min(evaluate["limit"], 8), min(evaluate["bootstrap"], 200)
    evaluate["perplexity_tokens"] = min(evaluate["perplexity_tokens"] or 2048, 2048)
    evaluate["divergence_tokens"] = min(evaluate["divergence_tokens"], 256)
    cut["verify"]["tokens"] = min(cut["verify"]["tokens"], 64)
    # The logits of a barely trained twin are nearly flat, so rounding changes which token is best: bundles of
    # GPT-2, Gemma and Qwen3 twins kept 91-96 % (int8) and 59-77 % (int4); a broken one keeps 0.2 %. The
    # limits on fp32 and on divergence stay.
    cut["verify"]["int8_top1"] = min(cut["verify"]["int8_top1"], 0.8)
    cut["verify"]["int4_top1"] = min(cut["verify"]["int4_top1"], 0.3)
    if recipe.quantize.budget is not None:  # a budget for the base fits no twin
        cut["quantize"] |= {"budget": None, "max_perplexity_increase": 1.0}
    cut["latency"] |= {
        "prompt": min(recipe.latency.prompt, 16),
        "generate": min(recipe.latency.generate, 8),
        "repetitions": min(recipe.latency.repetitions, 2),
        "pause_s": 0.0,
    }
    small = Recipe.model_validate(cut)
    small._origin = Origin(recipe.path, smoke=True)
    return small


def _small_arm(arm: str | dict[str, Any]) -> str | dict[str, Any]:
    """An arm as it is written, without layers that the twin may lack or resets after its last step."""
    if isinstance(arm, str):
        return arm
    small = dict(arm)
    if not isinstance(small.get("dispersion", {}).get("layers", ""), str):
        small["dispersion"] = {**small["dispersion"], "layers": "all"}
    if isinstance(small.get("active_forgetting"), int):
        small["active_forgetting"] = min(small["active_forgetting"], STEPS // 2)
    return small
