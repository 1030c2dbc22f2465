"""`Recipe`: the top level of the keys, the rules over two keys, and what follows from them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from annotated_types import Ge, Le, MinLen
from pydantic import AfterValidator, PrivateAttr, ValidationInfo, model_validator
from ruamel.yaml import YAML

from edgedisp.recipe import values
from edgedisp.recipe.arms import PLAIN_ARMS, Arm, ArmRun
from edgedisp.recipe.schema import Data, Evaluate, Latency, Model, Quantize, Verify
from edgedisp.recipe.train_schema import Train
from edgedisp.recipe.values import WHOLE, Key, Section, Unique, accepts, check_rules, unique

ONLOOKERS = ("watch_every", "report_to", "checkpoint_every")
"""Keys of `train` that change no weight: with another value, a finished training stays valid."""

Problems = Iterator[tuple[Key, str]]


@dataclass(frozen=True)
class Origin:
    """Where a recipe was read (not compared), and whether `smoke` cut it down (compared: another base)."""

    path: Path | None = field(default=None, compare=False)
    smoke: bool = False


class Recipe(Section):
    """One build: a base model, its text, and what is made of them. `load` reads it from YAML."""

    name: values.FolderName
    """names the run's folder"""
    seed: values.Seed = 0
    """seed of data order, training and scoring"""
    model: Model
    """where training starts"""
    data: Data
    """the text"""
    train: Train
    """the training of each arm"""
    arms: Annotated[
        tuple[Arm, ...],
        AfterValidator(lambda arms: unique(arms, lambda arm: arm.name.casefold())),
        MinLen(1),
        accepts(f"a list, each one of {', '.join(PLAIN_ARMS)}, or a mapping"),
    ] = (Arm.model_validate("baseline"), Arm.model_validate("dispersed"))
    """the ways of training that are compared with the baseline"""
    seeds: Annotated[int, Ge(1), Le(1000), WHOLE] = 1
    """trainings of every arm, with the seeds seed, seed + 1, ..."""
    precisions: Annotated[tuple[values.Precision, ...], Unique, MinLen(1)] = ("fp32", "int8", "int4")
    """the bundles that are checked, scored and timed"""
    quantize: Quantize = Quantize()
    """how int8 and int4 are made"""
    verify: Verify = Verify()
    """how far a bundle may be from the torch model"""
    evaluate: Evaluate = Evaluate()
    """what is scored"""
    latency: Latency = Latency()
    """what is timed"""
    targets: Annotated[tuple[values.TargetName, ...], Unique] = ()
    """devices (profiles in export/targets) for which each arm's measured bundle is packed"""

    _origin: Origin = PrivateAttr(default=Origin())

    @model_validator(mode="after")
    def _check_rules(self, info: ValidationInfo) -> Self:
        rules = [_arms, _steps_and_seeds, _forgetting, _aware, _distributed, _search]
        if info.context != "smoke":  # the twin has two layers, so that arms may train alike
            rules.append(_alike)
        check_rules("Recipe", (problem for rule in rules for problem in rule(self)))
        return self

    @property
    def path(self) -> Path | None:
        """The file this recipe was read from; None for one made in Python."""
        return self._origin.path

    @property
    def is_smoke(self) -> bool:
        """True for a recipe that `smoke` made: its base is to be replaced by a tiny random twin."""
        return self._origin.smoke

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the recipe start from."""
        return self.path.parent if self.path else Path()

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step: batch x accumulate x context."""
        return self.train.batch * self.train.accumulate * self.data.context

    @property
    def steps(self) -> int:
        """Whole optimizer steps that `train.tokens` pays for, at least 1 in a checked recipe."""
        return self.train.tokens // self.tokens_per_step

    @property
    def arm_runs(self) -> tuple[ArmRun, ...]:
        """Every training: all arms with the first seed, then all with the second, and so on."""
        shared, steps = self.train.dispersion, self.steps
        replicas = range(self.seeds)
        return tuple(arm.run(shared, self.seed, replica, steps) for replica in replicas for arm in self.arms)

    def identity(self) -> dict[str, Any]:
        """What names the run: model, data, seed and train, without ONLOOKERS, as JSON-able values."""
        identity = self.model_dump(mode="json", include={"model", "data", "seed", "train"})
        for key in ONLOOKERS:
            del identity["train"][key]
        return identity

    @property
    def hash8(self) -> str:
        """Suffix of the run folder, from `identity`: another precision, task, arm or seed reuses the run."""
        return hash8(self.identity())

    def to_yaml(self) -> str:
        """The resolved recipe, every key with its value; `load` reads it back to an equal Recipe."""
        yaml = YAML()
        yaml.width = 10**6  # never fold: a folded line is hard to read and to search
        stream = io.StringIO()
        yaml.dump(self.model_dump(mode="json"), stream)
        return stream.getvalue()


