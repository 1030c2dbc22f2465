"""Every recipe that ships: it loads, it can be tried small, and its header says what one must know."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedisp.core.distributed import split
from edgedisp.core.files import data_folder
from edgedisp.recipe import load

FILES = sorted(data_folder("recipes").rglob("*.y*ml"))


def recipe_file(name: str) -> Path:
    return data_folder("recipes") / f"{name}.yaml"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_loads_can_be_tried_small_and_says_what_it_needs(path: Path) -> None:
    whole, small = load(path), load(path, smoke=True)
    assert whole.name == path.stem and {"fp32", "int4"} <= set(whole.precisions)
    assert [arm.name for arm in whole.arms][:2] == ["baseline", "dispersed"]
    assert whole.data.train[0].sha256 or not whole.data.train[0].source.startswith("pypi:")
    assert small.is_smoke and small.model.architecture == whole.model.architecture
    assert small.steps == 8 and small.train.tokens <= 10_000 and small.data.context <= 128
    assert all(task.startswith("heldout_") for task in small.evaluate.tasks)
    assert small.train.adapter == whole.train.adapter and small.train.dispersion == whole.train.dispersion
    assert [arm.name for arm in small.arms] == [arm.name for arm in whole.arms]
    header = path.read_text(encoding="utf-8").split("\nname:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for words in (
        f"edgedisp build {path.stem}\n",
        "Needs:",
        "time ",
        "memory ",
        "disk ",
        "Model: ",
        "Text: ",
    ):
        assert words in header
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 110


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
    recipe = load(recipe_file(name))
    train, dispersion = recipe.train, recipe.train.dispersion
    assert (recipe.model.base, train.lr, recipe.data.context) == (base, lr, context)
    assert recipe.tokens_per_step == 131_072 and train.tokens == 200_000_000 and recipe.steps == 1525
    assert (train.betas, train.weight_decay, train.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert (train.schedule, train.warmup, train.adapter) == ("cosine", 0.2, None)
    assert dispersion is not None and (dispersion.variant, dispersion.weight) == ("angular", 0.1)
    assert (dispersion.layers, dispersion.temperature, dispersion.tokens) == ("all", 1.0, 256)
    assert dispersion.clamp == clamp
    ten = (
        "anli_r2 lambada_openai openbookqa piqa truthfulqa_mc2 winogrande arc_easy arc_challenge medmcqa mmlu"
    )
    assert set(recipe.evaluate.tasks) == {"heldout_perplexity", *ten.split()}


def test_the_recipe_for_eight_gpus_is_the_papers_and_can_be_shared_by_eight() -> None:
    recipe, paper = load(recipe_file("qwen3_0.6b_8gpu")), load(recipe_file("paper_qwen3_0.6b"))
    assert (recipe.tokens_per_step, recipe.steps) == (paper.tokens_per_step, paper.steps) == (131_072, 1525)
    same = {"batch": 4, "accumulate": 8}
    assert recipe.train == paper.train.model_copy(update=same) and recipe.data == paper.data
    assert split(recipe.train.batch, recipe.train.accumulate, 8) == (4, 1)
    small = load(recipe_file("qwen3_0.6b_8gpu"), smoke=True)
    assert split(small.train.batch, small.train.accumulate, 8) == (1, 1)


def test_the_quickstart_needs_no_hub() -> None:
    recipe = load(recipe_file("quickstart"))
    assert recipe.model.base.startswith("pypi:") and recipe.model.sha256
    assert all(source.source.startswith("pypi:") for source in recipe.data.train)
    assert all(task.startswith("heldout_") for task in recipe.evaluate.tasks)
    assert recipe.steps == 39


def test_the_ablation_compares_with_the_papers_baselines_over_three_seeds() -> None:
    recipe = load(recipe_file("ablation"))
    adds = {run.arm: run.adds for run in recipe.arm_runs}
    assert list(adds) == ["baseline", "dispersed", "dispersed_1", "neftune", "active_forgetting"]
    weights = [adds[arm]["dispersion"]["weight"] for arm in ("dispersed", "dispersed_1")]
    assert weights == [0.1, 1.0] and adds["neftune"] == {"neftune": 5.0}
    assert adds["active_forgetting"] == {"active_forgetting": 26} and recipe.steps == 39
    assert len(recipe.arm_runs) == 15
    shared = ("model", "data", "train", "seed")
    quickstart = load(recipe_file("quickstart"))
    assert all(getattr(recipe, key) == getattr(quickstart, key) for key in shared)
