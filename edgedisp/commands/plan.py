"""`edgedisp plan`: what a build would do: stages, steps, time, peak memory, disk, detectable differences.

The time of a training step comes from a probe: the base is opened and a few real steps are taken on random
tokens. A scored token costs one forward pass. Sizes of bundles are estimated to 2 % from the base's
configuration. `check_before_start` finds what would stop a build late.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from edgedisp.bench.system import multiplies_bf16, physical_cores
from edgedisp.core.distributed import split
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, Screen, clock
from edgedisp.core.results import PUBLISHED_POINTS
from edgedisp.pipeline.build_plan import as_computed, bundle_rounding, stages
from edgedisp.pipeline.build_plan import base as base_stage
from edgedisp.pipeline.stage import state
from edgedisp.recipe import BITS, Recipe, load_target
from edgedisp.report.formatting import fixed, plural
from edgedisp.report.layout import Grid, grid_text

TRAINING_BYTES_PER_WEIGHT = 16  # float32 weight, gradient and the two moments of AdamW
CHECKPOINT_BYTES_PER_WEIGHT = 12


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
                f"targets: {name} ships {precision}, which is not among precisions "
                f"({', '.join(recipe.precisions)}); what ships must have been measured: "
                "add the precision, or drop the target"
            )
    path = recipe.evaluate.tasks_path
    folder = None if path is None else (recipe.folder / path).resolve()
    check_tasks(recipe.evaluate.tasks, folder)


def slow_products(recipe: Recipe) -> str | None:
    """A warning where the recipe asks for bfloat16 products that this machine has no instructions for."""
    if recipe.train.precision != "bf16" or multiplies_bf16():
        return None
    return (
        "train.precision is bf16, but nothing here multiplies bfloat16 (AVX512-BF16, AMX, a recent GPU); "
        "a step takes 20 times as long as in fp32: --set train.precision=auto takes what is fast here"
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
    """The plan as JSON values: recipe, run, steps, tokens, threads, warning, stages [{name, done, seconds}],
    detectable, sizes or sizes_unknown, and with `probe` estimate (None where nothing is left to do)."""
    from edgedisp.evaluate import comparison

    check_before_start(recipe)
    threads, limit = threads_for(recipe), recipe.evaluate.limit
    points = 100 * comparison.detectable_accuracy(limit)
    passed = state(stages(recipe, threads), run)
    plan: dict[str, Any] = {
        "recipe": recipe.name,
        "run": str(run),
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.tokens_per_step,
        "threads": threads,
        "warning": slow_products(recipe),
        "stages": [
            {"name": stage.name, "done": record is not None, "seconds": record and record.seconds}
            for stage, record in passed
        ],
        "estimate": None,
        "detectable": {
            "items": limit,
            "seeds": recipe.seeds,
            "differing": comparison.DIFFERING,
            "points": points,
            "nats": {name: comparison.detectable_loss(limit, name) for name in recipe.precisions},
            "published_points": PUBLISHED_POINTS,
            "items_for_published": math.ceil(limit * (points / PUBLISHED_POINTS) ** 2),
        },
        "sizes": None,
        "sizes_unknown": None,
    }
    probe = probe and any(record is None for _, record in passed)
    base = run / "base" if passed[0][1] is not None else None
    try:
        plan["sizes"] = _sizes(recipe, base, probe, screen.progress)
    except (BadInput, BuildFailed) as error:
        if probe:
            raise
        plan["sizes_unknown"] = str(error)
    if probe:
        plan["estimate"] = _estimate(recipe, plan, screen.progress)
    return plan


def _sizes(recipe: Recipe, base: Path | None, download: bool, progress: Progress) -> dict[str, Any]:
    """`size_account` of the recipe's bundles. Raises BadInput where the base is not at hand."""
    from edgedisp import data, models
    from edgedisp.pipeline.prepare import open_base
    from edgedisp.pipeline.size_estimate import size_account

    roundings: dict[str, Any] = {
        name: bundle_rounding(recipe, name) for name in recipe.precisions if name in BITS
    }
    if base is not None:
        model = models.empty_model(base)
    else:
        sources = [source.source for source in recipe.data.train] if recipe.is_smoke else [recipe.model.base]
        if missing := [source for source in sources if data.needs_download(source) and not download]:
            raise BadInput(f"{missing[0]} is not downloaded yet")
        stage = base_stage(recipe)
        model, *_ = open_base(stage.options, stage.files, progress, weights=False)
    return size_account(model, roundings, {name: load_target(name).context for name in recipe.targets})


