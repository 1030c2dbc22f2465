"""An arm's training."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedisp import models
from edgedisp.core.distributed import place, split
from edgedisp.core.progress import Progress
from edgedisp.dispersion.condensation import quick_condensation
from edgedisp.dispersion.config import DispersionConfig
from edgedisp.recipe import BITS, ArmRun, Dispersion, QuantizeBits, Train
from edgedisp.stages import adapters
from edgedisp.stages.rounding import Trained, aware
from edgedisp.stages.start import PACKING, weights_digest
from edgedisp.train.distributed import Sharding, Share, leave
from edgedisp.train.reporting import Reporting, check_reporters
from edgedisp.train.techniques import callbacks_for
from edgedisp.train.trainer import TrainSettings, fit
from edgedisp.train.transformers_trainer import TrainerCallback
from edgedisp.train.watch import Watch

WATCHES = 10  # looks at the condensation in a run
WATCHED_SEQUENCES, WATCHED_TOKENS = 2, 128  # a quarter of a step's forward pass at the usual batch of 4 x 256


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
    settings = train_settings(train, steps, seed)
    checkpoints = own / "checkpoints"
    name = f"{own.parent.parent.name}/{own.parent.name}"
    callbacks: list[TrainerCallback] = list(callbacks_for(arm.techniques, seed))
    if (asked := train.quantization_aware) is not None and rounded is not None:
        callbacks.append(aware(asked, Trained(rounded, BITS[asked.precision]), tokens, own, progress))
    done = fit(
        trained,
        packed,
        settings,
        checkpoints=checkpoints,
        dispersion=None if arm.dispersion is None else dispersion_config(arm.dispersion, seed),
        callbacks=callbacks,
        end_of_text=packing["end_of_text"] if packing["isolate_documents"] else None,
        watch=_watch(train.watch_every, steps, corpus_folder),
        reporting=Reporting(train.report_to, own / "logs", name) if train.report_to else None,
        share=_share(train),
        progress=progress,
    )
    if not place().leads:
        return {}
    if done.weights is not None:  # what was trained is in parts; the whole goes into a model as it came
        trained = adapters.model_to_train(train.adapter, base_folder, seed)
        trained.load_state_dict(done.weights)
    if train.adapter is not None:
        adapters.keep_adapter(trained, train.adapter, base_folder, own)
    else:
        models.save(trained, models.load_tokenizer(base_folder), own)
        models.copy_licence(base_folder, own)
    shutil.rmtree(checkpoints)
    return {
        "steps": steps,
        "tokens": done.tokens,
        "seconds": done.seconds,
        "resumed_from": done.resumed_from,
        "tokens_per_s": done.tokens_per_s,
        "peak_memory_bytes": done.peak_memory_bytes,
        "processes": place().count,
        "settings": {**asdict(settings), "threads": torch.get_num_threads()},
        "log": done.log,
        "watched": done.watched,
        "watch_seconds": done.watch_seconds,
        "skipped_sequences": done.skipped_sequences,
        "fused_head": done.fused_head,
        "weights_sha256": weights_digest(own),
    }


def _share(train: Train) -> Share:
    """What this process takes of a step, and how the weights are held where there are others."""
    count = place().count
    chosen = train.distributed
    sharding = None
    if chosen is not None:
        wrap = None if chosen.wrap == "auto" else chosen.wrap
        sharding = Sharding(chosen.fsdp == "full_shard", wrap, chosen.cpu_offload)
    return Share(count, *split(train.batch, train.accumulate, count), sharding)


def train_settings(train: Train, steps: int, seed: int) -> TrainSettings:
    return TrainSettings(
        steps=steps,
        lr=train.lr,
        batch=train.batch,
        accumulate=train.accumulate,
        warmup=train.warmup,
        schedule=train.schedule,
        weight_decay=train.weight_decay,
        betas=(train.betas[0], train.betas[1]),
        clip=train.clip,
        precision=train.precision,
        gradient_checkpointing=train.gradient_checkpointing,
        checkpoint_every=train.checkpoint_every,
        compile=train.compile,
        seed=seed,
    )


def dispersion_config(chosen: Dispersion, seed: int) -> DispersionConfig:
    """The dispersion section of a recipe as the dispersion room's own argument."""
    return DispersionConfig(
        variant=chosen.variant,
        weight=chosen.weight,
        layers=chosen.layers,
        temperature=chosen.temperature,
        tokens=None if chosen.tokens == "all" else chosen.tokens,
        clamp=chosen.clamp,
        exclude_sink=chosen.exclude_sink,
        seed=seed if chosen.seed is None else chosen.seed,
    )


def _in_order(packed: np.ndarray, arm: ArmRun) -> np.ndarray:
    """The blocks as a replica reads them: the first in the order of the file, others in their seed's own."""
    return packed[np.random.default_rng(arm.seed).permutation(len(packed))] if arm.replica else packed


def _watch(every: int | None, steps: int, corpus_folder: Path) -> Watch | None:
    """Looks at the first tokens of the first held-out blocks; None where the recipe turns it off."""
    if every == 0:
        return None
    held = np.load(corpus_folder / "heldout.npy", mmap_mode="r", allow_pickle=False)
    blocks = torch.from_numpy(held[:WATCHED_SEQUENCES, :WATCHED_TOKENS].astype(np.int64))
    return Watch(partial(quick_condensation, blocks=blocks), every or math.ceil(steps / WATCHES))


def leave_processes() -> None:
    """After the last training: part from the other processes of a launch."""
    leave()
