"""The stages of a pilot, and the loop over its rungs.

A pilot is made of the stages of a build: `base`, `corpus`, and for every training the build's own training
stage, wrapped in one that measures the model and throws it away. They lie in a run folder of their own:

    runs/<recipe>-pilot-<hash8>/{base,corpus,judging,tokens-5120/{baseline,angular-all-0.1,...},...,pilot.json}

So a pilot that was stopped continues where it stopped, another weight trains what is new, and an unchanged
command runs nothing. A change of the tokens or of anything else in the recipe that training depends on gets
another folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgedisp.core.files import write_json
from edgedisp.core.progress import Progress
from edgedisp.core.results import BASELINE
from edgedisp.core.stage_folder import Record, open_run
from edgedisp.pilot import show
from edgedisp.pilot.candidates import Candidate, Pilot
from edgedisp.pilot.halving import ranked, survivors
from edgedisp.pilot.judging import compared, judged
from edgedisp.pipeline import build_plan
from edgedisp.pipeline.options import CandidateOptions, ItemsOptions
from edgedisp.pipeline.stage import Observer, Stage, Walk
from edgedisp.recipe import ArmRun, Dispersion, Evaluate

CANDIDATE = "edgedisp.pipeline.pilot_candidate"
RESULT = "pilot.json"
# Held-out tokens a candidate is scored on. Twice as many took as long as the training of a first rung, and
# gave paired intervals of +-0.001 nats after one step at weight 3 on SmolLM2-135M: finer than the floor asks.
JUDGED_TOKENS = 4096
SMOKE_TOKENS = 1024
MOST_WINDOWS = 400


def pilot_folder(pilot: Pilot, out: Path | None) -> Path:
    """The run folder: named by all that decides the trainings but variants, layers and weights."""
    recipe = pilot.recipe
    train = recipe.train.model_copy(update={"dispersion": _without_choice(pilot)})
    hash8 = recipe.model_copy(update={"train": train}).hash8
    return out or Path("runs") / f"{recipe.name}-pilot-{hash8}"


def run(pilot: Pilot, folder: Path, observer: Observer) -> dict[str, Any]:
    """Walk the rungs in `folder`, write pilot.json and the picture into it, and return what was found.

    See `show.result` for what that is. Raises BadInput for what the user can mend, BuildFailed if the
    baseline cannot be trained.
    """
    total = 3 + sum(count for count, _ in pilot.trainings)
    with open_run(folder, _identity(pilot), f"a pilot of {pilot.recipe.name}"):
        way = Walk(folder)
        _pass(way, _start(pilot), observer, total)
        rungs = []
        going = pilot.candidates
        for steps in pilot.steps:
            todo = _trainings(pilot, steps, going)
            _pass(way, todo, observer, total)
            rungs.append(_judge(pilot, steps, going, [way.records[stage.name] for stage in todo]))
            going = _going_on(going, rungs[-1])
            if not going:
                break
        found = show.result(pilot, folder, rungs, way.records["judging"].results)
        _publish(found, folder)
    return found


def _pass(way: Walk, stages: list[Stage], observer: Observer, total: int) -> None:
    for stage in stages:
        record = way.finished(stage)
        if record is None:
            observer.started(stage.name, len(way.records) + 1, total)
            record = way.execute(stage, observer.progress)
            observer.finished(stage.name, record)
        else:
            observer.kept(stage.name, record)
        way.records[stage.name] = record
    way.hashes.save()


def _judge(pilot: Pilot, steps: int, tried: tuple[Candidate, ...], records: list[Record]) -> dict[str, Any]:
    """The candidates of a rung, best first, from the records of the baseline and of each."""
    baseline, *others = records
    found = {
        one.name: compared(one.name, baseline, record, pilot.recipe.seed)
        for one, record in zip(tried, others, strict=True)
    }
    verdicts = [judged(name, part) for name, part in found.items()]
    going = [] if steps == pilot.steps[-1] else survivors(verdicts)
    said = {one.name: _said(one) for one in tried}
    rows = [{**said[one.name], **found[one.name], "goes_on": one.name in going} for one in ranked(verdicts)]
    return {"steps": steps, "tokens": pilot.tokens(steps), "candidates": rows}


def _going_on(tried: tuple[Candidate, ...], rung: dict[str, Any]) -> tuple[Candidate, ...]:
    names = {row["name"] for row in rung["candidates"] if row["goes_on"]}
    return tuple(one for one in tried if one.name in names)


def _said(one: Candidate) -> dict[str, Any]:
    layers = one.layers if isinstance(one.layers, str) else list(one.layers)
    return {"name": one.name, "variant": one.variant, "layers": layers, "weight": one.weight}


def _start(pilot: Pilot) -> list[Stage]:
    """The weights and tokens that a build of the recipe would start from, and what is judged by."""
    return [build_plan.base(pilot.recipe), build_plan.corpus(pilot.recipe), _judging(pilot)]


def _judging(pilot: Pilot) -> Stage:
    return Stage("judging", f"{CANDIDATE}:judging", _items(pilot), {"base": "base", "corpus": "corpus"})


def _judged_by(pilot: Pilot) -> Evaluate:
    """The part of a build's scoring that a pilot does: held-out loss, on a few thousand tokens."""
    return Evaluate(
        tasks=("heldout_perplexity",),
        limit=MOST_WINDOWS,
        perplexity_tokens=SMOKE_TOKENS if pilot.recipe.is_smoke else JUDGED_TOKENS,
    )


