"""What a build would do, before it does it: stages, steps, time, peak memory, disk.

The time of a training step comes from a short probe: the base model is opened and a few real steps are
taken on random tokens. The rest is estimated from it: a scored token costs one forward pass. Memory and
disk follow from the number of parameters. `check_before_start` refuses a build that cannot fit.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from edgedisp import BadInput
from edgedisp.bench.machine import physical_cores
from edgedisp.pipeline import Observer, state
from edgedisp.processes import split
from edgedisp.recipe import Recipe

# Bytes per parameter on disk. int8: a byte and a float32 scale per group of 32. int4: half of that, zero
# points, and the head at 8 bits. Measured on SmolLM2-135M: 1.13 and 0.74.
BYTES_PER_WEIGHT = {"fp32": 4.0, "int8": 1.14, "int4": 0.75}
# float32 weights, gradients and the two moments of AdamW.
TRAINING_BYTES_PER_WEIGHT = 16
CHECKPOINT_BYTES_PER_WEIGHT = 12


def threads_for(recipe: Recipe) -> int:
    """Threads for scoring and timing, written into the bundles: the recipe's, else the physical cores."""
    return recipe.latency.threads or physical_cores()


def check_before_start(recipe: Recipe, run: Path) -> None:
    """Find what would stop a build late: unknown tasks or targets, a folder or a package that is not there.

    Raises BadInput.
    """
    from edgedisp.bench.targets import load_target
    from edgedisp.evaluate.tasks import check_tasks

    for name in recipe.targets:
        target = load_target(name)
        if target.precision not in recipe.precisions:
            raise BadInput(
                f"targets: {name} ships {target.precision}, which is not among precisions "
                f"({', '.join(recipe.precisions)}); what ships must have been measured: "
                "add the precision, or drop the target"
            )
    missing = [name for name in recipe.train.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"train.report_to: {', '.join(missing)} is not installed: pip install {' '.join(missing)}, "
            "or leave it out"
        )
    path = recipe.evaluate.tasks_path
    folder = None if path is None else (recipe.folder / path).resolve()
    if folder is not None and not folder.is_dir():
        raise BadInput(f"evaluate.tasks_path: {folder} is no folder of lm-evaluation-harness tasks")
    check_tasks(recipe.evaluate.tasks, folder)


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


def disk_bytes(parameters: int, recipe: Recipe) -> int:
    """What a finished run and its one checkpoint at a time take on disk."""
    bundles = sum(BYTES_PER_WEIGHT[precision] for precision in {"fp32", *recipe.precisions})
    return int(parameters * (4 + len(recipe.arm_runs) * (4 + bundles) + CHECKPOINT_BYTES_PER_WEIGHT))


def memory_bytes(parameters: int, trainable: int, others: int) -> int:
    """Peak resident memory of training: weights, gradients and moments of the trained ones, and the rest."""
    return parameters * 4 + trainable * (TRAINING_BYTES_PER_WEIGHT - 4) + others


def make_plan(recipe: Recipe, run: Path, *, probe: bool, observer: Observer) -> dict[str, Any]:
    """The plan of a build as a JSON-able dict; see `render` for what it says."""
    check_before_start(recipe, run)
    threads = threads_for(recipe)
    walked = state(recipe, run, threads)
    steps = recipe.steps
    planned: dict[str, Any] = {
        "recipe": recipe.name,
        "run": str(run),
        "steps": steps,
        "tokens": steps * recipe.train.batch * recipe.train.accumulate * recipe.data.context,
        "threads": threads,
        "stages": [
            {"name": stage.name, "done": record is not None, "seconds": record.seconds if record else None}
            for stage, record in walked
        ],
        "estimate": None,
    }
    if probe and any(not stage["done"] for stage in planned["stages"]):
        planned["estimate"] = _estimate(recipe, planned, observer)
    return planned


def _estimate(recipe: Recipe, planned: dict[str, Any], observer: Observer) -> dict[str, Any]:
    from edgedisp.single import probe_base

    measured = probe_base(recipe, observer.progress)
    step_s = measured["micro_step_s"] * recipe.train.accumulate + measured["optimizer_s"]
    per_token = measured["forward_s_per_token"]
    for stage in planned["stages"]:
        if not stage["done"]:
            stage["seconds"] = _stage_seconds(
                stage["name"], recipe, measured["parameters"], step_s, per_token
            )
    left = sum(stage["seconds"] for stage in planned["stages"] if not stage["done"])
    free = shutil.disk_usage(_existing(Path(planned["run"]))).free
    return {
        "step_s": step_s,
        "seconds_left": left,
        "parameters": measured["parameters"],
        "peak_memory_bytes": memory_bytes(
            measured["parameters"],
            measured["trainable"],
            measured["process_bytes"] + measured["activation_bytes"],
        ),
        "memory_bytes": measured["memory_bytes"],
        "disk_bytes": disk_bytes(measured["parameters"], recipe),
        "disk_free_bytes": free,
    }


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.resolve().parent
    return path


