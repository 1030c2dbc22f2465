"""`edgedisp pilot`: which dispersion settings do anything, found out before a build spends hours.

A baseline and a candidate for every weight, choice of layers and variant are trained for `--tokens` by the
build's own training stage, from the same start and in the same order, so each is bit for bit what a build of
so many tokens trains. Each is measured on held-out loss and mean cosine, and its weights are thrown away.

    runs/<recipe>-pilot-<hash8>/{base, corpus, judging, baseline, angular-all-0.1, ..., pilot.json}

One seed is trained: intervals are over texts, not over trainings. Finished candidates are reused, also when
other weights, layers or variants are tried: these are not part of the folder's hash.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.files import to_json, write_json
from edgedisp.core.results import BASELINE, Estimate
from edgedisp.core.stage_folder import Record, open_run
from edgedisp.pipeline import build_plan
from edgedisp.pipeline.options import CandidateOptions, ItemsOptions
from edgedisp.pipeline.stage import Observer, Stage, walk
from edgedisp.recipe import ArmRun, Dispersion, Evaluate, Recipe
from edgedisp.recipe.smoke import STEPS as SMOKE_STEPS
from edgedisp.recipe.units import read_number, read_whole
from edgedisp.recipe.values import LAYER_NAMES, VARIANTS, choice

FUNCTIONS = "edgedisp.pipeline.sweep_candidate"
BOOTSTRAP = 2000
LOSS_FLOOR = 0.005  # nats per token: half a percent of perplexity
COSINE_FLOOR = 0.005  # 80,000 tokens at weight 1 moved the mean cosine of SmolLM2-135M by 0.017, of 0.54
# Twice as many tokens took as long as a short training, and gave intervals far finer than the floor.
SCORED_TOKENS, SMOKE_SCORED_TOKENS, MOST_WINDOWS = 4096, 1024, 400

HURTS, NOTHING, DIVERGES = "hurts", "nothing measurable", "diverges"
EFFECTS = {
    ("down", "down"): "disperses, loss better",
    ("down", "still"): "disperses, loss unchanged",
    ("still", "down"): "loss better, not dispersed",
    ("still", "still"): NOTHING,
    ("up", "down"): "condenses, loss better",
    ("up", "still"): "condenses, loss unchanged",
}
"""(cosine, loss) -> what a setting does. A loss that went up is `hurts`, whatever the cosine did."""
LEGEND = f"""\
loss: held-out, nats per token; cosine: mean over the pairs of tokens and over the layers; both less the
baseline's, with paired 95 % intervals over texts (one seed: not over trainings). A difference counts if its
interval lies on one side of 0 and its size is at least {LOSS_FLOOR:g} (loss) or {COSINE_FLOOR:g} (cosine).
The best of several is a little flattered: it was chosen by text that a build scores as well."""


@dataclass(frozen=True)
class Row:
    """A candidate. layers: a name, or layers counted from 0.

    loss (nats per token), cosine: candidate - baseline, over texts; None before measuring and where the
    training diverged, and then `diverged` says why.
    """

    variant: str
    layers: str | tuple[int, ...]
    weight: float
    loss: Estimate | None = None
    cosine: Estimate | None = None
    diverged: str | None = None

    @property
    def name(self) -> str:
        """Its folder; a recipe's own list of layers, of which there is one at most, is `listed`."""
        layers = self.layers if isinstance(self.layers, str) else "listed"
        return f"{self.variant}-{layers}-{self.weight:.15g}"

    @property
    def effect(self) -> str:
        """What the setting does, in words."""
        if self.loss is None or self.cosine is None:
            return DIVERGES
        loss = moved(self.loss, LOSS_FLOOR)
        return HURTS if loss == "up" else EFFECTS[moved(self.cosine, COSINE_FLOOR), loss]


@dataclass(frozen=True)
class Sweep:
    """What is trained. recipe: with the pilot's tokens. dispersion: the section that rows are laid over."""

    recipe: Recipe
    recipe_tokens: int
    dispersion: Dispersion
    rows: tuple[Row, ...]

    @property
    def tokens(self) -> int:
        """Tokens of each training: whole optimizer steps."""
        return self.recipe.steps * self.recipe.tokens_per_step


