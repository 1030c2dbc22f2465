"""An arm's training."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import TrainerCallback

from edgedisp import models
from edgedisp.core.distributed import place
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress
from edgedisp.dispersion.condensation import quick_condensation
from edgedisp.dispersion.config import DispersionConfig
from edgedisp.pipeline import adapters
from edgedisp.pipeline.options import TrainOptions
from edgedisp.pipeline.prepare import PACKING, weights_digest
from edgedisp.pipeline.rounding import Trained, aware
from edgedisp.recipe import BITS, ArmRun, Dispersion, Train
from edgedisp.train.arm_callbacks import callbacks_for
from edgedisp.train.dispersion_trainer import CondensationWatch
from edgedisp.train.trainer import FitOptions, FitResult, fit

WATCHES = 10  # measurements of the condensation in a run
WATCHED_SEQUENCES, WATCHED_TOKENS = 2, 128  # a quarter of a step's forward pass at the usual batch of 4 x 256
SETTINGS = (
    "lr", "batch", "accumulate", "warmup", "schedule", "weight_decay", "betas", "clip", "precision",
    "gradient_checkpointing", "checkpoint_every", "compile",
)  # fmt: skip
"""Keys of `train` that the record repeats."""


def train(
    options: TrainOptions, *, base: Path, corpus: Path, output_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Train one arm and leave a Hugging Face folder; arms differ in what `options.arm` adds alone.

    An adapter is left as a plain PEFT folder; `adapters.merge` makes a model of it. Logs for others
    (`train.report_to`) are left in `logs`. Of several processes each takes its share; the first writes.
    """
    section, arm, logging = options.train, options.arm, options.logging
    check_reporters(logging.report_to)
    tokens = np.load(corpus / "tokens.npy", mmap_mode="r", allow_pickle=False)
    packing = json.loads((corpus / PACKING).read_text(encoding="utf-8"))
    model = adapters.model_to_train(section.adapter, base, arm.seed)
    callbacks: list[TrainerCallback] = list(callbacks_for(arm.techniques, arm.seed))
    if (under := section.quantization_aware) is not None and options.rounding is not None:
        rounding = Trained(options.rounding, BITS[under.precision])
        callbacks.append(aware(under, rounding, tokens, output_dir, progress))
    fit_options = FitOptions(
        steps=options.steps,
        seed=arm.seed,
        output_dir=output_dir / "checkpoints",
        dispersion=None if arm.dispersion is None else dispersion_config(arm.dispersion, arm.seed),
        callbacks=callbacks,
        end_of_text=packing["end_of_text"] if packing["isolate_documents"] else None,
        watch=_watch(logging.watch_every, options.steps, corpus),
        log_dir=output_dir / "logs" if logging.report_to else None,
        run_name=f"{output_dir.parent.parent.name}/{output_dir.parent.name}",
    )
    logged = section.model_copy(
        update={"report_to": logging.report_to, "checkpoint_every": logging.checkpoint_every}
    )
    result = fit(model, _in_order(tokens, arm), logged, fit_options, progress)
    if not place().leads:
        return {}
    if result.weights is not None:  # what was trained is in parts; the whole goes into a model as it came
        model = adapters.model_to_train(section.adapter, base, arm.seed)
        model.load_state_dict(result.weights)
    if section.adapter is not None:
        adapters.save_adapter(model, section.adapter, base, output_dir)
    else:
        models.save(model, models.load_tokenizer(base), output_dir)
        models.copy_licence(base, output_dir)
    shutil.rmtree(fit_options.output_dir)
    return _results(options, logged, result) | {"weights_sha256": weights_digest(output_dir)}


def _results(options: TrainOptions, section: Train, result: FitResult) -> dict[str, Any]:
    settings = {
        "steps": options.steps,
        **section.model_dump(include=set(SETTINGS)),
        "seed": options.arm.seed,
        "threads": torch.get_num_threads(),
    }
    figures = {part.name: getattr(result, part.name) for part in fields(result) if part.name != "weights"}
    return {"steps": options.steps, **figures, "processes": place().count, "settings": settings}


def check_reporters(names: Sequence[str]) -> None:
    """Raise BadInput if a program that the log should go to is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise BadInput(
            f"train.report_to: {', '.join(missing)} is not installed; pip install {' '.join(missing)}, "
            "or take it out"
        )


def dispersion_config(section: Dispersion, seed: int) -> DispersionConfig:
    """A recipe's `dispersion`; its seed is the training's unless it has one."""
    values = section.model_dump()
    values["tokens"] = None if section.tokens == "all" else section.tokens
    values["seed"] = seed if section.seed is None else section.seed
    return DispersionConfig(**values)


def _in_order(packed: np.ndarray, arm: ArmRun) -> np.ndarray:
    """The blocks as a replica reads them: the first in the order of the file, others in their seed's own."""
    return packed[np.random.default_rng(arm.seed).permutation(len(packed))] if arm.replica else packed


def _watch(every: int | None, steps: int, corpus: Path) -> CondensationWatch | None:
    """Of the first tokens of the first held-out blocks; None where the recipe turns it off."""
    if every == 0:
        return None
    held = np.load(corpus / "heldout.npy", mmap_mode="r", allow_pickle=False)
    blocks = torch.from_numpy(held[:WATCHED_SEQUENCES, :WATCHED_TOKENS].astype(np.int64))
    return CondensationWatch(partial(quick_condensation, blocks=blocks), every or math.ceil(steps / WATCHES))