def _stage_seconds(name: str, recipe: Recipe, parameters: int, step_s: float, forward_s: float) -> float:
    """Rough seconds of a stage. The constants were measured on SmolLM2-135M with 2 cores."""
    kind = name.rsplit("/", 1)[-1]
    size = parameters / 135e6
    evaluate, latency = recipe.evaluate, recipe.latency
    adapter = recipe.train.adapter
    if (
        kind == "model" and adapter is not None
    ):  # the merge audit: a held-out loss for each way to hold weights
        return (6 if adapter.kind == "lora" else 8) * 4096 * forward_s + 5 * size
    if kind in ("adapter", "model"):
        return recipe.steps * step_s + 5 * size
    if kind.startswith("accuracy"):
        perplexity = min(evaluate.perplexity_tokens or evaluate.limit * recipe.data.context, 50_000)
        return (perplexity + evaluate.limit * (96 + 4 * 90)) * forward_s
    if kind == "latency":
        per_run = (latency.prompt + 8 * latency.generate) * forward_s
        return len(recipe.arms) * len(recipe.precisions) * (latency.repetitions + 1) * per_run
    if kind.startswith("condensation"):
        return 16 * recipe.data.context * forward_s + 5
    if kind.startswith("verify"):
        return recipe.verify.tokens * 2 * forward_s + 5
    seconds = {"base": 10.0, "corpus": 10.0, "fp32": 8.0, "int8": 5.0, "int4": 5.0}.get(kind, 5.0)
    seconds *= max(size, 0.1)
    if kind in ("int8", "int4"):
        seconds += _choosing_seconds(kind, recipe, size, forward_s)
    return seconds


def _choosing_seconds(precision: str, recipe: Recipe, size: float, forward_s: float) -> float:
    """What a quantized bundle takes beside being written, where that depends on text."""
    options, seconds = getattr(recipe.quantize, precision), 0.0
    if options.method == "gptq":  # three passes, and the rounding of columns
        seconds += options.calibration_tokens * 3 * forward_s + 45 * size
    if precision == "int4" and recipe.quantize.searched:
        # Two passes over 512 tokens for each of about 120 weights; whole models rounded and measured.
        trials = 2 if recipe.quantize.budget is not None else 8
        seconds += (240 * 512 + trials * 4096) * forward_s + (60 + 20 * trials) * size
    if options.accuracy_level == "auto":  # a session of 128 tokens for each node, ten of 1,024 for all
        seconds += (120 * 128 + 10 * 1024) * forward_s + 60 * size
    return seconds


def render(planned: dict[str, Any]) -> str:
    """The plan as text for people."""
    from edgedisp.console import clock

    lines = [f"{planned['recipe']} -> {planned['run']}"]
    size = f"{planned['steps']} optimizer steps an arm, {planned['tokens']:,} tokens"
    lines.append(f"{size}, {planned['threads']} threads")
    lines.append("")
    for stage in planned["stages"]:
        mark, about = ("done", "") if stage["done"] else ("to do", "about ")
        took = "" if stage["seconds"] is None else about + clock(stage["seconds"])
        lines.append(f"  {mark:6} {stage['name']:28} {took}")
    found = planned["estimate"]
    if found is not None:
        lines += [
            "",
            f"left: about {clock(found['seconds_left'])} ({found['step_s']:.2f} s a step, probed)",
            f"memory: about {found['peak_memory_bytes'] / 1e9:.1f} GB at the peak, "
            f"{found['memory_bytes'] / 1e9:.1f} GB there",
            f"disk: about {found['disk_bytes'] / 1e9:.1f} GB, {found['disk_free_bytes'] / 1e9:.1f} GB free",
        ]
        if found["peak_memory_bytes"] > found["memory_bytes"]:
            lines.append(
                "does not fit in memory: a smaller train.batch, train.gradient_checkpointing, or an adapter"
            )
        if found["disk_bytes"] > found["disk_free_bytes"]:
            lines.append("does not fit on the disk: choose another --out")
    return "\n".join(lines)
