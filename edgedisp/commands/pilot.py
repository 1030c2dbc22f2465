"""`edgedisp pilot`: short trainings that show which dispersion settings act, before a build spends hours.

A pilot is the recipe with few training tokens and an arm for each variant, choice of layers and weight. Each
arm is trained as a build of as many tokens trains it, measured as torch model, and its weights are deleted.
There is one seed: intervals are over texts, not over trainings.

    runs/<recipe>-pilot-<hash8>/{base, corpus, baseline, angular-all-0.1, ..., pilot.json, pilot.png}

The hash leaves out variants, layers and weights, so trying more of them trains only what is new.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from edgedisp.core.errors import BadInput
from edgedisp.core.files import from_json, to_json, write_json
from edgedisp.core.progress import Screen
from edgedisp.core.results import BASELINE, LOSS_TASK, Estimate
from edgedisp.core.stage_folder import open_run
from edgedisp.pipeline import build_plan
from edgedisp.pipeline.options import CandidateOptions
from edgedisp.pipeline.stage import Stage, walk
from edgedisp.recipe import ArmRun, Dispersion, Evaluate, Recipe
from edgedisp.recipe.recipe import SMOKE_STEPS
from edgedisp.recipe.values import LAYER_NAMES, VARIANTS, choice, read_number, read_whole
from edgedisp.report.formatting import duration, format_estimate
from edgedisp.report.layout import Grid, grid_text

LOSS_FLOOR = 0.005  # nats per token: half a percent of perplexity
COSINE_FLOOR = 0.005  # 80,000 tokens at weight 1 moved the mean cosine of SmolLM2-135M by 0.017, of 0.54
# Twice as many tokens took as long as a short training, and gave intervals far finer than the floor.
EVALUATE = Evaluate(tasks=(LOSS_TASK,), limit=400, perplexity_tokens=4096)

VARIED = ("variant", "layers", "weight")  # keys of train.dispersion
HURTS, DIVERGES = "hurts", "diverges"
EFFECTS = {
    (-1, -1): "disperses, loss better",
    (-1, 0): "disperses, loss unchanged",
    (0, -1): "loss better, not dispersed",
    (0, 0): "nothing measurable",
    (1, -1): "condenses, loss better",
    (1, 0): "condenses, loss unchanged",
}
"""Directions of (cosine, loss) -> effect. A loss that rose is `hurts`, whatever the cosine did."""
USEFUL = ("disperses", "loss better")
LEGEND = f"""\
Loss (held-out, nats per token) and cosine (mean over token pairs and layers) less the baseline's, with paired
95 % intervals over texts. A difference counts if its interval excludes 0 and its size is at least
{LOSS_FLOOR:g} (loss) or {COSINE_FLOOR:g} (cosine). The best of several is a little flattered."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Candidate:
    """A setting and its differences to the baseline: loss in nats per token, and mean cosine.

    seconds: of its training. All three are None before, and where training diverged (`diverged`: why).
    """

    name: str
    dispersion: Dispersion
    loss: Estimate | None = None
    cosine: Estimate | None = None
    seconds: float | None = None
    diverged: str | None = None

    @property
    def effect(self) -> str:
        if self.loss is None or self.cosine is None:
            return DIVERGES
        loss = direction(self.loss, LOSS_FLOOR)
        return HURTS if loss > 0 else EFFECTS[direction(self.cosine, COSINE_FLOOR), loss]


@dataclass(frozen=True)
class Pilot:
    """recipe: with the pilot's number of tokens and what it scores. recipe_tokens: the original's.

    candidates: after `run`, best first.
    """

    recipe: Recipe
    recipe_tokens: int
    candidates: list[Candidate]

    @property
    def best(self) -> Candidate | None:
        return next((row for row in self.candidates if row.effect.startswith(USEFUL)), None)


