"""What a build would do, before it does it: stages, steps, time, peak memory, disk.

The time of a training step comes from a short probe: the base model is opened and a few real steps are
taken on random tokens. The rest is estimated from it: a scored token costs one forward pass. Memory comes
from the number of parameters. What every bundle weighs is told to the byte, from the base's configuration
(`stages/accounting.py`), and the disk follows from that. `check_before_start` refuses what cannot fit.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from edgedisp import BadInput, BuildFailed
from edgedisp.bench.machine import physical_cores
from edgedisp.pipeline import Observer, state
from edgedisp.pipeline.training import BITS_STAGE, searched_before
from edgedisp.processes import split
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
    if kind == BITS_STAGE:
        return _search_seconds(recipe, size, forward_s) + 10 * size
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
        seconds += options.calibration_tokens * (7 if options.correction else 3) * forward_s + 45 * size
    if options.rescale:  # three passes, and the search for each scale
        seconds += options.calibration_tokens * 3 * forward_s + 60 * size
    if precision == "int4" and recipe.quantize.searched and not searched_before(recipe):
        seconds += _search_seconds(recipe, size, forward_s)
    if options.accuracy_level == "auto":  # a session of 128 tokens for each node, ten of 1,024 for all
        seconds += (120 * 128 + 10 * 1024) * forward_s + 60 * size
    return seconds


def _search_seconds(recipe: Recipe, size: float, forward_s: float) -> float:
    """Two passes over 512 tokens for each of about 120 weights; whole models rounded and measured."""
    trials = 2 if recipe.quantize.budget is not None else 8
    return (240 * 512 + trials * 4096) * forward_s + (60 + 20 * trials) * size


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
    lines += ["", *_size_lines(planned)]
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


# What `size_account` calls a component, in the order of the table, and how it is called there.
COMPONENTS = {
    "embedding": "embedding",
    "attention": "attention",
    "mlp": "mlp",
    "head": "head",
    "norm": "norms",
    "positions": "positions",
    "other": "other",
}


def _size_lines(planned: dict[str, Any]) -> list[str]:
    """A table of megabytes: a row for each component, a column for each precision; then the KV cache."""
    sizes = planned["sizes"]
    if sizes is None:
        return [f"sizes: not known: {planned['sizes_unknown']}"]
    precisions = sizes["precisions"]
    told = "" if sizes["exact"] else " (about; the genai builder writes this graph)"

    decimals = 1 if min(one["size_bytes"] for one in precisions.values()) > 1e7 else 3

    def row(name: str, found: list[int]) -> str:
        return f"  {name:22}" + "".join(f"{size / 1e6:9.{decimals}f}" for size in found)

    lines = [f"{'weights, MB' + told:24}" + "".join(f"{name:>9}" for name in precisions)]
    for component, name in COMPONENTS.items():
        found = [one["components"].get(component, 0) for one in precisions.values()]
        named = "embedding = head" if component == "embedding" and sizes["tied"] else name
        if max(found) >= 0.5 * 10 ** (6 - decimals):  # what does not show as zero
            lines.append(row(named, found))
    rest = [one["size_bytes"] - sum(one["components"].values()) for one in precisions.values()]
    lines.append(row("graph, padding", rest))
    lines.append(row("file", [one["size_bytes"] for one in precisions.values()]))
    for target, cache in sizes["kv_cache"].items():
        size = f"{cache['size_bytes'] / 1e6:.{decimals}f} MB"
        lines.append(f"KV cache of {cache['positions']:,} positions ({target}): {size}")
    return lines
