"""What a build would do, before it does it: stages, steps, time, peak memory, disk.

The time of a training step comes from a short probe: the base model is opened and a few real steps are
taken on random tokens. The rest is estimated from it: a scored token costs one forward pass. Memory comes
from the number of parameters. What every bundle weighs is told to 2 %, from the base's configuration
(`stages/accounting.py`), and the disk follows from that. `check_before_start` refuses what cannot fit.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from edgedisp.bench.system import multiplies_bf16, physical_cores
from edgedisp.core.distributed import split
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.results import PUBLISHED_POINTS
from edgedisp.pipeline import Observer, state
from edgedisp.recipe import BITS, Recipe, load_target

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
    from edgedisp.evaluate.task_suite import check_tasks

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


def slow_products(recipe: Recipe) -> str | None:
    """What to tell someone whose recipe asks for products that this machine has no instructions for."""
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


def disk_bytes(parameters: int, recipe: Recipe, sizes: dict[str, Any]) -> int:
    """What a finished run and its one checkpoint at a time take on disk.

    sizes: of `stages.size_account`. Every training leaves its model and its bundles (fp32 is made in any
    case), the first of each arm also a bundle for every target. Tokenizers and reports are left out.
    """

    by_precision = {name: found["size_bytes"] for name, found in sizes["precisions"].items()}
    bundles = sum(by_precision[name] for name in {"fp32", *recipe.precisions})
    packed = sum(by_precision[load_target(name).precision] for name in recipe.targets)
    trained = len(recipe.arm_runs) * (4 * parameters + bundles) + len(recipe.arms) * packed
    return (4 + CHECKPOINT_BYTES_PER_WEIGHT) * parameters + trained


def memory_bytes(parameters: int, trainable: int, others: int) -> int:
    """Peak resident memory of training: weights, gradients and moments of the trained ones, and the rest."""
    return parameters * 4 + trainable * (TRAINING_BYTES_PER_WEIGHT - 4) + others


def make_plan(recipe: Recipe, run: Path, *, probe: bool, observer: Observer) -> dict[str, Any]:
    """The plan of a build as a JSON-able dict; see plan_text.py for what it says."""
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
        "warning": slow_products(recipe),
        "stages": [
            {"name": stage.name, "done": record is not None, "seconds": record.seconds if record else None}
            for stage, record in walked
        ],
        "estimate": None,
    }
    planned["detectable"] = _detectable(recipe)
    probing = probe and any(not stage["done"] for stage in planned["stages"])
    base = run / "base" if walked[0][1] is not None else None
    planned["sizes"], planned["sizes_unknown"] = _sizes(recipe, base, probing, observer)
    if probing:
        planned["estimate"] = _estimate(recipe, planned, observer)
    return planned


def _sizes(
    recipe: Recipe, base: Path | None, probing: bool, observer: Observer
) -> tuple[dict[str, Any] | None, str | None]:
    """What `stages.size_account` tells of the recipe's bundles, or None and the reason.

    A probe needs the base anyway, so what is wrong with it is then an error.
    """
    from edgedisp.stages import base_skeleton, size_account

    quantized: dict[str, tuple[int, Any]] = {
        name: (BITS[name], getattr(recipe.quantize, name)) for name in recipe.precisions if name in BITS
    }
    positions = {name: load_target(name).context for name in recipe.targets}
    try:
        opened = base_skeleton(
            recipe.model, recipe.folder, base, recipe.is_smoke, observer.progress, download=probing
        )
        if opened is None:
            return None, f"{recipe.model.base} is not downloaded yet"
        return size_account(opened, quantized, positions), None
    except (BadInput, BuildFailed) as error:
        if probing:
            raise
        return None, str(error)


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
        "disk_bytes": disk_bytes(measured["parameters"], recipe, planned["sizes"]),
        "disk_free_bytes": free,
    }


def _detectable(recipe: Recipe) -> dict[str, Any]:
    """What tasks that count right answers can show, before anything is measured; see evaluate/power.py."""
    from edgedisp.evaluate import power

    return {
        "items": recipe.evaluate.limit,
        "seeds": recipe.seeds,
        "differing": power.DIFFERING,
        "points": 100 * power.of_items(recipe.evaluate.limit),
        "nats": {name: power.of_documents(recipe.evaluate.limit, name) for name in recipe.precisions},
        "published_points": PUBLISHED_POINTS,
        "items_for_published": power.items_for(PUBLISHED_POINTS / 100),
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
    if kind.startswith("noise"):  # three scorings, one of them known, the other with half the threads or more
        return 3 * min(evaluate.perplexity_tokens or evaluate.limit * recipe.data.context, 8192) * forward_s
    if kind.startswith("divergence"):
        return 3 * evaluate.divergence_tokens * forward_s + 3 * size
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
    if options.method == "gptq":  # passes up to each weight, corrected on two models; the rounding of columns
        seconds += options.calibration_tokens * 7 * forward_s + 45 * size
    if precision == "int4" and recipe.quantize.searched:
        seconds += _search_seconds(recipe, size, forward_s)
    return seconds


def _search_seconds(recipe: Recipe, size: float, forward_s: float) -> float:
    """Two passes over 512 tokens for each of about 120 weights; whole models rounded and measured."""
    trials = 2 if recipe.quantize.budget is not None else 8
    return (240 * 512 + trials * 4096) * forward_s + (60 + 20 * trials) * size