def plan(
    recipe: Recipe, *, weights: str, tokens: str, layers: str | None = None, variants: str | None = None
) -> Pilot:
    """The pilot that the command's options describe: lists with commas; None: as in the recipe.

    Raises BadInput for a value that is unknown or listed twice, and for fewer tokens than a step takes.
    """
    train, step = recipe.train, recipe.tokens_per_step
    section = train.dispersion or Dispersion()
    names: list[Any] = _list("--layers", layers, partial(choice, choices=LAYER_NAMES))
    settings = product(
        _list("--variants", variants, partial(choice, choices=VARIANTS)) or [section.variant],
        names or [section.layers],
        _list("--weights", weights, _weight),
    )
    sections = [section.model_copy(update=dict(zip(VARIED, setting))) for setting in settings]
    steps = _list("--tokens", tokens, read_whole)[0] // step
    if steps < 1:
        raise BadInput(
            f"--tokens {tokens}: too few: one step takes {step:,} (batch {train.batch} x accumulate "
            f"{train.accumulate} x context {recipe.data.context}); needs at least {step}"
        )
    tokens_each = step * (min(steps, SMOKE_STEPS) if recipe.is_smoke else steps)
    unvaried = section.model_copy(update={key: getattr(Dispersion(), key) for key in VARIED})
    short = {
        "name": f"{recipe.name}-pilot",
        "train": train.model_copy(update={"tokens": tokens_each, "dispersion": unvaried}),
        "evaluate": EVALUATE,
    }
    candidates = [Candidate(_name(section), section) for section in sections]
    return Pilot(recipe.model_copy(update=short), train.tokens, candidates)


def _name(dispersion: Dispersion) -> str:
    """A candidate's folder. `listed`: the layer numbers of the recipe, of which there is one list at most."""
    layers = dispersion.layers if isinstance(dispersion.layers, str) else "listed"
    return f"{dispersion.variant}-{layers}-{dispersion.weight:.15g}"


def _list(option: str, text: str | None, read: Callable[[str], Value]) -> list[Value]:
    """The distinct values of a list with commas; none for None."""
    values: list[Value] = []
    for word in [] if text is None else [word.strip() for word in text.split(",")]:
        try:
            value = read(word)
        except ValueError as problem:
            raise BadInput(f"{option} {text}: '{word}': {problem}") from None
        if value in values:
            raise BadInput(f"{option} {text}: {word} is listed twice; name each once")
        values.append(value)
    return values


def _weight(word: str) -> float:
    if not 0 < (weight := read_number(word)) <= 1e9:
        raise ValueError("a weight is above 0 and at most 1e9 (0 is the baseline), such as 0.1")
    return weight


def run(pilot: Pilot, folder: Path, screen: Screen) -> Pilot:
    """Train and measure the baseline and every candidate; writes pilot.json and pilot.png.

    Raises BadInput for what the user can mend, BuildFailed if the baseline cannot be trained.
    """
    with open_run(folder, pilot.recipe.identity(), pilot.recipe.name):
        results = {step.name: step.record.results for step in walk(stages(pilot), folder, screen)}
        rows = [{**vars(row), **results[row.name]} for row in pilot.candidates]
        pilot = replace(pilot, candidates=ranked([from_json(Candidate, row) for row in rows]))
        write_json(folder / "pilot.json", summary(pilot))
        _draw(pilot.candidates, folder)
    return pilot


def stages(pilot: Pilot) -> list[Stage]:
    """Base and corpus of a build, the baseline, and every candidate, which is compared with it."""
    recipe, result = pilot.recipe, [build_plan.base(pilot.recipe), build_plan.corpus(pilot.recipe)]
    items = build_plan.items(recipe).options
    arms: dict[str, Dispersion | None] = {row.name: row.dispersion for row in pilot.candidates}
    for name, dispersion in ({BASELINE: None} | arms).items():
        training = build_plan.training(recipe, ArmRun(name, name, 0, recipe.seed, dispersion))
        inputs = {**training.inputs} if name == BASELINE else {**training.inputs, "reference": BASELINE}
        options = CandidateOptions(training.options, items)
        result.append(Stage(name, f"{build_plan.HERE}.training:candidate", options, inputs, resumable=True))
    return result


