"""`Recipe`: the top level of the keys, what follows from them, `smoke`, and the rules over two keys."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Self

from annotated_types import Ge, Le, MinLen
from pydantic import AfterValidator, PrivateAttr, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from ruamel.yaml import YAML

from edgedisp.core.errors import BadInput
from edgedisp.core.files import digest
from edgedisp.core.results import ANSWERS_TASK
from edgedisp.recipe import values
from edgedisp.recipe.arms import PLAIN_ARMS, Arm, ArmRun
from edgedisp.recipe.data_schema import Data
from edgedisp.recipe.schema import Evaluate, Latency, Model, Quantize, Train, Verify
from edgedisp.recipe.values import HELDOUT_TASKS, WHOLE, Key, Section, Unique, accepts, unique

Problems = Iterator[tuple[Key, str]]


@dataclass(frozen=True)
class Origin:
    """Where a recipe and its keys were read (not compared); whether `smoke` cut it down, for another base."""

    path: Path | None = field(default=None, compare=False)
    place: Callable[[Key], str] | None = field(default=None, compare=False)
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
    def _asks_for_answers(self) -> Self:
        """Without a list of tasks, those that the data have."""
        if "tasks" not in self.evaluate.model_fields_set and self.data.has_chat:
            evaluate = self.evaluate.model_copy(update={"tasks": self.heldout_tasks})
            object.__setattr__(self, "evaluate", evaluate)
        return self

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        errors = [
            InitErrorDetails(
                type=PydanticCustomError("rule", "{words}", {"words": words}), loc=key, input=None
            )
            for key, words in chain(_data(self), _training(self), _arms(self), _quantization(self))
        ]
        if errors:
            raise ValidationError.from_exception_data("Recipe", errors)
        return self

    @property
    def is_smoke(self) -> bool:
        """True for a recipe that `smoke` made: its base is to be replaced by a tiny random twin."""
        return self._origin.smoke

    def where(self, key: str) -> str:
        """The start of a message about a key such as `data.train.0.source`: `file:line: key`."""
        place = self._origin.place
        parts = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        return key if place is None else f"{place(parts)}: {key}"

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the recipe start from."""
        path = self._origin.path
        return path.parent if path else Path()

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step: batch x accumulate x context."""
        return self.train.batch * self.train.accumulate * self.data.context

    @property
    def steps(self) -> int | None:
        """Whole optimizer steps that `train.tokens` pays for, at least 1 in a checked recipe. None: the
        corpus says how many `train.epochs` take."""
        return None if self.train.tokens is None else self.train.tokens // self.tokens_per_step

    @property
    def heldout_tasks(self) -> tuple[str, ...]:
        """The tasks that can be made from the data that are held out."""
        texts = () if all(source.is_chat for source in self.data.train) else HELDOUT_TASKS
        return (ANSWERS_TASK, *texts) if self.data.has_chat else texts

    @property
    def arm_runs(self) -> tuple[ArmRun, ...]:
        """Every training: all arms with the first seed, then all with the second, and so on."""
        shared, steps = self.train.dispersion, self.steps
        replicas = range(self.seeds)
        return tuple(arm.run(shared, self.seed, replica, steps) for replica in replicas for arm in self.arms)

    def identity(self) -> dict[str, Any]:
        """What names the run: model, data, seed and train, without what changes no weight, as JSON."""
        read = {"model", "data", "seed", "train"}
        return self.model_dump(mode="json", include=read, exclude={"train": Train.unhashed})

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
    return digest(identity)[:8]


# ---------------------------------------------------------------- smoke

SMOKE_STEPS = 8  # enough for a warm-up, a resume from the checkpoint in the middle, and a schedule
SMOKE_BOUNDS: dict[str, dict[str, Any]] = {
    "data": {"context": 128},
    "train": {"batch": 4, "accumulate": 2},
    "evaluate": {"limit": 8, "bootstrap": 200, "perplexity_tokens": 2048, "divergence_tokens": 256},
    # The logits of a barely trained twin are nearly flat, so rounding changes which token is best: bundles of
    # GPT-2, Gemma and Qwen3 twins agreed on 91-96 % (int8) and 59-77 % (int4); a broken one on 0.2 %. The
    # limits on fp32 and on divergence stay.
    "verify": {"tokens": 64, "int8_top1": 0.8, "int4_top1": 0.3},
    "latency": {"prompt": 16, "generate": 8, "repetitions": 2, "pause_s": 0.0},
}
"""Upper bounds of keys; a null, which stands for all, becomes the bound."""


def smoke(recipe: Recipe) -> Recipe:
    """The recipe for `--smoke`, cut down so that every stage runs in a minute on two cores.

    Architecture, adapter, dispersion, arms, precisions, schedule, optimizer and quantization stay. The base
    becomes a tiny random twin, made without opening the base. Raises BadInput without `model.architecture`.
    """
    if recipe.model.architecture is None:
        place = recipe._origin.path or recipe.name
        raise BadInput(
            f"{place}: model.architecture: missing; --smoke builds a tiny twin of it: "
            "write the model_type of the base's config.json, such as llama, qwen3, gemma3_text or gpt2"
        )
    values = recipe.model_dump()
    values["name"] = recipe.name if recipe.name.endswith("-smoke") else f"{recipe.name[:94]}-smoke"
    values["seeds"] = min(recipe.seeds, 2)  # enough for a variance between seeds
    for name, bounds in SMOKE_BOUNDS.items():
        _limit(values[name], bounds)
    data, train, evaluate = values["data"], values["train"], values["evaluate"]
    if recipe.data.has_chat:  # a conversation is not cut into blocks
        data["context"], train["accumulate"] = recipe.data.context, 1
    train["epochs"] = None
    data["heldout"] = max(data["heldout"], 0.1)
    train["tokens"] = SMOKE_STEPS * train["batch"] * train["accumulate"] * data["context"]
    train["checkpoint_every"] = SMOKE_STEPS // 2
    for source in data["train"]:
        _limit(source, {"limit": 200})  # a tenth of these documents held out makes eight items
    for arm in values["arms"]:
        if isinstance(arm["active_forgetting"], int):  # a reset after the last step would never come
            _limit(arm, {"active_forgetting": SMOKE_STEPS // 2})
    for dispersion in (train["dispersion"], *(arm["dispersion"] for arm in values["arms"])):
        if dispersion and not isinstance(dispersion.get("layers", "all"), str):
            dispersion["layers"] = "all"  # the twin has two layers, so that a listed one may not exist
    # Tasks of lm-evaluation-harness need a hub for their items, unless the user has them in a folder.
    if evaluate["tasks_path"] is None:
        local = [task for task in evaluate["tasks"] if task.startswith("heldout")]
        evaluate["tasks"] = local or recipe.heldout_tasks
    if recipe.quantize.budget is not None:  # a budget for the base fits no twin
        values["quantize"] |= {"budget": None, "max_perplexity_increase": 1.0}
    small = Recipe.model_validate(values)
    small._origin = replace(recipe._origin, smoke=True)
    return small


def _limit(section: dict[str, Any], most: dict[str, Any]) -> None:
    for key, bound in most.items():
        section[key] = bound if section[key] is None else min(section[key], bound)


# ---------------------------------------------------------------- rules over two keys


def _data(recipe: Recipe) -> Problems:
    """Tasks that the data cannot give, and answers where there are none."""
    possible = {*recipe.heldout_tasks} | ({ANSWERS_TASK} if recipe.evaluate.answers else set())
    for task in recipe.evaluate.tasks:
        if task in (ANSWERS_TASK, *HELDOUT_TASKS) and task not in possible:
            kind = "conversations (data.train.messages)" if task == ANSWERS_TASK else "a source of text"
            yield ("evaluate", "tasks"), f"{task} needs {kind}; the data give {', '.join(possible)}"
    has_answers = recipe.data.has_chat and recipe.data.loss != "all"
    for index, run in enumerate(recipe.arm_runs[: len(recipe.arms)]):
        if run.dispersion is not None and run.dispersion.on == "answers" and not has_answers:
            words = "dispersion.on: answers needs conversations, and data.loss not all; write on: all"
            yield ("arms", index), words


def _training(recipe: Recipe) -> Problems:
    train, needed = recipe.train, recipe.tokens_per_step
    is_qlora = train.adapter is not None and train.adapter.kind == "qlora"
    if (train.tokens is None) == (train.epochs is None):
        yield ("train", "tokens"), "needs a whole number here, or a number for train.epochs; one of the two"
    if recipe.steps == 0:
        factors = f"batch {train.batch} x accumulate {train.accumulate} x context {recipe.data.context}"
        words = f"{train.tokens:,} tokens, but one optimizer step takes {needed:,} ({factors}); needs"
        yield ("train", "tokens"), f"{words} at least {needed}, or a smaller batch, accumulate or context"
    if train.distributed is not None and is_qlora:
        words = "FSDP cannot divide a quantized base; write distributed: null"
        yield ("train", "distributed"), f"{words}, and each process holds the whole model"


def _arms(recipe: Recipe) -> Problems:
    train, steps = recipe.train, recipe.steps
    for index, (arm, run) in enumerate(zip(recipe.arms, recipe.arm_runs)):
        if arm.dispersion is not None and train.dispersion is None:
            works = "leave the key out for the paper's settings, or write arms: [baseline]"
            yield ("train", "dispersion"), f"null, but the arm '{arm.name}' needs it; {works}"
        every = run.techniques.get("active_forgetting")
        if every is None:
            continue
        reason = None
        if train.adapter is not None:
            reason = "an adapter leaves the embedding frozen, so an embedding drawn anew would stay noise"
        elif train.distributed is not None:
            reason = "FSDP divides the embedding among processes, but active_forgetting draws all of it anew"
        elif steps is None and recipe.arms[index].active_forgetting == "auto":
            reason = "auto is a share of train.tokens, and with train.epochs its steps are not known yet"
        elif steps is not None and 1 <= steps <= every:
            reason = f"the embedding is drawn anew every {every} steps, but the run has {steps}"
        if reason:
            yield ("arms", index), f"{reason}; drop the arm, or change that"


def _quantization(recipe: Recipe) -> Problems:
    """Goals that exclude one another, and roundings that cannot be trained under."""
    quantize, train = recipe.quantize, recipe.train
    aware, adapter, key = train.quantization_aware, train.adapter, ("train", "quantization_aware")
    if quantize.budget is not None and quantize.max_perplexity_increase is not None:
        yield ("quantize", "budget"), "max_perplexity_increase is there, too; take one out"
    elif quantize.searched and "int4" not in recipe.precisions:
        goal = "budget" if quantize.budget is not None else "max_perplexity_increase"
        yield ("quantize", goal), "it searches the int4 bundle, which precisions lack; add int4"
    if aware is None:
        return
    method = getattr(quantize, aware.precision).method
    method_key = ("quantize", aware.precision, "method")
    if aware.precision not in recipe.precisions:
        yield key, f"{aware.precision} is not among precisions, so the bundle would not ship; add it"
    if method == "k_quant":
        yield method_key, "'k_quant' is no rounding to train under; needs rtn or gptq"
    if method == "gptq" and train.compile:
        yield ("train", "compile"), "gptq cannot calibrate compiled layers; needs false, or method: rtn"
    if aware.precision == "int4" and quantize.searched:
        yield key, "training under rounding and a searched int4 bundle cannot be combined; drop one"
    if train.distributed is not None:
        yield key, "FSDP divides each weight among processes, and rounding needs it whole; drop one"
    if adapter is None:
        return
    if adapter.kind == "qlora":
        yield key, "kind qlora stores the base quantized; rounding needs kind: lora, or no adapter"
    elif adapter.dropout:
        yield key, "adapter.dropout must be 0: each step has to compute with the merged weight"
    elif method == "gptq":
        yield method_key, "gptq changes the base's weights, which an adapter leaves alone; needs rtn"
