"""Every recipe that ships: it loads, it can be tried small, and its header says what one must know."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedisp.core.distributed import split
from edgedisp.core.files import data_folder
from edgedisp.recipe import Recipe, load

FILES = sorted(data_folder("recipes").rglob("*.y*ml"))
HEADER = ("Needs:", "time ", "memory ", "disk ", "Model: ", "Text: ")


def packaged(name: str, smoke: bool = False) -> Recipe:
    return load(data_folder("recipes") / f"{name}.yaml", smoke=smoke)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_loads_can_be_tried_small_and_says_what_it_needs(path: Path) -> None:
    whole, small = load(path), load(path, smoke=True)
    assert whole.name == path.stem and {"fp32", "int4"} <= set(whole.precisions)
    assert [arm.name for arm in whole.arms][:2] == ["baseline", "dispersed"]
    assert whole.data.train[0].sha256 or not whole.data.train[0].source.startswith("pypi:")
    assert small.is_smoke and small.model.architecture == whole.model.architecture
    assert small.steps == 8  # a conversation is not cut into shorter blocks
    assert whole.data.has_chat or (small.train.tokens <= 10_000 and small.data.context <= 128)
    assert all(task.startswith("heldout_") for task in small.evaluate.tasks)
    assert small.train.adapter == whole.train.adapter and small.train.dispersion == whole.train.dispersion
    assert [arm.name for arm in small.arms] == [arm.name for arm in whole.arms]
    text = path.read_text(encoding="utf-8")
    header = text.split("\nname:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert all(words in header for words in (f"edgedisp build {path.stem}\n", *HEADER))
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("name", "base", "lr", "context", "clamp"),
    [
        ("paper_gpt2", "openai-community/gpt2", 5e-5, 1024, 0.1),
        ("paper_qwen3_0.6b", "Qwen/Qwen3-0.6B", 2e-5, 4096, 0.25),
    ],
)
def test_the_paper_recipes_hold_its_settings(
    name: str, base: str, lr: float, context: int, clamp: float
) -> None:
    """arXiv 2602.00217 v3, and the clamps of its scripts."""
    recipe = packaged(name)
    train, dispersion = recipe.train, recipe.train.dispersion
    assert (recipe.model.base, train.lr, recipe.data.context) == (base, lr, context)
    assert recipe.tokens_per_step == 131_072 and train.tokens == 200_000_000 and recipe.steps == 1525
    assert (train.betas, train.weight_decay, train.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert (train.schedule, train.warmup, train.adapter) == ("cosine", 0.2, None)
    assert dispersion is not None and (dispersion.variant, dispersion.weight) == ("angular", 0.1)
    assert (dispersion.layers, dispersion.temperature, dispersion.tokens) == ("all", 1.0, 256)
    assert dispersion.clamp == clamp
    tasks = (
        "anli_r2 lambada_openai openbookqa piqa truthfulqa_mc2 winogrande arc_easy arc_challenge medmcqa mmlu"
    )
    assert set(recipe.evaluate.tasks) == {"heldout_perplexity", *tasks.split()}


def test_the_recipe_for_eight_gpus_is_the_papers_and_can_be_shared_by_eight() -> None:
    recipe, paper = packaged("qwen3_0.6b_8gpu"), packaged("paper_qwen3_0.6b")
    assert (recipe.tokens_per_step, recipe.steps) == (paper.tokens_per_step, paper.steps) == (131_072, 1525)
    same = {"batch": 4, "accumulate": 8}
    assert recipe.train == paper.train.model_copy(update=same) and recipe.data == paper.data
    assert split(recipe.train.batch, recipe.train.accumulate, 8) == (4, 1)
    small = packaged("qwen3_0.6b_8gpu", smoke=True)
    assert split(small.train.batch, small.train.accumulate, 8) == (1, 1)


def test_wikipedia_needs_no_hub_and_the_ablation_adds_the_papers_baselines_and_seeds() -> None:
    wikipedia, ablation = packaged("wikipedia"), packaged("ablation")
    assert wikipedia.model.base.startswith("pypi:") and wikipedia.model.sha256
    assert all(source.source.startswith("pypi:") for source in wikipedia.data.train)
    assert all(task.startswith("heldout_") for task in wikipedia.evaluate.tasks)
    shared = ("model", "data", "train", "seed", "steps")
    assert all(getattr(ablation, key) == getattr(wikipedia, key) for key in shared) and ablation.steps == 39
    adds = {run.arm: run.adds for run in ablation.arm_runs}
    assert list(adds) == ["baseline", "dispersed", "dispersed_1", "neftune", "active_forgetting"]
    weights = [adds[arm]["dispersion"]["weight"] for arm in ("dispersed", "dispersed_1")]
    assert weights == [0.1, 1.0] and adds["neftune"] == {"neftune": 5.0}
    assert adds["active_forgetting"] == {"active_forgetting": 26} and len(ablation.arm_runs) == 15
