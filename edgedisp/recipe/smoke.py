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

    Raises BadInput if `model.architecture` is not given: the twin is made without opening the base.
    """
    if recipe.model.architecture is None:
        raise BadInput(
            f"{where or recipe.path or recipe.name}: model.architecture: missing; --smoke builds a tiny twin "
            "without opening the base, so it needs the model_type of the base's config.json, such as llama, "
            "qwen3, gemma3_text or gpt2"
        )
    values = recipe.model_dump()
    values["name"] = recipe.name if recipe.name.endswith("-smoke") else f"{recipe.name[:94]}-smoke"
    values["seeds"] = min(recipe.seeds, SEEDS)
    values["arms"] = [arm if isinstance(arm, str) else _small_arm(arm) for arm in values["arms"]]
    _shrink_training(values["data"], values["train"])
    _shrink_measurements(values)
    if recipe.quantize.budget is not None:  # a budget for the base fits no twin
        values["quantize"] |= {"budget": None, "max_perplexity_increase": 1.0}
    small = Recipe.model_validate(values, context="smoke")
    small._origin = Origin(recipe.path, smoke=True)
    return small


def _shrink_training(data: dict[str, Any], train: dict[str, Any]) -> None:
    data["context"] = min(data["context"], 128)
    data["heldout"] = max(data["heldout"], 0.1)
    for source in data["train"]:
        source["limit"] = min(source["limit"] or DOCUMENTS, DOCUMENTS)
    train["batch"], train["accumulate"] = min(train["batch"], 4), min(train["accumulate"], 2)
    train["tokens"] = STEPS * train["batch"] * train["accumulate"] * data["context"]
    train["checkpoint_every"] = STEPS // 2
    if train["dispersion"] and not isinstance(train["dispersion"]["layers"], str):
        train["dispersion"]["layers"] = "all"  # the twin has two layers; a listed one may not exist


def _shrink_measurements(values: dict[str, Any]) -> None:
    evaluate, verify, latency = values["evaluate"], values["verify"], values["latency"]
    # Tasks of lm-evaluation-harness need a hub for their items, unless the user has them in a folder.
    if evaluate["tasks_path"] is None:
        local = [task for task in evaluate["tasks"] if task.startswith("heldout")]
        evaluate["tasks"] = local or list(HELDOUT_TASKS)
    evaluate["limit"], evaluate["bootstrap"] = min(evaluate["limit"], 8), min(evaluate["bootstrap"], 200)
    evaluate["perplexity_tokens"] = min(evaluate["perplexity_tokens"] or 2048, 2048)
    evaluate["divergence_tokens"] = min(evaluate["divergence_tokens"], 256)
    verify["tokens"] = min(verify["tokens"], 64)
    # The logits of a barely trained twin are nearly flat, so rounding changes which token is best: bundles of
    # GPT-2, Gemma and Qwen3 twins kept 91-96 % (int8) and 59-77 % (int4); a broken one keeps 0.2 %. The
    # limits on fp32 and on divergence stay.
    verify["int8_top1"], verify["int4_top1"] = min(verify["int8_top1"], 0.8), min(verify["int4_top1"], 0.3)
    for key, most in {"prompt": 16, "generate": 8, "repetitions": 2, "pause_s": 0.0}.items():
        latency[key] = min(latency[key], most)


def _small_arm(arm: dict[str, Any]) -> dict[str, Any]:
    """An arm without layers that the twin may lack or resets after its last step."""
    small = dict(arm)
    if not isinstance(small.get("dispersion", {}).get("layers", ""), str):
        small["dispersion"] = {**small["dispersion"], "layers": "all"}
    if isinstance(small.get("active_forgetting"), int):
        small["active_forgetting"] = min(small["active_forgetting"], STEPS // 2)
    return small
