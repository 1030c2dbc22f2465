"""`edgedisp pilot`: short trainings that show which dispersion settings act, before a build spends hours.

A baseline and a candidate for each variant, choice of layers and weight are trained for `--tokens`, measured
on held-out loss and mean cosine, and deleted. A candidate is bit for bit what a build of as many tokens
trains. There is one seed: intervals are over texts, not over trainings.

    runs/<recipe>-pilot-<hash8>/{base, corpus, judging, baseline, angular-all-0.1, ..., pilot.json, pilot.png}

The hash leaves out variants, layers and weights, so trying more of them trains only what is new.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from edgedisp.core.errors import BadInput
from edgedisp.core.files import to_json, write_json
from edgedisp.core.progress import Screen
from edgedisp.core.results import BASELINE, Estimate
from edgedisp.core.stage_folder import Record, open_run
from edgedisp.pipeline import build_plan
from edgedisp.pipeline.options import CandidateOptions, ItemsOptions
from edgedisp.pipeline.stage import Stage, walk
from edgedisp.recipe import ArmRun, Dispersion, Evaluate, Recipe
from edgedisp.recipe.recipe import hash8
from edgedisp.recipe.smoke import STEPS as SMOKE_STEPS
from edgedisp.recipe.values import LAYER_NAMES, VARIANTS, choice, read_number, read_whole
from edgedisp.report.formatting import format_estimate
from edgedisp.report.layout import Grid, grid_text

FUNCTIONS = "edgedisp.pipeline.training"
BOOTSTRAP = 2000
LOSS_FLOOR = 0.005  # nats per token: half a percent of perplexity
COSINE_FLOOR = 0.005  # 80,000 tokens at weight 1 moved the mean cosine of SmolLM2-135M by 0.017, of 0.54
# Twice as many tokens took as long as a short training, and gave intervals far finer than the floor.
SCORED_TOKENS, SMOKE_SCORED_TOKENS, MOST_WINDOWS = 4096, 1024, 400

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

    Both are None before measuring, and where the training diverged (`diverged`: why).
    """

    variant: str
    layers: str | tuple[int, ...]
    weight: float
    loss: Estimate | None = None
    cosine: Estimate | None = None
    diverged: str | None = None

    @property
    def name(self) -> str:
        """Its folder. `listed`: the layer numbers of the recipe, of which there is one list at most."""
        layers = self.layers if isinstance(self.layers, str) else "listed"
        return f"{self.variant}-{layers}-{self.weight:.15g}"

    @property
    def effect(self) -> str:
        if self.loss is None or self.cosine is None:
            return DIVERGES
        loss = direction(self.loss, LOSS_FLOOR)
        return HURTS if loss > 0 else EFFECTS[direction(self.cosine, COSINE_FLOOR), loss]


@dataclass(frozen=True)
class Pilot:
    """recipe: with the pilot's number of tokens. recipe_tokens: its own. candidates: after `run`, best first.

    scored: {windows, documents, tokens, sequences} that each was measured on.
    """

    recipe: Recipe
    recipe_tokens: int
    candidates: list[Candidate]
    scored: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of each training: whole optimizer steps."""
        return self.recipe.steps * self.recipe.tokens_per_step

    @property
    def best(self) -> Candidate | None:
        return next((each for each in self.candidates if each.effect.startswith(USEFUL)), None)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides all trainings: of the recipe all but variant, layers and weight."""
        identity = self.recipe.identity()
        identity["train"]["dispersion"] = self.dispersion().model_dump(mode="json", exclude=set(VARIED))
        return {**identity, "pilot": True}  # a build does not write here

    def dispersion(self, candidate: Candidate | None = None) -> Dispersion:
        """The recipe's section, with the candidate's setting."""
        section = self.recipe.train.dispersion or Dispersion()
        return section.model_copy(update={key: getattr(candidate, key) for key in VARIED if candidate})


