"""`edgedisp pilot`: short trainings that show which dispersion settings act, before a build spends hours.

A pilot is the recipe with few training tokens and an arm for each variant, choice of layers and weight. Its
stages are those of a build as far as the measured torch models. There is one seed: intervals are over texts,
not over trainings.

    runs/<recipe>-pilot-<hash8>/{base, corpus, items, baseline, angular-all-0_1, ..., pilot.json, pilot.png}

The hash leaves out variants, layers and weights, so trying more of them trains only what is new, and
again what diverged.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgedisp.commands.plan import threads_for
from edgedisp.core.errors import BadInput, NotFinite
from edgedisp.core.files import from_json, to_json, write_json
from edgedisp.core.progress import Screen
from edgedisp.core.results import BASELINE, LOSS_TASK, Estimate, Measurement
from edgedisp.core.stage_folder import open_run
from edgedisp.pipeline import build_plan
from edgedisp.pipeline.stage import Stage, StageRunner
from edgedisp.recipe import ArmRun, Dispersion, Evaluate, Recipe
from edgedisp.recipe.arms import Arm
from edgedisp.recipe.recipe import SMOKE_STEPS
from edgedisp.recipe.values import read_whole
from edgedisp.report.formatting import duration, format_estimate
from edgedisp.report.layout import Grid, grid_text

LOSS_FLOOR = 0.005  # nats per token: half a percent of perplexity
COSINE_FLOOR = 0.005  # 80,000 tokens at weight 1 moved the mean cosine of SmolLM2-135M by 0.017, of 0.54
# Twice as many tokens took as long as a short training, and gave intervals far finer than the floor.
EVALUATE = Evaluate(tasks=(LOSS_TASK,), limit=400, perplexity_tokens=4096)

VARIED = ("variant", "layers", "weight")  # keys of train.dispersion
MEASURED = f"measure-{build_plan.TORCH}"
COSINE_EFFECT = {-1: "disperses", 0: "cosine unchanged", 1: "condenses"}
LOSS_EFFECT = {-1: "loss better", 0: "loss unchanged", 1: "loss worse"}
LEGEND = f"""\
Loss (held-out, nats per token) and cosine (mean over token pairs and layers) less the baseline's, with paired
95 % intervals over texts. A difference counts if its interval excludes 0 and its size is at least
{LOSS_FLOOR:g} (loss) or {COSINE_FLOOR:g} (cosine). The best of several is a little flattered; what is idle on
few tokens may act on more, and what is harmless may hurt."""


@dataclass(frozen=True)
class Candidate:
    """A setting and its differences to the baseline: loss in nats per token, and mean cosine.

    seconds: of its training. All three are None where training diverged (`diverged`: why).
    """

    name: str
    dispersion: Dispersion
    loss: Estimate | None = None
    cosine: Estimate | None = None
    seconds: float | None = None
    diverged: str | None = None

    @property
    def signs(self) -> tuple[int, int]:
        """-1, 0 or 1 for loss and cosine; 0 for a difference that does not count."""
        return _sign(self.loss, LOSS_FLOOR), _sign(self.cosine, COSINE_FLOOR)

    @property
    def effect(self) -> str:
        loss, cosine = self.signs
        return "diverges" if self.diverged else f"{COSINE_EFFECT[cosine]}, {LOSS_EFFECT[loss]}"

    @property
    def rank(self) -> tuple[bool, int, float]:
        """Lower losses first; then an unmoved loss, by cosine; then what hurts least; last what diverged."""
        loss = self.signs[0]
        by = self.loss if loss else self.cosine
        return self.diverged is not None, loss, (by and by.value) or 0.0


def _sign(difference: Estimate | None, floor: float) -> int:
    if difference is None or difference.value is None or not difference.excludes_zero:
        return 0
    return int(difference.value >= floor) - int(difference.value <= -floor)


def make_recipe(
    recipe: Recipe, *, weights: str, tokens: str, layers: str | None = None, variants: str | None = None
) -> Recipe:
    """The recipe with an arm for each setting: lists with commas; None: as in the recipe.

    Raises BadInput for an unknown value, and for fewer tokens than a step takes.
    """
    section, step = recipe.train.dispersion or Dispersion(), recipe.tokens_per_step
    texts = (section.variant, section.layers, section.weight), (variants, layers, weights)
    words = [[word.strip() for word in text.split(",")] if text else [usual] for usual, text in zip(*texts)]
    arms = {BASELINE: Arm.model_validate(BASELINE)}
    for setting in product(*words):
        try:
            keys = Dispersion.model_validate(dict(zip(VARIED, setting)))
            listed = keys.layers if isinstance(keys.layers, str) else "listed"
            name = f"{keys.variant}-{listed}-{keys.weight:.15g}".replace(".", "_")
            arms[name] = Arm(name=name, dispersion=keys)
        except ValidationError as error:
            problem = error.errors()[0]
            option, reason = str(problem["loc"][-1]).rstrip("s"), problem["msg"].removeprefix("Value error, ")
            raise BadInput(f"--{option}s: '{problem['input']}': {reason}") from None
    if LOSS_TASK not in recipe.heldout_tasks:
        reason = "a pilot compares losses of held-out text, and this recipe reads conversations alone"
        raise BadInput(f"{recipe.where('data.train')}: {reason}; build it with an arm for each setting")
    try:
        steps = read_whole(tokens) // step
    except ValueError as problem:
        raise BadInput(f"--tokens {tokens}: {problem}") from None
    if steps < 1:
        raise BadInput(f"--tokens {tokens}: too few: one optimizer step takes {step:,}")
    steps = min(steps, SMOKE_STEPS) if recipe.is_smoke else steps
    unvaried = section.model_copy(update={key: getattr(Dispersion(), key) for key in VARIED})
    train = recipe.train.model_copy(update={"tokens": step * steps, "epochs": None, "dispersion": unvaried})
    name = f"{recipe.name}-pilot"
    changes = {"name": name, "train": train, "arms": (*arms.values(),), "seeds": 1, "evaluate": EVALUATE}
    return recipe.model_copy(update=changes)


def stages(recipe: Recipe) -> list[Stage]:
    """Those of a build with these arms, as far as the measured torch models; one arm after the other."""
    threads, adapter = threads_for(recipe), recipe.train.adapter
    order = [build_plan.base(recipe, leaves=("model",)), build_plan.corpus(recipe), build_plan.items(recipe)]
    for arm in recipe.arm_runs:
        order.append(build_plan.training(recipe, arm))
        if adapter is not None:
            order.append(build_plan.merge(recipe, adapter, arm.name))
        order.append(build_plan.measure(recipe, arm, build_plan.TORCH, threads, noise=False))
    return order


def run(recipe: Recipe, folder: Path, screen: Screen) -> list[Candidate]:
    """Train and measure every arm; writes pilot.json and pilot.png. Returns the candidates, best first.

    An arm that diverges leaves nothing: the next call trains it again. Raises BadInput for what the user can
    mend, such as too little held-out text for intervals, BuildFailed if the baseline cannot be trained.
    """
    from edgedisp.report import figure, plots  # bring matplotlib

    runner, order, diverged = StageRunner(folder), stages(recipe), dict[str, str]()
    with open_run(folder, recipe.identity(), recipe.name):
        for number, stage in enumerate(order, start=1):
            arm = stage.name.partition("/")[0]
            if arm in diverged:
                continue
            try:
                passed = runner.pass_stage(stage, screen, number, len(order))
            except NotFinite as problem:
                if arm == BASELINE:
                    raise
                diverged[arm] = str(problem).partition(". ")[0]  # the rest is about checkpoints, which go
                shutil.rmtree(folder / f"{stage.name}.partial")
                continue
            if stage.name == f"{BASELINE}/{MEASURED}":
                _check_intervals(from_json(Measurement, passed.record.results))
        runner.hashes.save()
        rows = [_candidate(arm, runner, diverged.get(arm.name)) for arm in recipe.arm_runs[1:]]
        rows.sort(key=lambda row: row.rank)
        write_json(folder / "pilot.json", summary(recipe, rows))
        points = {row.name: (row.cosine, row.loss) for row in rows if row.cosine and row.loss}
        if points:
            figure.save(plots.pilot_plot(points, (COSINE_FLOOR, LOSS_FLOOR)), folder)
    return rows


def _check_intervals(baseline: Measurement) -> None:
    """Raise BadInput for figures of one document or sequence, from which no difference can count."""
    cosine = baseline.condensation and baseline.condensation.mean_cosine
    figures = {"loss": baseline.scores[LOSS_TASK].main.estimate, "cosine": cosine}
    if bare := [name for name, estimate in figures.items() if not (estimate and estimate.has_interval)]:
        raise BadInput(
            f"data.heldout: the baseline's {' and '.join(bare)} has no interval (one document or block was "
            "read), so no candidate can be told from it; hold out more documents, or lower data.context"
        )


def _candidate(arm: ArmRun, runner: StageRunner, diverged: str | None) -> Candidate:
    """With its differences to the baseline, paired by held-out window and by sequence."""
    from edgedisp.evaluate.comparison import compare_task  # brings scipy
    from edgedisp.pipeline.run_results import read_items

    name, dispersion = arm.name, arm.dispersion or Dispersion()
    if diverged is not None:
        return Candidate(name, dispersion, diverged=diverged)
    records = [runner.records[f"{each}/{MEASURED}"] for each in (BASELINE, name)]
    first, second = (read_items(record.folder)[LOSS_TASK] for record in records)
    loss = compare_task([(first, second)]).main.nats
    geometry = from_json(Measurement, records[1].results).condensation
    cosine = geometry.change.mean_cosine if geometry and geometry.change else None
    seconds = runner.records[f"{name}/model"].results["seconds"]
    return Candidate(name, dispersion, loss, cosine, seconds)


def advice(candidates: Sequence[Candidate]) -> str:
    """What to do; candidates: best first."""
    # A better loss, or an unchanged one and less condensed.
    if useful := [row for row in candidates if row.signs < (0, 0)]:
        section = useful[0].dispersion
        keys = {key: getattr(section, key) for key in VARIED} | section.model_dump(exclude_defaults=True)
        line = json.dumps(keys).replace('"', "")
        return f"The setting to build with, under train: dispersion: {line}"
    remedy = "smaller weights where the loss is worse, else larger ones or more tokens"
    return f"No setting can be recommended: try {remedy}."


def summary(recipe: Recipe, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """The content of pilot.json."""
    return {
        "recipe": recipe.name,
        "smoke": recipe.is_smoke,
        "tokens": recipe.train.tokens,
        "candidates": [{**to_json(row), "effect": row.effect} for row in candidates],
        "advice": advice(candidates),
    }


def render(recipe: Recipe, candidates: Sequence[Candidate], width: int) -> str:
    """Table and advice for a terminal of `width` columns."""
    head = f"{recipe.name}: {recipe.train.tokens:,} tokens each"
    if recipe.is_smoke:
        head += "\nA tiny random model: this shows that the pilot runs, and says nothing of the recipe's."
    rows = []
    for row in candidates:
        differences = (format_estimate(figure, signs=True) for figure in (row.loss, row.cosine))
        rows.append((row.name, *differences, row.effect, duration(row.seconds)))
    columns = "candidate", "loss - baseline", "cosine - baseline", "effect", "training"
    return "\n\n".join([head, grid_text(Grid(columns, tuple(rows)), width), LEGEND, advice(candidates)])
