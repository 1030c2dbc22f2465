"""The stages from trained models to what ships and what is known of it: export, checks, scores, speed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgedisp.core.stage_folder import SCORES, digest
from edgedisp.pipeline.training import decider_of, plain
from edgedisp.pipeline.walk import Stage, Work
from edgedisp.recipe import BITS, Recipe, load_target

UNPACKED = ("description", "notes", "sources", "quantize")  # of a profile: what a packed bundle has not of it

# Raised when the profile of a model gets other figures; 2: intervals, correlations, outliers.
CONDENSATION_FORM = {"form": 2}
BUNDLE_FORM = {"form": 2}  # 1: without every id that ends an answer


def condensations(arms: list[str]) -> list[Stage]:
    """The torch models' profiles, the baseline's first: the others are compared with it."""
    ordered = sorted(arms, key=lambda arm: arm != "baseline")
    against = "baseline/condensation" if "baseline" in arms else None
    return [_condensation(arm, None if arm == "baseline" else against) for arm in ordered]


def _condensation(arm: str, against: str | None) -> Stage:
    model = f"{arm}/model"

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        baseline = None if against is None else job.folders[against]
        return run.condensation(job.folders[model], job.folders["corpus"], baseline, job.own, job.progress)

    reads = (model, "corpus") if against is None else (model, "corpus", against)
    return Stage(f"{arm}/condensation", CONDENSATION_FORM, reads, work)


def bundle_condensation(arm: str, precision: str, threads: int) -> Stage:
    bundle, measured = f"{arm}/{precision}", f"{arm}/condensation"

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        folders = job.folders
        return run.bundle_condensation(
            folders[bundle], folders[measured], folders["corpus"], threads, job.own, job.progress
        )

    section = {**CONDENSATION_FORM, "threads": threads}
    return Stage(f"{arm}/condensation-{precision}", section, (bundle, measured, "corpus"), work)


def export(arm: str, threads: int) -> Stage:
    model = f"{arm}/model"

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.export(job.folders[model], threads, job.own, job.progress)

    return Stage(f"{arm}/fp32", {**BUNDLE_FORM, "threads": threads}, (model,), work)


def quantize(recipe: Recipe, arm: str, precision: str) -> Stage:
    if precision == "int4" and recipe.quantize.searched:
        return _quantize_searched(recipe, arm)
    parent, model = f"{arm}/fp32", f"{arm}/model"
    options = getattr(recipe.quantize, precision)
    is_trained = _is_trained(recipe, precision)

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        folders = job.folders
        return run.quantize(
            options,
            BITS[precision],
            folders[parent],
            folders.get(model),
            folders.get("corpus"),
            job.own,
            job.progress,
            is_trained,
        )

    section = {"bits": BITS[precision], **plain(options)}
    if is_trained:
        section["is_trained"] = True
    reads = (parent, model, "corpus") if options.calibrated else (parent,)
    return Stage(f"{arm}/{precision}", section, reads, work)


def _decider(recipe: Recipe, arm: str, precision: str) -> str | None:
    """The bundle whose bits hold for `arm` too, as twins are stored alike; None if it decides."""
    decider = decider_of(recipe)
    return None if arm == decider else f"{decider}/{precision}"


def _is_trained(recipe: Recipe, precision: str) -> bool:
    """Whether training saw the weights as this bundle rounds them."""
    chosen = recipe.train.quantization_aware
    return chosen is not None and chosen.precision == precision


def _quantize_searched(recipe: Recipe, arm: str) -> Stage:
    """The int4 bundle with a choice for each weight; of int4's options, those it reads count."""
    parent, model, goal = f"{arm}/fp32", f"{arm}/model", recipe.quantize
    by_gptq = goal.int4.method == "gptq"
    decider = _decider(recipe, arm, "int4")

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        folders = job.folders
        return run.quantize_searched(
            goal,
            recipe.seed,
            folders[parent],
            folders[model],
            folders["corpus"],
            job.own,
            job.progress,
            None if decider is None else folders[decider],
        )

    section: dict[str, Any] = {
        "budget": goal.budget,
        "max_perplexity_increase": goal.max_perplexity_increase,
        "accuracy_level": goal.int4.accuracy_level,
        "seed": recipe.seed,
    }
    if by_gptq:
        section["gptq"] = goal.int4.model_dump(include={"calibration_tokens"})
    reads = (parent, model, "corpus") if decider is None else (parent, model, "corpus", decider)
    return Stage(f"{arm}/int4", section, reads, work)


def survival(arm: str, precision: str, against: str | None) -> Stage:
    """What is left of training's change in a bundle; `against`: the baseline's model, for other arms."""
    model, parent, bundle = (f"{arm}/{part}" for part in ("model", "fp32", precision))

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        folders = job.folders
        baseline = None if against is None else folders[against]
        return run.survival(
            folders["base"], folders[model], folders[parent], folders[bundle], baseline, job.own, job.progress
        )

    reads = ("base", model, parent, bundle) if against is None else ("base", model, parent, bundle, against)
    return Stage(f"{arm}/survival-{precision}", {}, reads, work)


