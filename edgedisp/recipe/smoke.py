"""`smoke`: the same recipe, cut down so that every stage runs in a minute on two cores.

Architecture, adapter, dispersion, arms, precisions, schedule, optimizer and quantization stay. Tokens,
sequence length, documents, items and repetitions are cut. The base becomes a tiny random twin of its
architecture (models/tiny_model.py), so no weights are fetched.
"""

from __future__ import annotations

from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.recipe.recipe import Origin, Recipe
from edgedisp.recipe.values import HELDOUT_TASKS

STEPS = 8  # enough for a warm-up, a resume from the checkpoint in the middle, and a schedule
DOCUMENTS = 200  # of each source: a tenth of them held out is enough for eight items
SEEDS = 2  # enough for a variance between seeds


def smoke(recipe: Recipe, where: str | None = None) -> Recipe:
    """The recipe for `--smoke`, named `<name>-smoke`. `where` is the place to name in an error.

    Raises BadInput if `model.architecture` is absent: the twin is made without opening the base.
    """
    if recipe.model.architecture is None:
        raise BadInput(
            f"{where or recipe.path or recipe.name}: model.architecture: missing; --smoke builds a tiny twin "
            "without opening the base, so it needs the model_type of the base's config.json, such as llama, "
            "qwen3, gemma3_text or gpt2"
        )
    values = recipe.model_dump()
    values["name"] = recipe.name if recipe.name.endswith("-smoke") else f"{recipe.name[:94]}-smoke"
    _limit(values, seeds=SEEDS)
    values["arms"] = [_small_arm(arm) if isinstance(arm, dict) else arm for arm in values["arms"]]
    _shrink_training(values["data"], values["train"])
    _shrink_measurements(values["evaluate"], values["verify"])
    _limit(values["latency"], prompt=16, generate=8, repetitions=2, pause_s=0.0)
    if recipe.quantize.budget is not None:  # a budget for the base fits no twin
        values["quantize"] |= {"budget": None, "max_perplexity_increase": 1.0}
    small = Recipe.model_validate(values, context="smoke")
    small._origin = Origin(recipe.path, smoke=True)
    return small


def _limit(section: dict[str, Any], **most: float) -> None:
    """Bound keys of a section from above; a null, which stands for all, becomes the bound."""
    for key, bound in most.items():
        section[key] = bound if section[key] is None else min(section[key], bound)


def _shrink_training(data: dict[str, Any], train: dict[str, Any]) -> None:
    _limit(data, context=128)
    data["heldout"] = max(data["heldout"], 0.1)
    for source in data["train"]:
        _limit(source, limit=DOCUMENTS)
    _limit(train, batch=4, accumulate=2)
    train["tokens"] = STEPS * train["batch"] * train["accumulate"] * data["context"]
    train["checkpoint_every"] = STEPS // 2
    train["dispersion"] = _all_layers(train["dispersion"])


def _shrink_measurements(evaluate: dict[str, Any], verify: dict[str, Any]) -> None:
    # Tasks of lm-evaluation-harness need a hub for their items, unless the user has them in a folder.
    if evaluate["tasks_path"] is None:
        local = [task for task in evaluate["tasks"] if task.startswith("heldout")]
        evaluate["tasks"] = local or list(HELDOUT_TASKS)
    _limit(evaluate, limit=8, bootstrap=200, perplexity_tokens=2048, divergence_tokens=256)
    # The logits of a barely trained twin are nearly flat, so rounding changes which token is best: bundles of
    # GPT-2, Gemma and Qwen3 twins agreed on 91-96 % (int8) and 59-77 % (int4); a broken one agrees on 0.2 %.
    # The limits on fp32 and on divergence stay.
    _limit(verify, tokens=64, int8_top1=0.8, int4_top1=0.3)


def _small_arm(arm: dict[str, Any]) -> dict[str, Any]:
    """An arm without layers that the twin may lack or resets after its last step."""
    small = {**arm, "dispersion": _all_layers(arm.get("dispersion"))}
    if isinstance(small.get("active_forgetting"), int):
        _limit(small, active_forgetting=STEPS // 2)
    return small


def _all_layers(dispersion: dict[str, Any] | None) -> dict[str, Any] | None:
    """A section without listed layers: the twin has two, so that a listed one may not exist."""
    if dispersion is None or isinstance(dispersion.get("layers", "all"), str):
        return dispersion
    return {**dispersion, "layers": "all"}