def plan(
    recipe: Recipe, *, weights: str, tokens: str, layers: str | None = None, variants: str | None = None
) -> Pilot:
    """The pilot that the command's options describe: lists with commas; None: as in the recipe.

    Raises BadInput for a value that is unknown or listed twice, and for fewer tokens than a step takes.
    """
    section, train, step = recipe.train.dispersion or Dispersion(), recipe.train, recipe.tokens_per_step
    names: list[Any] = _list("--layers", layers, partial(choice, choices=LAYER_NAMES))
    settings = product(
        _list("--variants", variants, partial(choice, choices=VARIANTS)) or [section.variant],
        names or [section.layers],
        _list("--weights", weights, _weight),
    )
    count = _list("--tokens", tokens, read_whole)[0]
    if count < step:
        raise BadInput(
            f"--tokens {tokens}: too few: one step takes {step:,} (batch {train.batch} x accumulate "
            f"{train.accumulate} x context {recipe.data.context}); needs at least {step}"
        )
    steps = min(count // step, SMOKE_STEPS) if recipe.is_smoke else count // step
    short = recipe.model_copy(update={"train": train.model_copy(update={"tokens": steps * step})})
    return Pilot(short, train.tokens, [Candidate(*setting) for setting in settings])


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


def run_folder(pilot: Pilot, out: Path | None) -> Path:
    return out or Path("runs") / f"{pilot.recipe.name}-pilot-{hash8(pilot.identity)}"


def run(pilot: Pilot, folder: Path, screen: Screen) -> Pilot:
    """Train and measure the baseline and every candidate; writes pilot.json and pilot.png.

    Raises BadInput for what the user can mend, BuildFailed if the baseline cannot be trained.
    """
    with open_run(folder, pilot.identity, f"a pilot of {pilot.recipe.name}"):
        records = {stage.name: stage.record for stage in walk(stages(pilot), folder, screen)}
        measured = [_measure(candidate, records, pilot.recipe.seed) for candidate in pilot.candidates]
        pilot = replace(pilot, candidates=ranked(measured), scored=records["judging"].results)
        write_json(folder / "pilot.json", summary(pilot))
        _draw(pilot.candidates, folder)
    return pilot


def stages(pilot: Pilot) -> list[Stage]:
    """Base and corpus of a build, the count of what is scored, the baseline and every candidate."""
    recipe, inputs = pilot.recipe, {"base": "base", "corpus": "corpus"}
    scored = SMOKE_SCORED_TOKENS if recipe.is_smoke else SCORED_TOKENS
    evaluate = Evaluate(tasks=("heldout_perplexity",), limit=MOST_WINDOWS, perplexity_tokens=scored)
    items = ItemsOptions(evaluate, recipe.data.context, recipe.seed)
    judging = Stage("judging", f"{FUNCTIONS}:judging", items, inputs)
    result = [build_plan.base(recipe), build_plan.corpus(recipe), judging]
    arms: dict[str, Dispersion | None] = {BASELINE: None}
    arms |= {candidate.name: pilot.dispersion(candidate) for candidate in pilot.candidates}
    for name, dispersion in arms.items():
        training = build_plan.training(recipe, ArmRun(name, name, 0, recipe.seed, dispersion)).options
        options = CandidateOptions(training, items, may_diverge=dispersion is not None)
        result.append(Stage(name, f"{FUNCTIONS}:candidate", options, inputs, resumable=True))
    return result


def _measure(candidate: Candidate, records: dict[str, Record], seed: int) -> Candidate:
    """With its differences to the baseline: paired by window and by sequence, with a bootstrap."""
    from edgedisp.evaluate.statistics import VALUE, Metric, Resampling, difference  # loads scipy

    record = records[candidate.name]
    if diverged := record.results.get("diverged"):
        return replace(candidate, diverged=diverged)
    first, second = (
        json.loads((folder / "judged.json").read_text(encoding="utf-8"))
        for folder in (records[BASELINE].folder, record.folder)
    )
    resampling, loss = Resampling(BOOTSTRAP, seed), Metric("loss", "nll", "tokens", higher_is_better=False)
    losses = difference([(first["items"], second["items"])], loss, resampling).estimate
    cosines = difference([(first["cosine"], second["cosine"])], VALUE, resampling).estimate
    return replace(candidate, loss=losses, cosine=cosines)


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
    plain, words = Dispersion(), []
    for name, value in dispersion:
        if name in VARIED or value != getattr(plain, name):
            text = f"{value:.15g}" if isinstance(value, float) else json.dumps(value).replace('"', "")
            words.append(f"{name}: {text}")
    return f"dispersion: {{{', '.join(words)}}}"


def advice(pilot: Pilot) -> list[str]:
    """What to do with the candidates, best first, in sentences."""
    if pilot.best is not None:
        line = recipe_line(pilot.dispersion(pilot.best))
        sentences = [f"The setting to build with, under train: {line}"]
    else:
        only_harm = {candidate.effect for candidate in pilot.candidates} <= {HURTS, DIVERGES}
        remedy = "smaller weights" if only_harm else "larger weights, or more tokens"
        sentences = [f"No setting can be recommended: try {remedy}."]
    if pilot.recipe_tokens > 2 * pilot.tokens:
        sentences.append(
            f"The recipe trains on {pilot.recipe_tokens:,} tokens, {pilot.recipe_tokens / pilot.tokens:.3g} "
            "times as many: what is idle here may act there, and what is harmless here may hurt."
        )
    return sentences


def summary(pilot: Pilot) -> dict[str, Any]:
    """The content of pilot.json. `chosen`: a candidate's name or None; `line`: that candidate in a recipe."""
    return {
        "recipe": pilot.recipe.name,
        "smoke": pilot.recipe.is_smoke,
        "tokens": pilot.tokens,
        "recipe_tokens": pilot.recipe_tokens,
        "floors": {"loss": LOSS_FLOOR, "cosine": COSINE_FLOOR},
        "scored": pilot.scored,
        "candidates": [{"name": row.name, "effect": row.effect, **to_json(row)} for row in pilot.candidates],
        "chosen": pilot.best and pilot.best.name,
        "line": pilot.best and recipe_line(pilot.dispersion(pilot.best)),
        "advice": advice(pilot),
    }


def render(pilot: Pilot, width: int) -> str:
    """Table and advice for a terminal of `width` columns."""
    scored = pilot.scored
    head = (
        f"{pilot.recipe.name}: {pilot.tokens:,} tokens each; scored on {scored['tokens']:,} held-out tokens "
        f"of {scored['documents']} documents, and {scored['sequences']} sequences"
    )
    if pilot.recipe.is_smoke:
        head += "\nA tiny random model: this shows that the pilot runs, and says nothing of the recipe's."
    rows = [
        (row.name, *(format_estimate(figure, signs=True) for figure in (row.loss, row.cosine)), row.effect)
        for row in pilot.candidates
    ]
    table = Grid(("candidate", "loss - baseline", "cosine - baseline", "effect"), tuple(rows))
    return "\n\n".join([head, grid_text(table, width), LEGEND, *advice(pilot)])


def _draw(candidates: Sequence[Candidate], folder: Path) -> None:
    from edgedisp.report import figure, plots  # bring matplotlib

    panels: dict[str, dict[str, tuple[Estimate, Estimate]]] = {}
    for row in sorted(candidates, key=lambda row: row.weight):
        if row.loss is not None and row.cosine is not None:
            title = row.name.rpartition("-")[0]
            panels.setdefault(title, {})[f"weight {row.weight:g}"] = row.cosine, row.loss
    if panels:
        figure.save(plots.pilot_plot(panels, (COSINE_FLOOR, LOSS_FLOOR)), folder)
