"""The training of an arm, and of a candidate of `edgedisp pilot`, which is measured and thrown away."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedisp import models
from edgedisp.bench.system import runner
from edgedisp.core.distributed import is_main_process
from edgedisp.core.errors import BadInput
from edgedisp.core.files import from_json, to_json, write_json
from edgedisp.core.progress import Progress
from edgedisp.core.results import LOSS_TASK
from edgedisp.dispersion.losses import DispersionConfig
from edgedisp.evaluate.comparison import Results, compare_task
from edgedisp.evaluate.loglikelihood import ScoreOptions
from edgedisp.evaluate.statistics import Resampling
from edgedisp.pipeline import adapters
from edgedisp.pipeline.measure import condensation
from edgedisp.pipeline.options import ITEMS, CandidateOptions, TrainOptions
from edgedisp.pipeline.prepare import (
    CONDENSATION_BLOCKS,
    PACKING,
    heldout_blocks,
    task_suite,
    weights_digest,
)
from edgedisp.pipeline.rounding import aware_callback
from edgedisp.pipeline.stage import Inputs
from edgedisp.recipe import Dispersion
from edgedisp.train.callbacks import callbacks_for
from edgedisp.train.dispersion_trainer import CondensationWatch, NotFinite
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
    tokens = np.load(corpus / "tokens.npy", mmap_mode="r", allow_pickle=False)
    packing = json.loads((corpus / PACKING).read_text(encoding="utf-8"))
    model = adapters.model_to_train(section.adapter, base, arm.seed)
    callbacks = callbacks_for(arm.techniques, arm.seed)
    if (aware := section.quantization_aware) is not None and options.rounding is not None:
        start = aware.begins(options.rounding.section.method)
        callbacks.append(aware_callback(options.rounding, start, tokens, output_dir, progress))
    fit_options = FitOptions(
        steps=options.steps,
        seed=arm.seed,
        output_dir=output_dir / "checkpoints",
        dispersion=None if arm.dispersion is None else dispersion_config(arm.dispersion, arm.seed),
        callbacks=callbacks,
        end_of_text=packing["end_of_text"] if packing["isolate_documents"] else None,
        watch=_watch(section.watch_every, options.steps, corpus),
        log_dir=output_dir / "logs" if section.report_to else None,
        run_name=f"{output_dir.parent.parent.name}/{output_dir.parent.name}",
    )
    if arm.replica:  # the first seed reads the blocks in the order of the file
        tokens = tokens[np.random.default_rng(arm.seed).permutation(len(tokens))]
    result, weights = fit(model, tokens, section, fit_options, progress)
    result = replace(result, peak_memory_bytes=runner().peak_memory_bytes())
    if not is_main_process():
        return {}
    if weights is not None:  # FSDP trained parts of the model; the whole goes into a fresh one
        model = adapters.model_to_train(section.adapter, base, arm.seed)
        model.load_state_dict(weights)
    if section.adapter is not None:
        adapters.save_adapter(model, section.adapter, base, output_dir)
    else:
        models.save(model, models.load_tokenizer(base), output_dir)
        models.copy_licence(base, output_dir)
    shutil.rmtree(fit_options.output_dir)
    settings = {"steps": options.steps, **section.model_dump(include=set(SETTINGS)), "seed": arm.seed}
    settings["threads"] = torch.get_num_threads()
    result = replace(result, settings=settings, weights_sha256=weights_digest(output_dir))
    return dict(to_json(result))


def dispersion_config(section: Dispersion, seed: int) -> DispersionConfig:
    """A recipe's `dispersion`; its seed is the training's unless it has one."""
    values = section.model_dump()
    values["tokens"] = None if section.tokens == "all" else section.tokens
    values["seed"] = seed if section.seed is None else section.seed
    return DispersionConfig(**values)


def _watch(every: int | None, steps: int, corpus: Path) -> CondensationWatch | None:
    """Of the first tokens of the first held-out blocks; None where the recipe turns it off."""
    if every == 0:
        return None
    blocks = torch.from_numpy(heldout_blocks(corpus, blocks=WATCHED_SEQUENCES)[:, :WATCHED_TOKENS])
    return CondensationWatch(blocks, every or math.ceil(steps / WATCHES))


# Candidates of a pilot


def candidate(
    options: CandidateOptions, inputs: Inputs, output_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Train an arm, measure it as the torch model of a build is, and delete its weights.

    Leaves items.json and condensation.json; a candidate is compared with the input `reference`, the baseline.
    A training that an interrupted call finished is not repeated. An adapter is measured over its base.
    Returns {seconds, weights_sha256}, of a candidate also its differences {loss, cosine}, or {diverged:
    reason}. Raises NotFinite for a baseline that diverges, BadInput, before training, for too little text.
    """
    suite = task_suite(options.items, inputs)
    documents = len({question.document for question in suite.questions[LOSS_TASK]})
    sequences = len(heldout_blocks(inputs["corpus"], blocks=CONDENSATION_BLOCKS))
    if min(documents, sequences) < 2:
        raise BadInput(
            f"the held-out text has {documents} document(s) and {sequences} sequence(s), and a paired "
            "interval needs 2 of each: hold out more (data.heldout), or take a smaller data.context"
        )
    weights = output_dir / "weights"
    trained = weights / "trained.json"
    if not trained.is_file():
        weights.mkdir(exist_ok=True)
        try:
            write_json(trained, train(options.training, inputs, weights, progress))
        except NotFinite as problem:
            if options.training.arm.dispersion is None:
                raise
            shutil.rmtree(weights)
            return {"diverged": str(problem)}
    training = json.loads(trained.read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained_model = adapters.trained_model(options.training.train.adapter, inputs["base"], weights)
    model = models.TorchModel(trained_model.to(device))
    scores = suite.run(model, ScoreOptions(progress=progress))
    write_json(output_dir / ITEMS, to_json(scores))
    geometry = condensation(inputs, model, output_dir, progress)
    if (weights / "logs").is_dir():  # for train.report_to
        shutil.move(weights / "logs", output_dir / "logs")
    shutil.rmtree(weights)
    results = {name: training[name] for name in ("seconds", "weights_sha256")}
    if geometry.change is not None:
        text = (inputs["reference"] / ITEMS).read_text(encoding="utf-8")
        pair = from_json(Results, json.loads(text))[LOSS_TASK], scores[LOSS_TASK]
        loss = compare_task([pair], Resampling(seed=options.items.seed)).main.nats
        results |= {"loss": to_json(loss), "cosine": to_json(geometry.change.mean_cosine)}
    return results