def _items(pilot: Pilot) -> ItemsOptions:
    return ItemsOptions(_judged_by(pilot), pilot.recipe.data.context, pilot.recipe.seed)


def _trainings(pilot: Pilot, steps: int, tried: tuple[Candidate, ...]) -> list[Stage]:
    """The stages of a rung, the baseline's first."""
    return [_training(pilot, steps, one) for one in (None, *tried)]


def _training(pilot: Pilot, steps: int, candidate: Candidate | None) -> Stage:
    """A candidate, or (None) the baseline, trained for so many steps: what a build of that length trains."""
    recipe, tokens = pilot.recipe, pilot.tokens(steps)
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens": tokens})})
    name = BASELINE if candidate is None else candidate.name
    dispersion = None if candidate is None else candidate.laid_over(pilot.dispersion)
    training = build_plan.training(short, ArmRun(name, name, 0, recipe.seed, dispersion)).options
    options = {"training": training, "items": _items(pilot), "may_diverge": candidate is not None}
    return Stage(
        f"tokens-{tokens}/{name}",
        f"{CANDIDATE}:pilot_candidate",
        CandidateOptions(**options),
        {"base": "base", "corpus": "corpus"},
        resumable=True,
    )


def _without_choice(pilot: Pilot) -> Dispersion:
    """The recipe's dispersion section without what the candidates differ in."""
    plain = Dispersion()
    own = {name: getattr(plain, name) for name in ("variant", "layers", "weight")}
    return pilot.dispersion.model_copy(update=own)


def _identity(pilot: Pilot) -> dict[str, Any]:
    train = pilot.recipe.train.model_copy(update={"dispersion": _without_choice(pilot)})
    identity = pilot.recipe.model_copy(update={"train": train}).identity()
    return {**identity, "pilot": True}  # a build does not write here


def _publish(found: dict[str, Any], folder: Path) -> None:
    """Write pilot.json and the picture, unless they stand there already."""
    path = folder / RESULT
    picture = folder / "pilot.png"
    if path.is_file() and picture.is_file() and json.loads(path.read_text(encoding="utf-8")) == found:
        return
    from edgedisp.report.figure import save
    from edgedisp.report.plot_pilot import pilot_plot

    save(pilot_plot(found), folder)
    write_json(path, found)


def estimate(pilot: Pilot, folder: Path, progress: Progress) -> dict[str, Any]:
    """What is left to be done, at most: `trainings`, `tokens`, and roughly `seconds` (None if unknown).

    The speed is that of the trainings that are finished in `folder`. If there are none, the base is opened
    and a few steps are taken; a smoke run, which is short, is not estimated.
    """
    left, done = _left(pilot, folder)
    tokens = sum(count * tokens for count, tokens in left)
    seconds = None
    if trained := sum(int(record.results.get("tokens", 0)) for record in done):
        seconds = sum(record.seconds for record in done) / trained * tokens
    elif left and not pilot.recipe.is_smoke:
        seconds = _probed(pilot, left, progress)
    return {"trainings": sum(count for count, _ in left), "tokens": tokens, "seconds": seconds}


def _left(pilot: Pilot, folder: Path) -> tuple[list[tuple[int, int]], list[Record]]:
    """(trainings, tokens of each) that are not done, by rung; and the records of those that are."""
    records = _kept(_start(pilot), folder, {})
    done: list[Record] = []
    going = pilot.candidates
    for place, steps in enumerate(pilot.steps):
        todo = _trainings(pilot, steps, going)
        kept = _kept(todo, folder, records)
        found = [kept[stage.name] for stage in todo if stage.name in kept]
        done += found
        if missing := len(todo) - len(found):
            return [(missing, pilot.tokens(steps)), *pilot.trainings[place + 1 :]], done
        going = _going_on(going, _judge(pilot, steps, going, found))
        if not going:
            break
    return [], done


def _kept(todo: list[Stage], folder: Path, records: dict[str, Record]) -> dict[str, Record]:
    """`records` and those of the stages that a walk would keep."""
    way = Walk(folder)
    way.records |= records
    for stage in todo:
        if (record := way.finished(stage)) is not None:
            way.records[stage.name] = record
    return way.records


def _probed(pilot: Pilot, left: list[tuple[int, int]], progress: Progress) -> float:
    from edgedisp.commands.plan import probe_base
    from edgedisp.pipeline.condensation import CONDENSATION_SEQUENCES

    measured = probe_base(pilot.recipe, progress)
    step_s = measured["micro_step_s"] * pilot.recipe.train.accumulate + measured["optimizer_s"]
    judged_tokens = JUDGED_TOKENS + CONDENSATION_SEQUENCES * pilot.recipe.data.context
    judging_s = judged_tokens * measured["forward_s_per_token"]
    return float(
        sum(count * (tokens // pilot.recipe.tokens_per_step * step_s + judging_s) for count, tokens in left)
    )
