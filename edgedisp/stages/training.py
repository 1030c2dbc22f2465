"""An arm's training."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
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
from edgedisp.recipe import BITS, ArmRun, Dispersion, QuantizeBits, Train
from edgedisp.stages import adapters
from edgedisp.stages.rounding import Trained, aware
from edgedisp.stages.start import PACKING, weights_digest
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


def midtrain(
    train: Train,
    steps: int,
    seed: int,
    arm: ArmRun,
    rounded: QuantizeBits | None,
    base_folder: Path,
    corpus_folder: Path,
    own: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train one arm and leave a Hugging Face folder; the arms differ in what `arm` adds, and in nothing else.

    `rounded`: how the bundle that `train.quantization_aware` names is rounded; None without that key.
    An adapter is left as a plain PEFT folder; `merge_adapter` makes a model of it. Logs for others
    (`train.report_to`) are left in `logs`. Of several processes each takes its share; the first writes.
    """
    check_reporters(train.report_to)
    tokens = np.load(corpus_folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    packed = _in_order(tokens, arm)
    packing = json.loads((corpus_folder / PACKING).read_text(encoding="utf-8"))
    trained = adapters.model_to_train(train.adapter, base_folder, seed)
    callbacks: list[TrainerCallback] = list(callbacks_for(arm.techniques, seed))
    if (section := train.quantization_aware) is not None and rounded is not None:
        callbacks.append(aware(section, Trained(rounded, BITS[section.precision]), tokens, own, progress))
    options = FitOptions(
        steps=steps,
        seed=seed,
        output_dir=own / "checkpoints",
        dispersion=None if arm.dispersion is None else dispersion_config(arm.dispersion, seed),
        callbacks=callbacks,
        end_of_text=packing["end_of_text"] if packing["isolate_documents"] else None,
        watch=_watch(train.watch_every, steps, corpus_folder),
        log_dir=own / "logs" if train.report_to else None,
        run_name=f"{own.parent.parent.name}/{own.parent.name}",
    )
    result = fit(trained, packed, train, options, progress)
    if not place().leads:
        return {}
    if result.weights is not None:  # what was trained is in parts; the whole goes into a model as it came
        trained = adapters.model_to_train(train.adapter, base_folder, seed)
        trained.load_state_dict(result.weights)
    if train.adapter is not None:
        adapters.keep_adapter(trained, train.adapter, base_folder, own)
    else:
        models.save(trained, models.load_tokenizer(base_folder), own)
        models.copy_licence(base_folder, own)
    shutil.rmtree(options.output_dir)
    return {**_record(train, options, result), "weights_sha256": weights_digest(own)}


def _record(train: Train, options: FitOptions, result: FitResult) -> dict[str, Any]:
    settings = train.model_dump(include=set(SETTINGS))
    return {
        "steps": options.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "resumed_from": result.resumed_from,
        "tokens_per_s": result.tokens_per_s,
        "peak_memory_bytes": result.peak_memory_bytes,
        "processes": place().count,
        "settings": {
            "steps": options.steps,
            **settings,
            "seed": options.seed,
            "threads": torch.get_num_threads(),
        },
        "log": result.log,
        "watched": result.watched,
        "watch_seconds": result.watch_seconds,
        "skipped_sequences": result.skipped_sequences,
        "chunked_cross_entropy": result.chunked_cross_entropy,
    }


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


def _watch(every: int | None, steps: int, corpus_folder: Path) -> CondensationWatch | None:
    """Of the first tokens of the first held-out blocks; None where the recipe turns it off."""
    if every == 0:
        return None
    held = np.load(corpus_folder / "heldout.npy", mmap_mode="r", allow_pickle=False)
    blocks = torch.from_numpy(held[:WATCHED_SEQUENCES, :WATCHED_TOKENS].astype(np.int64))
    return CondensationWatch(partial(quick_condensation, blocks=blocks), every or math.ceil(steps / WATCHES))