def direction(difference: Estimate, floor: float) -> int:
    """-1 or 1 if the interval lies on one side of 0 and the size reaches the floor, else 0."""
    if difference.value is None or not difference.excludes_zero or abs(difference.value) < floor:
        return 0
    return 1 if difference.value > 0 else -1


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Lower losses first; then an unmoved loss, by cosine; then what hurts least; last what diverged."""

    def rank(candidate: Candidate) -> tuple[int, float]:
        if candidate.loss is None or candidate.cosine is None:
            return 2, 0.0
        loss = direction(candidate.loss, LOSS_FLOOR)
        return loss, (candidate.loss if loss else candidate.cosine).value or 0.0

    return sorted(candidates, key=rank)


def recipe_line(dispersion: Dispersion) -> str:
    """`dispersion: {...}` as it belongs under `train:`: variant, layers, weight, and what is no default."""
    plain = Dispersion()
    values = {key: value for key, value in dispersion if key in VARIED or value != getattr(plain, key)}
    return "dispersion: " + json.dumps(values).replace('"', "")


def advice(pilot: Pilot) -> list[str]:
    """What to do with the candidates, best first, in sentences."""
    tokens = pilot.recipe.train.tokens
    if pilot.best is not None:
        line = recipe_line(pilot.best.dispersion)
        sentences = [f"The setting to build with, under train: {line}"]
    else:
        only_harm = {candidate.effect for candidate in pilot.candidates} <= {HURTS, DIVERGES}
        remedy = "smaller weights" if only_harm else "larger weights, or more tokens"
        sentences = [f"No setting can be recommended: try {remedy}."]
    if pilot.recipe_tokens > 2 * tokens:
        sentences.append(
            f"The recipe trains on {pilot.recipe_tokens:,} tokens, {pilot.recipe_tokens / tokens:.3g} "
            "times as many: what is idle here may act there, and what is harmless here may hurt."
        )
    return sentences


def summary(pilot: Pilot) -> dict[str, Any]:
    """The content of pilot.json. `chosen`: a candidate's name or None; `line`: that candidate in a recipe."""
    return {
        "recipe": pilot.recipe.name,
        "smoke": pilot.recipe.is_smoke,
        "tokens": pilot.recipe.train.tokens,
        "recipe_tokens": pilot.recipe_tokens,
        "candidates": [{**to_json(row), "effect": row.effect} for row in pilot.candidates],
        "chosen": pilot.best and pilot.best.name,
        "line": pilot.best and recipe_line(pilot.best.dispersion),
        "advice": advice(pilot),
    }


def render(pilot: Pilot, width: int) -> str:
    """Table and advice for a terminal of `width` columns."""
    head = f"{pilot.recipe.name}: {pilot.recipe.train.tokens:,} tokens each"
    if losses := [row.loss for row in pilot.candidates if row.loss is not None]:
        head += f"; compared on {losses[0].n} held-out windows of {losses[0].documents} documents"
    if pilot.recipe.is_smoke:
        head += "\nA tiny random model: this shows that the pilot runs, and says nothing of the recipe's."
    rows = []
    for row in pilot.candidates:
        differences = (format_estimate(figure, signs=True) for figure in (row.loss, row.cosine))
        rows.append((row.name, *differences, row.effect, duration(row.seconds)))
    columns = "candidate", "loss - baseline", "cosine - baseline", "effect", "training"
    return "\n\n".join([head, grid_text(Grid(columns, tuple(rows)), width), LEGEND, *advice(pilot)])


def _draw(candidates: Sequence[Candidate], folder: Path) -> None:
    from edgedisp.report import figure, plots  # bring matplotlib

    panels: dict[str, dict[str, tuple[Estimate, Estimate]]] = {}
    for row in sorted(candidates, key=lambda row: row.dispersion.weight):
        if row.loss is not None and row.cosine is not None:
            title = row.name.rpartition("-")[0]
            panels.setdefault(title, {})[f"weight {row.dispersion.weight:g}"] = row.cosine, row.loss
    if panels:
        figure.save(plots.pilot_plot(panels, (COSINE_FLOOR, LOSS_FLOOR)), folder)
