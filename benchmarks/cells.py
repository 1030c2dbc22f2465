"""The cells of the before/after study: one training each, with what its model scores at every precision.

A cell is the build's own stages for one arm and one seed: training, condensation, export, int8, int4, scores.
Its weights are thrown away; what every item scored is kept in `results/before_after_cells.json`, written anew
after each cell, so that a study of many hours is continued where it stopped, on another machine too. What is
the same for all (the items, their tokens and bytes) stands there once.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import RESULTS

from edgedisp.bench.system import describe
from edgedisp.core.paths import data_folder
from edgedisp.core.progress import Screen
from edgedisp.core.results import Measurement
from edgedisp.core.serialization import from_json
from edgedisp.core.stage_folder import digest, open_run, write_json
from edgedisp.pipeline import Stage, Walked, base_stage, corpus_stage, training_stage, walk
from edgedisp.pipeline import shipping as ship
from edgedisp.plan import threads_for
from edgedisp.recipe import ArmRun, Recipe, load, smoke
from edgedisp.summary import condensation_record, noise_record

CELLS = RESULTS / "before_after_cells.json"
PRECISIONS = ("fp32", "int8", "int4")
ANSWERS = ("accuracy", "nll")  # of an item, a model's own; all else is the item's
COSINES = ("cosine_raw", "cosine_sink_excluded", "cosine_mean_removed")
FORM = 1  # raised when a cell holds other figures

PLAIN, AWARE = "plain", "aware"
ARMS = {
    PLAIN: "[baseline, dispersed, {name: dispersed_1, dispersion: {weight: 1.0}}]",
    AWARE: "[baseline, dispersed]",
}


def recipes(tokens: str, seeds: int, limit: int, is_smoke: bool) -> dict[str, Recipe]:
    """The quickstart's model and text under both ways of training; `is_smoke`: a tiny twin of the model."""
    shared = [
        f"train.tokens={tokens}",
        f"seeds={seeds}",
        f"evaluate.limit={limit}",
        f"precisions=[{','.join(PRECISIONS)}]",
        "targets=[]",
    ]
    own = {PLAIN: [], AWARE: ["train.quantization_aware=int4"]}
    quickstart = data_folder("recipes") / "quickstart.yaml"
    found = {
        way: load(quickstart, [*shared, f"name=study-{way}", f"arms={arms}", *own[way]])
        for way, arms in ARMS.items()
    }
    return {way: smoke(recipe) for way, recipe in found.items()} if is_smoke else found


def key_of(chosen: dict[str, Recipe]) -> str:
    """Names all that the cells depend on; not the number of seeds, nor what is done beside training and
    scoring."""
    sections = {"seed", "model", "data", "train", "arms", "quantize"}
    scored = {"tasks", "limit", "perplexity_tokens"}
    told = {
        way: recipe.model_dump(mode="json", include={**dict.fromkeys(sections, True), "evaluate": scored})
        for way, recipe in chosen.items()
    }
    return digest({"form": FORM, **told})