def hash8(identity: dict[str, Any]) -> str:
    """First 8 digits of the SHA-256 of `identity` as canonical JSON."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


# ---------------------------------------------------------------- rules over two keys


def _arms(recipe: Recipe) -> Problems:
    dispersed = [arm.name for arm in recipe.arms if arm.dispersion is not None]
    if dispersed and recipe.train.dispersion is None:
        works = "leave the key out for the paper's settings, or write arms: [baseline]"
        yield ("train", "dispersion"), f"null, but the arm '{dispersed[0]}' needs it; {works}"


def _alike(recipe: Recipe) -> Problems:
    arm_of: dict[str, str] = {}
    for run in recipe.arm_runs[: len(recipe.arms)]:
        other = arm_of.setdefault(repr(run.adds), run.arm)
        if other != run.arm and recipe.train.dispersion is not None:
            words = f"the arms '{other}' and '{run.arm}' train alike, so comparing them shows nothing"
            yield ("arms",), f"{words}; drop one, or give it another weight or technique"
            return


def _steps_and_seeds(recipe: Recipe) -> Problems:
    train, needed = recipe.train, recipe.tokens_per_step
    if recipe.steps < 1:
        factors = f"batch {train.batch} x accumulate {train.accumulate} x context {recipe.data.context}"
        words = f"{train.tokens:,} tokens, but one optimizer step takes {needed:,} ({factors}); needs"
        yield ("train", "tokens"), f"{words} at least {needed}, or a smaller batch, accumulate or context"
    if recipe.seed + recipe.seeds > 2**32:
        words = f"counting up {recipe.seeds} from seed {recipe.seed} passes {2**32 - 1}"
        yield ("seeds",), f"{words}; needs fewer seeds, or a smaller seed"


def _forgetting(recipe: Recipe) -> Problems:
    """An embedding that is never drawn anew, or that an adapter leaves frozen after it was."""
    for index, (arm, run) in enumerate(zip(recipe.arms, recipe.arm_runs)):
        every, is_auto = run.techniques.get("active_forgetting"), arm.active_forgetting == "auto"
        key: Key = ("arms", index) if is_auto else ("arms", index, "active_forgetting")
        if every is not None and recipe.train.adapter is not None:
            words = "an adapter leaves the embedding frozen, so an embedding drawn anew would stay noise"
            yield key, f"{words}; train all weights (adapter: null), or drop the arm"
        elif every is not None and 1 <= recipe.steps <= every:
            works = f"at most {recipe.steps - 1}" if recipe.steps > 1 else "more train.tokens"
            words = f"the run has {recipe.steps} step(s) and the embedding is drawn anew every {every}"
            yield key, f"{words}, so it never would be; needs {works}"


def _aware(recipe: Recipe) -> Problems:
    """Roundings that cannot be trained under, and weights that cannot be rounded in training."""
    aware, adapter, key = (
        recipe.train.quantization_aware,
        recipe.train.adapter,
        ("train", "quantization_aware"),
    )
    if aware is None:
        return
    method = getattr(recipe.quantize, aware.precision).method
    method_key = ("quantize", aware.precision, "method")
    if aware.precision not in recipe.precisions:
        yield key, f"{aware.precision} is not among precisions, so the bundle would not ship; add it"
    if method not in ("rtn", "gptq"):
        yield method_key, f"'{method}' is no rounding to train under; needs rtn or gptq"
    if method == "gptq" and recipe.train.compile:
        words = "compiled layers cannot be calibrated in the middle of training"
        yield ("train", "compile"), f"{words}; needs false, or method: rtn"
    if aware.precision == "int4" and recipe.quantize.searched:
        yield key, "training under rounding and a searched int4 bundle cannot be combined; drop one"
    if recipe.train.distributed is not None:
        yield key, "FSDP divides each weight among processes, and rounding needs it whole; drop one"
    if adapter is not None and adapter.kind == "qlora":
        yield key, "kind qlora stores the base quantized; rounding needs kind: lora, or no adapter"
    elif adapter is not None and adapter.dropout:
        words = f"with adapter.dropout {adapter.dropout:g} no step computes with the merged weight"
        yield key, f"{words}; needs 0"
    elif adapter is not None and method == "gptq":
        words = (
            "gptq starts training from other weights than the base's, and an adapter leaves the base alone"
        )
        yield method_key, f"{words}; needs rtn, or no adapter"


def _distributed(recipe: Recipe) -> Problems:
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


def _search(recipe: Recipe) -> Problems:
    """Two goals for one search, or a search whose bundle is not made."""
    quantize = recipe.quantize
    goal = "budget" if quantize.budget is not None else "max_perplexity_increase"
    if quantize.budget is not None and quantize.max_perplexity_increase is not None:
        words = "max_perplexity_increase is there, too: one bounds the size, the other the loss"
        yield ("quantize", goal), f"{words}, and the search minimizes what is not bounded; take one out"
    elif quantize.searched and "int4" not in recipe.precisions:
        words = "it searches the int4 bundle, which precisions lack"
        yield ("quantize", goal), f"{words}; add int4, or take it out"
