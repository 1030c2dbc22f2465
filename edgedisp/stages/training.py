"""An arm's training, and what it did to the geometry of the token vectors."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedisp import BuildFailed, Progress, model
from edgedisp.dispersion.collect import Dispersion, decoder_layers
from edgedisp.dispersion.geometry import condensation as measure_condensation
from edgedisp.folder import write_json
from edgedisp.recipe import Train
from edgedisp.stages.start import weights_digest
from edgedisp.train import adapter
from edgedisp.train.trainer import TrainSettings, fit

CONDENSATION_SEQUENCES = 16  # held-out blocks; a few seconds for 135M parameters


def midtrain(
    train: Train,
    steps: int,
    seed: int,
    arm: str,
    base_folder: Path,
    corpus_folder: Path,
    own: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train one arm and leave a Hugging Face folder; `baseline` is the same without the dispersion term."""
    packed = np.load(corpus_folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    trained = _model_to_train(train, base_folder, seed)
    penalty = _penalty(train, seed) if arm == "dispersed" else None
    settings = train_settings(train, steps, seed)
    checkpoints = own / "checkpoints"
    done = fit(trained, packed, settings, checkpoints=checkpoints, penalty=penalty, progress=progress)
    tokenizer = model.load_tokenizer(base_folder)
    if train.adapter is not None:
        trained = _merged(trained, base_folder, own)
    model.save(trained, tokenizer, own)
    shutil.rmtree(checkpoints)
    return {
        "steps": steps,
        "tokens": done.tokens,
        "seconds": done.seconds,
        "resumed_from": done.resumed_from,
        "tokens_per_s": done.tokens_per_s,
        "peak_memory_bytes": done.peak_memory_bytes,
        "settings": {**asdict(settings), "threads": torch.get_num_threads()},
        "merged_into": "the full-precision base" if train.adapter is not None else None,
        "log": done.log,
        "weights_sha256": weights_digest(own),
    }


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
        seed=seed,
    )


def _model_to_train(train: Train, base_folder: Path, seed: int) -> Any:
    chosen = train.adapter
    quantized_as = None if chosen is None else chosen.base  # set for qlora alone
    opened = adapter.load_quantized(base_folder, quantized_as) if quantized_as else model.load(base_folder)
    if chosen is not None:
        settings = adapter.AdapterSettings(
            chosen.kind, chosen.rank, chosen.alpha, chosen.dropout, chosen.targets
        )
        opened = adapter.attach(opened, decoder_layers(opened), settings, seed)
    return opened


def _penalty(train: Train, seed: int) -> Dispersion:
    chosen = train.dispersion
    if chosen is None:
        raise BuildFailed("the arm `dispersed` was asked for without train.dispersion")
    return Dispersion(
        variant=chosen.variant,
        weight=chosen.weight,
        layers=chosen.layers,
        temperature=chosen.temperature,
        tokens=None if chosen.tokens == "all" else chosen.tokens,
        clamp=chosen.clamp,
        exclude_sink=chosen.exclude_sink,
        seed=seed if chosen.seed is None else chosen.seed,
    )


def _merged(trained: Any, base_folder: Path, own: Path) -> Any:
    folder = own / "adapter"
    trained.save_pretrained(folder)
    return adapter.merge(folder, model.load(base_folder))


def condensation(model_folder: Path, corpus_folder: Path, own: Path, progress: Progress) -> dict[str, Any]:
    """Pairwise cosines and effective rank by layer over held-out blocks."""
    held = np.load(corpus_folder / "heldout.npy", allow_pickle=False)[:CONDENSATION_SEQUENCES]
    measured = measure_condensation(
        model.load(model_folder), torch.from_numpy(held.astype(np.int64)), progress
    )
    write_json(own / "condensation.json", measured)
    return measured