def _estimate(recipe: Recipe, plan: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Fill in the seconds of the stages that are to do; time, memory and disk of the whole build."""
    probed = probe_base(recipe, progress)
    step_s = float(probed["micro_step_s"] * recipe.train.accumulate + probed["optimizer_s"])
    remaining = [stage for stage in plan["stages"] if not stage["done"]]
    for stage in remaining:
        stage["seconds"] = _stage_seconds(stage["name"], recipe, probed, step_s)
    parameters, trainable = probed["parameters"], probed["trainable"]
    folder = Path(plan["run"]).resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    training_bytes = 4 * parameters + trainable * (TRAINING_BYTES_PER_WEIGHT - 4)
    return {
        "step_s": step_s,
        "seconds_left": sum(stage["seconds"] for stage in remaining),
        "parameters": parameters,
        "peak_memory_bytes": training_bytes + probed["process_bytes"] + probed["activation_bytes"],
        "memory_bytes": probed["memory_bytes"],
        "disk_bytes": disk_bytes(parameters, recipe, plan["sizes"]),
        "disk_free_bytes": shutil.disk_usage(existing).free,
    }


def disk_bytes(parameters: int, recipe: Recipe, sizes: dict[str, Any]) -> int:
    """Bytes of a finished run and its one checkpoint at a time, without tokenizers and reports.

    Every training leaves its model and its bundles (fp32 in any case), the first of each arm also a bundle
    for every target. sizes: of `size_account`.
    """
    bundle_bytes = {name: bundle["size_bytes"] for name, bundle in sizes["precisions"].items()}
    bundles = sum(bundle_bytes[name] for name in {"fp32", *recipe.precisions})
    packages = sum(bundle_bytes[load_target(name).precision] for name in recipe.targets)
    trained = len(recipe.arm_runs) * (4 * parameters + bundles) + len(recipe.arms) * packages
    return (4 + CHECKPOINT_BYTES_PER_WEIGHT) * parameters + trained


def probe_base(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Open the base and time a few training steps: parameters, trainable, memory_bytes, and `time_steps`'."""
    import psutil

    from edgedisp.dispersion.hooks import decoder_layers
    from edgedisp.models import count_parameters
    from edgedisp.pipeline.prepare import open_base
    from edgedisp.train.lora import adapter_size
    from edgedisp.train.performance import time_steps

    stage, adapter = base_stage(recipe), recipe.train.adapter
    base, *_ = open_base(stage.options, stage.files, progress)
    parameters = count_parameters(base)["total"]
    trainable = parameters
    if adapter is not None:
        trainable = adapter_size(decoder_layers(base), adapter.rank, adapter.targets)
    return {
        "parameters": parameters,
        "trainable": trainable,
        "memory_bytes": psutil.virtual_memory().total,
        **time_steps(base, as_computed(recipe.train), recipe.data.context, recipe.seed, progress),
    }


def _stage_seconds(name: str, recipe: Recipe, probed: dict[str, Any], step_s: float) -> float:
    """Rough seconds of a stage. The constants were measured on SmolLM2-135M with 2 cores."""
    kind = name.rsplit("/", 1)[-1]
    size, forward_s = probed["parameters"] / 135e6, probed["forward_s_per_token"]
    evaluate, latency, adapter = recipe.evaluate, recipe.latency, recipe.train.adapter
    if kind == "model" and adapter is not None:  # the merge audit: a held-out loss for each way to merge
        return float((6 if adapter.kind == "lora" else 8) * 4096 * forward_s + 5 * size)
    if kind in ("adapter", "model"):
        return float(recipe.steps * step_s + 5 * size)
    if kind.startswith("measure"):
        heldout = evaluate.perplexity_tokens or evaluate.limit * recipe.data.context
        tokens = min(heldout, 50_000) + evaluate.limit * (96 + 4 * 90) + 16 * recipe.data.context
        tokens += 2 * recipe.verify.tokens + 3 * evaluate.divergence_tokens
        return float(tokens * forward_s + 5 + 3 * size)
    if kind == "latency":
        per_bundle = (latency.repetitions + 1) * (latency.prompt + 8 * latency.generate) * forward_s
        return float(len(recipe.arms) * len(recipe.precisions) * per_bundle)
    seconds = {"base": 10.0, "corpus": 10.0, "fp32": 8.0}.get(kind, 5.0) * max(size, 0.1)
    if kind in BITS and getattr(recipe.quantize, kind).method == "gptq":  # passes up to each weight, rounding
        seconds += getattr(recipe.quantize, kind).calibration_tokens * 7 * forward_s + 45 * size
    if kind == "int4" and recipe.quantize.searched:
        # Two passes over 512 tokens for each of about 120 weights; whole models rounded and measured.
        trials = 2 if recipe.quantize.budget is not None else 8
        seconds += (240 * 512 + trials * 4096) * forward_s + (60 + 20 * trials) * size
    return float(seconds)


# As text


def render(plan: dict[str, Any], width: int = 100) -> str:
    """The plan for a terminal of `width` columns."""
    head = [
        f"{plan['recipe']} -> {plan['run']}",
        f"{plan['steps']} optimizer steps an arm, {plan['tokens']:,} tokens, {plan['threads']} threads",
    ]
    if plan["warning"]:
        head.append(f"warning: {plan['warning']}")
    rows = []
    for stage in plan["stages"]:
        mark, about = ("done", "") if stage["done"] else ("to do", "about ")
        took = "" if stage["seconds"] is None else about + clock(stage["seconds"])
        rows.append(f"  {mark:6} {stage['name']:28} {took}".rstrip())
    sizes = f"sizes: not known: {plan['sizes_unknown']}"
    if plan["sizes"] is not None:
        sizes = _sizes_text(plan["sizes"], width)
    blocks = ["\n".join(head), "\n".join(rows), sizes, _detectable_text(plan["detectable"])]
    if (estimate := plan["estimate"]) is not None:
        gb = {name: f"{estimate[name] / 1e9:.1f} GB" for name in estimate if name.endswith("bytes")}
        lines = [
            f"left: about {clock(estimate['seconds_left'])} ({estimate['step_s']:.2f} s a step, probed)",
            f"memory: about {gb['peak_memory_bytes']} at the peak, {gb['memory_bytes']} there",
            f"disk: about {gb['disk_bytes']}, {gb['disk_free_bytes']} free",
        ]
        if estimate["peak_memory_bytes"] > estimate["memory_bytes"]:
            lines.append(
                "does not fit in memory: a smaller train.batch, train.gradient_checkpointing, or an adapter"
            )
        if estimate["disk_bytes"] > estimate["disk_free_bytes"]:
            lines.append("does not fit on the disk: choose another --out")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _sizes_text(sizes: dict[str, Any], width: int) -> str:
    """Megabytes: a row for each component, a column for each precision; then the KV cache."""
    precisions = sizes["precisions"]
    files = [bundle["size_bytes"] for bundle in precisions.values()]
    weights = [sum(bundle["components"].values()) for bundle in precisions.values()]
    table = {
        name: [bundle["components"].get(name, 0) for bundle in precisions.values()]
        for name in precisions["fp32"]["components"]
    }
    if sizes["tied"]:
        table["embedding = head"] = table.pop("embedding")
    table |= {"graph": [file - weight for file, weight in zip(files, weights)], "file": files}
    decimals = 1 if min(files) > 1e7 else 3
    rows = [(name, *(fixed(value / 1e6, decimals) for value in values)) for name, values in table.items()]
    caches = [
        f"KV cache of {cache['positions']:,} positions ({target}): "
        f"{fixed(cache['size_bytes'] / 1e6, decimals)} MB"
        for target, cache in sizes["kv_cache"].items()
    ]
    return "\n".join([grid_text(Grid(("weights, MB (2 %)", *precisions), tuple(rows)), width), *caches])


def _detectable_text(detectable: dict[str, Any]) -> str:
    nats = ", ".join(f"{size:.2g} at {name}" for name, size in detectable["nats"].items())
    lines = [
        f"what this can see: with {detectable['items']:,} items a task shows differences of "
        f"{detectable['points']:.1f} points or more, 4 times out of 5;",
        f"  the smallest published gain, {detectable['published_points']} points, takes "
        f"{detectable['items_for_published']:,} items over all tasks (evaluate.limit)",
        f"  ({plural(detectable['seeds'], 'seed')}; assumed: the arms answer "
        f"{100 * detectable['differing']:.0f} % of the items differently)",
        f"  held-out loss shows {nats} in nats per token, with {detectable['items']:,} documents",
    ]
    if detectable["seeds"] == 1:
        lines.append("  one seed cannot tell a gain from the luck of training: seeds: 3 can")
    return "\n".join(lines)
