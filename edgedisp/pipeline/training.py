"""The stage that trains one arm."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedisp.bench.system import runner
from edgedisp.core.distributed import is_main_process
from edgedisp.core.files import to_json
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import CHECKPOINTS
from edgedisp.dispersion.losses import DispersionConfig
from edgedisp.pipeline import adapters
from edgedisp.pipeline.options import TrainOptions
from edgedisp.pipeline.prepare import PACKING, heldout_blocks, training_text, weights_digest
from edgedisp.pipeline.rounding import aware_callback
from edgedisp.pipeline.stage import Inputs
from edgedisp.recipe import Dispersion
from edgedisp.train.callbacks import TECHNIQUES
from edgedisp.train.trainer import FitOptions, fit

WATCHES = 10  # measurements of the condensation in a run
WATCHED_SEQUENCES, WATCHED_TOKENS = 2, 128  # a quarter of a step's forward pass at the usual batch of 4 x 256
SETTINGS = (
    "lr", "batch", "accumulate", "warmup", "schedule", "weight_decay", "betas", "clip", "precision",
    "gradient_checkpointing", "checkpoint_every", "compile",
)  # fmt: skip
"""Keys of `train` that the record repeats."""


def train(options: TrainOptions, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Train one arm and leave a Hugging Face folder; arms differ in what `options.arm` adds alone.

    An adapter is left as a plain PEFT folder; `adapters.merge` makes a model of it. Logs for others
    (`train.report_to`) are left in `logs`. Of several processes each takes its share; the first writes.
    """
    arm, section, base, corpus = options.arm, options.train, inputs["base"], inputs["corpus"]
    text, packing = training_text(corpus), json.loads((corpus / PACKING).read_text(encoding="utf-8"))
    model = adapters.model_to_train(section.adapter, base, arm.seed)
    callbacks = [TECHNIQUES[name](value, arm.seed) for name, value in arm.techniques.items()]
    if (aware := section.quantization_aware) is not None and options.rounding is not None:
        start = aware.begins(options.rounding.section.method)
        callbacks.append(aware_callback(options.rounding, start, text, output_dir, progress))
    watched = torch.from_numpy(heldout_blocks(corpus, blocks=WATCHED_SEQUENCES)[:, :WATCHED_TOKENS])
    tokens, marks = text.tokens, text.marks
    steps = options.steps or len(tokens) // (section.batch * section.accumulate)
    if arm.replica:  # the first seed reads the blocks in the order of the file
        order = np.random.default_rng(arm.seed).permutation(len(tokens))
        tokens, marks = tokens[order], None if marks is None else marks[order]
    fit_options = FitOptions(
        steps=steps,
        seed=arm.seed,
        output_dir=output_dir / CHECKPOINTS,
        dispersion=None if arm.dispersion is None else dispersion_config(arm.dispersion, arm.seed),
        callbacks=callbacks,
        end_of_text=packing["end_of_text"] if packing["isolate_documents"] else None,
        marks=marks,
        disperse_answers=arm.dispersion is not None and arm.dispersion.on == "answers",
        watch_blocks=None if section.watch_every == 0 else watched,
        watch_every=section.watch_every or math.ceil(steps / WATCHES),
        log_dir=output_dir / "logs" if section.report_to else None,
        run_name=f"{output_dir.parent.parent.name}/{output_dir.parent.name}",
    )
    result, weights = fit(model, tokens, section, fit_options, progress)
    result = replace(result, peak_memory_bytes=runner().peak_memory_bytes())
    if not is_main_process():
        return {}
    if weights is not None:  # FSDP trained parts of the model; the whole goes into a fresh one
        model = adapters.model_to_train(section.adapter, base, arm.seed)
        model.load_state_dict(weights)
    if section.adapter is not None:
        adapters.save_adapter(model, base, output_dir)
    else:
        adapters.save_model(model, inputs, output_dir)
    settings = {"steps": steps, **section.model_dump(include=set(SETTINGS)), "seed": arm.seed}
    settings["threads"] = torch.get_num_threads()
    result = replace(result, settings=settings, weights_sha256=weights_digest(output_dir))
    return dict(to_json(result))


def dispersion_config(section: Dispersion, seed: int) -> DispersionConfig:
    """A recipe's `dispersion`; its seed is the training's unless it has one."""
    values = section.model_dump(exclude={"on"})
    values["tokens"] = None if section.tokens == "all" else section.tokens
    values["seed"] = seed if section.seed is None else section.seed
    return DispersionConfig(**values)
