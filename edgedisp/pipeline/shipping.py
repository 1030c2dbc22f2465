"""The stages from trained models to what ships and what is known of it: export, checks, scores, speed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedisp.core.files import digest
from edgedisp.core.stage_folder import SCORES
from edgedisp.pipeline.training import decider_of, plain
from edgedisp.pipeline.walk import Stage, Work
from edgedisp.recipe import BITS, Recipe, load_target

if TYPE_CHECKING:
    from edgedisp.evaluate.task_suite import SuiteOptions

UNPACKED = ("description", "notes", "sources", "quantize")  # of a profile: what a packed bundle has not of it

BUNDLE_FORM = {"form": 2}  # 1: without every id that ends an answer


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


def suite_section(recipe: Recipe) -> dict[str, Any]:
    """What the tasks' questions depend on, for a key."""
    section = {**plain(recipe.evaluate), "context": recipe.data.context, "seed": recipe.seed}
    del section["divergence_tokens"], section["bootstrap"]
    if (path := _tasks_path(recipe)) is not None:
        section["tasks_content"] = _folder_digest(path)
    return section


def suite_options(recipe: Recipe) -> SuiteOptions:
    """The same for a stage."""
    from edgedisp.evaluate.task_suite import SuiteOptions

    chosen, context = recipe.evaluate, recipe.data.context
    return SuiteOptions(
        chosen.tasks, context, chosen.limit, recipe.seed, chosen.perplexity_tokens, _tasks_path(recipe)
    )


def _tasks_path(recipe: Recipe) -> Path | None:
    path = recipe.evaluate.tasks_path
    return None if path is None else (recipe.folder / path).resolve()


def items(recipe: Recipe) -> Stage:
    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.count_items(suite_options(recipe), job.folders["base"], job.folders["corpus"], job.own)

    return Stage("items", suite_section(recipe), ("base", "corpus"), work)


@dataclass(frozen=True)
class Measured:
    """A training at a precision (`torch`: before export) that is measured.

    baseline: the baseline's name, for other arms. in_depth: also its hidden states and its divergence from
    other bundles. noise: also the noise floor.
    """

    arm: str
    precision: str
    baseline: str | None = None
    in_depth: bool = True
    noise: bool = False

    @property
    def stage(self) -> str:
        return f"{self.arm}/measure-{self.precision}"

    def reads(self) -> dict[str, str]:
        """Input of the stage -> stage that it comes from."""
        arm, precision, baseline = self.arm, self.precision, self.baseline
        # "items" changes when data that a hub did not give is there at last.
        found = {"model": f"{arm}/model", "base": "base", "corpus": "corpus", "items": "items"}
        if precision != "torch":
            found["bundle"] = f"{arm}/{precision}"
        if self.in_depth and precision == "torch" and baseline is not None:
            found["reference"] = f"{baseline}/measure-torch"
        if self.in_depth and precision != "torch":
            found["reference"] = f"{arm}/measure-torch"
            if precision != "fp32":
                found["parent"] = f"{arm}/fp32"
            if baseline is not None:
                found["baseline"] = f"{baseline}/{precision}"
        return found


def measurements(recipe: Recipe, threads: int) -> list[Stage]:
    """The measuring of every training at every precision, each after those that it is compared with."""
    runs = sorted(recipe.arm_runs, key=lambda run: run.arm != "baseline")
    first = [run.name for run in runs if run.replica == 0]
    found = []
    for precision in ("torch", *recipe.precisions):
        for run in runs:
            baseline = "baseline" if run.name != "baseline" and "baseline" in first else None
            subject = Measured(run.name, precision, baseline, run.replica == 0, run.name == first[0])
            found.append(measure(recipe, subject, threads))
    return found


def measure(recipe: Recipe, subject: Measured, threads: int) -> Stage:
    """All that is found out about one model in one stage."""
    precision, reads = subject.precision, subject.reads()
    is_trained = _is_trained(recipe, precision)
    section: dict[str, Any] = {
        "tasks": suite_section(recipe),
        "bootstrap": recipe.evaluate.bootstrap,
        "threads": threads,
        "in_depth": subject.in_depth,
        "noise": subject.noise,
    }
    if precision != "torch":
        section["verify"] = {"tokens": recipe.verify.tokens, "limits": recipe.verify.limits(precision)}
        section["divergence_tokens"] = recipe.evaluate.divergence_tokens
    if is_trained:
        section["trained"] = True

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run
        from edgedisp.stages.measure import MeasureInputs, MeasureOptions
        from edgedisp.stages.parity import ParityOptions

        limits = {} if precision == "torch" else recipe.verify.limits(precision)
        trained = (getattr(recipe.quantize, precision), BITS[precision]) if is_trained else None
        options = MeasureOptions(
            suite_options(recipe),
            threads,
            recipe.evaluate.bootstrap,
            recipe.evaluate.divergence_tokens,
            subject.in_depth,
            subject.noise,
            ParityOptions(recipe.verify.tokens, limits, trained),
        )
        folders = {name: job.folders[stage] for name, stage in reads.items()}
        cache = job.folders["base"].parent / SCORES
        return run.measure(options, MeasureInputs(cache=cache, **folders), job.own, job.progress)

    return Stage(subject.stage, section, tuple(dict.fromkeys(reads.values())), work)


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