def opened(chosen: dict[str, Recipe], path: Path = CELLS) -> dict[str, Any]:
    """The cells made so far: {key, recipes, items {task: ...}, cells {name: ...}, noise {precision: ...}}.

    Twins are trained on one machine. So where the arms of a seed are not all there, those that another
    machine made are left out, to be made again.
    """
    key = key_of(chosen)
    if not path.is_file():
        texts = {way: recipe.to_yaml() for way, recipe in chosen.items()}
        return {"key": key, "recipes": texts, "items": {}, "cells": {}, "noise": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["key"] != key:
        sys.exit(f"{path}: holds cells of other settings; move it away, or ask for what it was made with")
    found.setdefault("noise", {})
    here = describe()["cpu"]
    twins: dict[int, list[str]] = {}
    for way, recipe in chosen.items():
        for run in recipe.arm_runs:
            twins.setdefault(run.seed, []).append(f"{way}/{run.arm}/{run.seed}")
    for names in twins.values():
        there = [name for name in names if name in found["cells"]]
        for name in there if len(there) < len(names) else ():
            if found["cells"][name]["machine"] != here:
                print(f"{name}: made on another machine, and its twins are not; again", file=sys.stderr)
                del found["cells"][name]
    return found


def todo(chosen: dict[str, Recipe], made: dict[str, Any]) -> Iterator[tuple[str, Recipe, ArmRun]]:
    """The cells that are missing, the first seed of every arm before the second of any; the first one of all
    also without the noise floor, which is measured on its bundles."""
    runs = [(way, recipe, run) for way, recipe in chosen.items() for run in recipe.arm_runs]
    for way, recipe, run in sorted(runs, key=lambda one: one[2].replica):
        name = f"{way}/{run.arm}/{run.seed}"
        if name not in made["cells"] or (_tells_noise(name, recipe) and not made["noise"]):
            yield name, recipe, run


def make(name: str, recipe: Recipe, run: ArmRun, folder: Path, made: dict[str, Any]) -> None:
    """Walk the stages of one cell, put what it scored into `made`, and delete the weights."""
    started = time.perf_counter()
    threads = threads_for(recipe)
    stages = [base_stage(recipe), corpus_stage(recipe), ship.items(recipe), *_stages(recipe, run, threads)]
    noise = _tells_noise(name, recipe)
    stages += [
        ship.measure(recipe, ship.Measured(run.name, precision, None, precision == "torch", noise), threads)
        for precision in ("torch", *PRECISIONS)
    ]
    with open_run(folder, recipe.identity(), recipe.name), Screen(name) as screen:
        walked = walk(stages, folder, screen)
    records = {step.name: step.record for step in walked}
    measured = {
        one: from_json(Measurement, records[f"{run.name}/measure-{one}"].results)
        for one in ("torch", *PRECISIONS)
    }
    cell: dict[str, Any] = {
        "machine": describe()["cpu"],
        "seconds": time.perf_counter() - started,
        "training_seconds": records[f"{run.name}/model"].results["seconds"],
        "condensation": _kept(condensation_record(measured["torch"].condensation)),
        "size_bytes": {one: records[f"{run.name}/{one}"].results["size_bytes"] for one in PRECISIONS},
        "scores": {one: _scores(walked, run, one, made["items"]) for one in PRECISIONS},
    }
    made["cells"][name] = cell
    if _tells_noise(name, recipe):
        made["noise"] = {
            one: noise_record(found.noise)
            for one, found in measured.items()
            if one in PRECISIONS and found.noise is not None
        }
    shutil.rmtree(folder / run.name)


def _tells_noise(name: str, recipe: Recipe) -> bool:
    return name == f"{PLAIN}/baseline/{recipe.seed}"


def _stages(recipe: Recipe, run: ArmRun, threads: int) -> list[Stage]:
    return [
        training_stage(recipe, run),
        ship.export(run.name, threads),
        *(ship.quantize(recipe, run.name, precision, threads) for precision in PRECISIONS[1:]),
    ]


def _kept(condensation: dict[str, Any]) -> dict[str, Any]:
    """Of a profile, the mean cosines by layer and their mean over layers."""
    layers = condensation["layers"]
    curves = {name: [round(one[name], 5) for one in layers] for name in COSINES}
    return {**curves, "mean_cosine": round(condensation["mean_cosine"]["value"], 5)}


def _scores(walked: list[Walked], run: ArmRun, precision: str, items: dict[str, Any]) -> dict[str, Any]:
    """Task -> what each item scored. Fills `items`, or checks that it was asked the same."""
    (folder,) = [step.record.folder for step in walked if step.name == f"{run.name}/measure-{precision}"]
    found: dict[str, Any] = {}
    for task, result in json.loads((folder / "items.json").read_text(encoding="utf-8")).items():
        fixed = {
            "definitions": result["definitions"],
            "metric": next(iter(result["score"]["metrics"])),
            "chance": result["score"]["chance"],
            "items_sha256": result["score"]["items_sha256"],
            "items": [
                {key: one[key] for key in ("id", "document", "tokens", "bytes")} for one in result["items"]
            ],
        }
        if items.setdefault(task, fixed) != fixed:
            sys.exit(f"{task}: asks other items than the cells before; other packages or other text?")
        found[task] = {
            key: [_rounded(one[key]) for one in result["items"]]
            for key in ANSWERS
            if key in result["items"][0]
        }
    return found


def _rounded(value: float) -> float | int:
    """Six digits after the point: far below what arithmetic moves."""
    return value if isinstance(value, int) else round(value, 6) if math.isfinite(value) else value


def save(made: dict[str, Any], path: Path = CELLS) -> None:
    path.parent.mkdir(exist_ok=True)
    write_json(path, made)