def verify(recipe: Recipe, arm: str, precision: str, threads: int) -> Stage:
    model, bundle = f"{arm}/model", f"{arm}/{precision}"
    limits = recipe.verify.limits(precision)
    blocks = max(1, -(-recipe.verify.tokens // recipe.data.context))
    is_trained = _is_trained(recipe, precision)

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        folders, trained = job.folders, None
        if is_trained:
            trained = getattr(recipe.quantize, precision), BITS[precision]
        return run.verify(
            limits,
            trained,
            blocks,
            folders[model],
            folders[bundle],
            folders["corpus"],
            threads,
            job.own,
            job.progress,
        )

    section = {"limits": limits, "blocks": blocks, "threads": threads}
    if is_trained:
        section["trained"] = True
    return Stage(f"{arm}/verify-{precision}", section, (model, bundle, "corpus"), work)


def _scoring(recipe: Recipe) -> tuple[dict[str, Any], Callable[[Work], Any]]:
    """What the tasks' questions depend on, and how to make them."""
    section = {**plain(recipe.evaluate), "context": recipe.data.context, "seed": recipe.seed}
    del section["divergence_tokens"]
    path = recipe.evaluate.tasks_path
    tasks_path = None if path is None else (recipe.folder / path).resolve()
    if tasks_path is not None:
        section["tasks_content"] = _folder_digest(tasks_path)

    def suite(job: Work) -> Any:
        from edgedisp import stages as run

        base, corpus = job.folders["base"], job.folders["corpus"]
        return run.items(recipe.evaluate, recipe.seed, tasks_path, base, corpus, recipe.data.context)

    return section, suite


def items(recipe: Recipe) -> Stage:
    section, suite = _scoring(recipe)

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.count_items(suite(job), job.own)

    return Stage("items", section, ("base", "corpus"), work)


def accuracy(recipe: Recipe, arm: str, precision: str, threads: int) -> Stage:
    section, suite = _scoring(recipe)
    model, bundle = f"{arm}/model", None if precision == "torch" else f"{arm}/{precision}"

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        shipped = None if bundle is None else job.folders[bundle]
        store = job.folders["base"].parent / SCORES
        return run.accuracy(
            suite(job),
            recipe.evaluate,
            job.folders[model],
            shipped,
            threads,
            store,
            job.folders["items"],
            job.own,
            job.progress,
        )

    # "items" changes when data that a hub did not give is there at last.
    reads = ("base", "corpus", "items", model) + (() if bundle is None else (bundle,))
    return Stage(f"{arm}/accuracy-{precision}", {**section, "threads": threads}, reads, work)


def noise(recipe: Recipe, arm: str, precision: str, threads: int) -> Stage:
    """How far two scorings of one model differ: what a difference between two must exceed."""
    section, suite = _scoring(recipe)
    model, bundle = f"{arm}/model", None if precision == "torch" else f"{arm}/{precision}"

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        shipped = None if bundle is None else job.folders[bundle]
        store, chosen = job.folders["base"].parent / SCORES, recipe.evaluate
        return run.noise(
            suite(job),
            job.folders[model],
            shipped,
            threads,
            store,
            job.progress,
            batch_tokens=chosen.batch_tokens,
            bootstrap=chosen.bootstrap,
        )

    reads = ("base", "corpus", model) + (() if bundle is None else (bundle,))
    return Stage(f"{arm}/noise-{precision}", {**section, "threads": threads}, reads, work)


def divergence(recipe: Recipe, arm: str, precision: str, against: str | None, threads: int) -> Stage:
    """A bundle against its fp32 parent, and (`against`: the baseline) against its twin of that precision."""
    bundle = f"{arm}/{precision}"
    parent = None if precision == "fp32" else f"{arm}/fp32"
    twin = None if against is None else f"{against}/{precision}"
    tokens = recipe.evaluate.divergence_tokens

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        folders = job.folders
        return run.divergence(
            tokens,
            folders[bundle],
            None if parent is None else folders[parent],
            None if twin is None else folders[twin],
            folders["corpus"],
            folders["base"],
            threads,
            job.own,
            job.progress,
        )

    reads = ("base", "corpus", bundle, *(name for name in (parent, twin) if name is not None))
    return Stage(f"{arm}/divergence-{precision}", {"tokens": tokens, "threads": threads}, reads, work)


def _folder_digest(folder: Path) -> str:
    """Names and contents of a folder of local tasks: editing a task scores it again."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return digest({path.relative_to(folder).as_posix(): digest(path.read_bytes().hex()) for path in files})


def latency(recipe: Recipe, threads: int) -> Stage:
    names = tuple(f"{arm.name}/{precision}" for precision in recipe.precisions for arm in recipe.arms)

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        bundles = {name: job.folders[name] for name in names}
        return run.latency(recipe.latency, recipe.seed, threads, bundles, job.own, job.progress)

    section = {**plain(recipe.latency), "threads": threads, "seed": recipe.seed}
    return Stage("latency", section, names, work)


def pack(recipe: Recipe, arm: str, target: str, threads: int) -> Stage:
    """What was measured, for a device. The profile's words are no part of the key, nor how it quantizes."""
    profile = load_target(target)
    bundle, model = f"{arm}/{profile.precision}", f"{arm}/model"
    started_with = profile.threads or threads

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        found = run.provenance_of(job.folders[model]) | {"smoke": recipe.is_smoke}
        options = run.PackOptions(profile, profile.layouts, started_with, None, found)
        return run.pack(options, job.folders[bundle], job.folders["base"], job.own)

    section = {key: value for key, value in plain(profile).items() if key not in UNPACKED}
    section |= {"threads": started_with, "recipe": recipe.name}
    return Stage(f"{arm}/{target}", section, (bundle, model, "base", "corpus"), work)