def moved(difference: Estimate, floor: float) -> str:
    """`down` or `up` if the interval lies on one side of 0 and the size reaches the floor, else `still`."""
    value, low, high = difference.value, difference.low, difference.high
    if value is None or low is None or high is None or abs(value) < floor:
        return "still"
    return "down" if high < 0 else "up" if low > 0 else "still"


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Lower losses first; then an unmoved loss, by cosine; then what hurts least; last what diverged."""

    def rank(row: Row) -> tuple[int, float]:
        if row.loss is None or row.cosine is None:
            return 3, 0.0
        place = {"down": 0, "still": 1, "up": 2}[moved(row.loss, LOSS_FLOOR)]
        return place, (row.cosine if place == 1 else row.loss).value or 0.0

    return sorted(rows, key=rank)


def plan(
    recipe: Recipe, *, weights: str, tokens: str, layers: str | None = None, variants: str | None = None
) -> Sweep:
    """The sweep that the options ask for: lists with commas; None takes the recipe's own. Raises BadInput."""
    section = recipe.train.dispersion or Dispersion()
    rows = [
        Row(variant, chosen, weight)
        for variant, chosen, weight in product(
            [section.variant] if variants is None else _choices("--variants", variants, VARIANTS),
            [section.layers] if layers is None else _choices("--layers", layers, LAYER_NAMES),
            _weights(weights),
        )
    ]
    try:
        count = read_whole(tokens)
    except ValueError as problem:
        raise BadInput(f"--tokens {tokens}: {problem}; write it as 20k") from None
    steps, train, step = count // recipe.tokens_per_step, recipe.train, recipe.tokens_per_step
    if steps < 1:
        raise BadInput(
            f"--tokens {tokens}: too few: one step takes {step:,} (batch {train.batch} x accumulate "
            f"{train.accumulate} x context {recipe.data.context}); needs at least {step}"
        )
    steps = min(steps, SMOKE_STEPS) if recipe.is_smoke else steps
    short = recipe.model_copy(update={"train": train.model_copy(update={"tokens": steps * step})})
    return Sweep(short, train.tokens, section, tuple(rows))


def _weights(text: str) -> list[float]:
    values: list[float] = []
    for word in _words("--weights", text):
        try:
            value = read_number(word)
        except ValueError:
            raise BadInput(f"--weights {text}: '{word}' is no number; write them as 0.03,0.1,0.3") from None
        if not 0 < value <= 1e9:
            raise BadInput(f"--weights {text}: {word} is not above 0 and at most 1e9 (0 is the baseline)")
        if value in values:
            raise BadInput(f"--weights {text}: {value:g} is listed twice; name each once")
        values.append(value)
    return values


def _choices(option: str, text: str, choices: Sequence[str]) -> list[str]:
    words = _words(option, text)
    for index, word in enumerate(words):
        try:
            choice(word, choices)
        except ValueError as problem:
            raise BadInput(f"{option} {text}: '{word}' is not known; {problem}") from None
        if word in words[:index]:
            raise BadInput(f"{option} {text}: {word} is listed twice; name each once")
    return words


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise BadInput(f"{option} '{text}': a value is missing; write them with commas between")
    return words


def run_folder(sweep: Sweep, out: Path | None) -> Path:
    """Named by all that decides the trainings but variants, layers and weights."""
    return out or Path("runs") / f"{sweep.recipe.name}-pilot-{_common(sweep).hash8}"


def run(sweep: Sweep, folder: Path, observer: Observer) -> dict[str, Any]:
    """Train and measure the baseline and every row; writes pilot.json and returns what it holds.

    {recipe, run, smoke, tokens, recipe_tokens, floors, judged_by, candidates [best first, with name and
    effect], chosen: a name or None, line: it in a recipe, sentences: the verdict}. Raises BadInput for what
    the user can mend, BuildFailed if the baseline cannot be trained.
    """
    recipe = sweep.recipe
    identity = {**_common(sweep).identity(), "pilot": True}  # a build does not write here
    with open_run(folder, identity, f"a pilot of {recipe.name}"):
        passed = walk(stages(sweep), folder, observer)
        records = {stage.name: stage.record for stage in passed}
        rows = ranked([_measured(row, records, recipe.seed) for row in sweep.rows])
        useful = (row for row in rows if row.effect.startswith(("disperses", "loss better")))
        best = next(useful, None)
        results = {
            "recipe": recipe.name,
            "run": str(folder),
            "smoke": recipe.is_smoke,
            "tokens": sweep.tokens,
            "recipe_tokens": sweep.recipe_tokens,
            "floors": {"loss": LOSS_FLOOR, "cosine": COSINE_FLOOR},
            "judged_by": records["judging"].results,
            "candidates": [{"name": row.name, "effect": row.effect, **to_json(row)} for row in rows],
            "chosen": None if best is None else best.name,
            "line": None if best is None else recipe_line(sweep.dispersion, best),
            "sentences": verdict(rows, sweep.tokens, sweep.recipe_tokens),
        }
        path = folder / "pilot.json"
        if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != results:
            write_json(path, results)
    return results


def stages(sweep: Sweep) -> list[Stage]:
    """Base and corpus of a build, the count of what is scored, the baseline and every candidate."""
    recipe, inputs = sweep.recipe, {"base": "base", "corpus": "corpus"}
    scored = SMOKE_SCORED_TOKENS if recipe.is_smoke else SCORED_TOKENS
    evaluate = Evaluate(tasks=("heldout_perplexity",), limit=MOST_WINDOWS, perplexity_tokens=scored)
    items = ItemsOptions(evaluate, recipe.data.context, recipe.seed)
    judging = Stage("judging", f"{FUNCTIONS}:judging", items, inputs)
    plan = [build_plan.base(recipe), build_plan.corpus(recipe), judging]
    for row in (None, *sweep.rows):
        name, dispersion = BASELINE, None
        if row is not None:
            setting = {"variant": row.variant, "layers": row.layers, "weight": row.weight}
            name = row.name
            dispersion = Dispersion.model_validate({**sweep.dispersion.model_dump(), **setting})
        training = build_plan.training(recipe, ArmRun(name, name, 0, recipe.seed, dispersion)).options
        options = CandidateOptions(training, items, may_diverge=row is not None)
        plan.append(Stage(name, f"{FUNCTIONS}:candidate", options, inputs, resumable=True))
    return plan


def _common(sweep: Sweep) -> Recipe:
    """The recipe without what the candidates differ in."""
    plain = Dispersion()
    varied = {name: getattr(plain, name) for name in ("variant", "layers", "weight")}
    train = sweep.recipe.train.model_copy(update={"dispersion": sweep.dispersion.model_copy(update=varied)})
    return sweep.recipe.model_copy(update={"train": train})


def _measured(row: Row, records: dict[str, Record], seed: int) -> Row:
    """The row with its differences to the baseline: paired by window and by sequence, with a bootstrap."""
    from edgedisp.evaluate.statistics import VALUE, Metric, Resampling, difference  # loads scipy

    record = records[row.name]
    if diverged := record.results.get("diverged"):
        return Row(row.variant, row.layers, row.weight, diverged=diverged)
    pair = [
        json.loads((folder / "judged.json").read_text(encoding="utf-8"))
        for folder in (records[BASELINE].folder, record.folder)
    ]
    resampling, loss = Resampling(BOOTSTRAP, seed), Metric("loss", "nll", "tokens", higher_is_better=False)
    losses = difference(pair[0]["items"], pair[1]["items"], loss, resampling).estimate
    cosines = difference(pair[0]["cosine"], pair[1]["cosine"], VALUE, resampling).estimate
    return Row(row.variant, row.layers, row.weight, losses, cosines)


def recipe_line(section: Dispersion, row: Row) -> str:
    """`dispersion: {...}` as it belongs under `train:`, with the other keys of the recipe's section."""
    plain = Dispersion()
    values = {name: value for name, value in section if value != getattr(plain, name)}
    values |= {"variant": row.variant, "layers": row.layers, "weight": row.weight}
    words = {
        name: f"{value:.15g}" if isinstance(value, float) else json.dumps(value)
        for name, value in values.items()
    }
    keys = [f"{name}: {words[name]}".replace('"', "") for name in Dispersion.model_fields if name in words]
    return f"dispersion: {{{', '.join(keys)}}}"


def verdict(rows: Sequence[Row], tokens: int, recipe_tokens: int) -> list[str]:
    """What the rows say, in sentences; `rows` best first."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row.effect, []).append(setting(row, rows))
    if list(groups) == [NOTHING]:
        return [
            f"No setting does anything measurable within {tokens:,} tokens. "
            "Try larger weights, or more tokens."
        ]
    sentences = [f"{effect[0].upper()}{effect[1:]}: {', '.join(names)}." for effect, names in groups.items()]
    if not any(effect.startswith(("disperses", "loss better")) for effect in groups):
        only_harm = set(groups) <= {HURTS, DIVERGES}
        advice = "try smaller weights" if only_harm else "more tokens, or other weights, may show one"
        sentences.append(f"No setting can be recommended: {advice}.")
    if recipe_tokens > 2 * tokens:
        sentences.append(
            f"The recipe trains on {recipe_tokens:,} tokens, {recipe_tokens / tokens:.3g} times as many: "
            "what is idle here may act there, and what is harmless here may hurt."
        )
    return sentences


def setting(row: Row, rows: Sequence[Row]) -> str:
    """`weight 0.3`, with variant and layers where the rows differ in them."""
    words = [f"weight {row.weight:g}"]
    if len({other.variant for other in rows}) > 1:
        words.append(row.variant)
    if len({other.layers for other in rows}) > 1:
        words.append(f"layers {_layers(row.layers)}")
    return " ".join(words)


def _layers(layers: str | Sequence[int]) -> str:
    return layers if isinstance(layers, str) else "+".join(map(str, layers))


def render(results: dict[str, Any]) -> str:
    """Table, verdict and recipe line for a terminal."""
    by = results["judged_by"]
    head = (
        f"{results['recipe']}: {results['tokens']:,} tokens each; judged on {by['tokens']:,} held-out tokens "
        f"of {by['documents']} documents, and {by['sequences']} sequences"
    )
    if results["smoke"]:
        head += "\nA tiny random model: this shows that the pilot runs, and says nothing of the recipe's."
    table = [("variant", "layers", "weight", "loss - baseline", "cosine - baseline", "effect")]
    for row in results["candidates"]:
        cells = [_cell(row["loss"]), _cell(row["cosine"])]
        table.append((row["variant"], _layers(row["layers"]), f"{row['weight']:g}", *cells, row["effect"]))
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
    blocks = [head, "\n".join(lines), LEGEND, "\n".join(results["sentences"])]
    if results["line"]:
        blocks.append(f"The setting to build with; in the recipe, under train:\n  {results['line']}")
    return "\n\n".join(blocks)


def _cell(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    interval = "" if estimate["low"] is None else f" [{estimate['low']:+.4f}, {estimate['high']:+.4f}]"
    return f"{estimate['value']:+.4f}{interval}"
