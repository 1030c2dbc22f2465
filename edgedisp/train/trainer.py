"""Mid-train a causal language model on packed token blocks, with or without a dispersion term.

The loop is the transformers `Trainer`; what is added is the term, a fixed order of the data, and a log that
keeps cross-entropy and dispersion apart. Two arms that differ only in the term see the same batches, the
same schedule and the same random numbers: the term has a stream of its own (dispersion/collect.py), and the
data are read in the order of the file, shuffled beforehand once for all arms.

Gradient accumulation: the Trainer does not divide a loss by the number of micro-batches when the model
takes `num_items_in_batch` (it sums the cross-entropy over all tokens of the step itself). The dispersion
term is a mean per micro-batch, so it is divided here.
"""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from edgedisp import Progress, silent

ROWS = "edgedisp_rows.json"


class Penalty(Protocol):
    """What `fit` needs of a dispersion term: `edgedisp.dispersion.collect.Dispersion` fits it."""

    weight: float

    def watch(self, model: nn.Module) -> AbstractContextManager[Any]: ...

    def loss(self, mask: Tensor | None = None, *, step: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class TrainSettings:
    """The optimisation of one arm; both arms of a twin get the same one. Fields as in a recipe's `train`."""

    steps: int
    lr: float
    batch: int = 4
    accumulate: int = 1
    warmup: float = 0.1
    schedule: str = "cosine"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = None
    seed: int = 0

    @property
    def save_steps(self) -> int:
        """Optimizer steps between checkpoints: about four in a run, and at least ten steps apart."""
        return self.checkpoint_every or max(10, math.ceil(self.steps / 5))


@dataclass
class Fit:
    """What a training run leaves behind."""

    log: list[dict[str, float | int | None]]
    seconds: float
    tokens: int
    resumed_from: int
    peak_memory_bytes: int

    @property
    def tokens_per_s(self) -> float | None:
        """Of this process: steps done before a resume are not counted."""
        new = self.tokens * (1 - self.resumed_from / len(self.log)) if self.log else 0
        return new / self.seconds if self.seconds and new else None


class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed blocks `(blocks, context)` as a data set; labels are the inputs (the model shifts them)."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class DispersionTrainer(Trainer):
    """A `Trainer` whose loss is `CE + weight * dispersion`, each logged apart; without a term a plain one.

    The model must be run inside `penalty.watch(model)`, as `fit` does.
    """

    def __init__(self, *args: Any, penalty: Penalty | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.penalty = penalty
        self._parts: list[tuple[float, float | None]] = []  # of each micro-batch since the last log

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data: Any = train_dataset if train_dataset is not None else self.train_dataset
        return torch.utils.data.SequentialSampler(data)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = {**inputs, "use_cache": False}  # type: ignore[dict-item]
        cross_entropy, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss, dispersion = cross_entropy, None
        if self.penalty is not None:
            micro_batch = len(self._parts) % self.args.gradient_accumulation_steps
            step = self.state.global_step * self.args.gradient_accumulation_steps + micro_batch
            term = self.penalty.loss(inputs.get("attention_mask"), step=step)
            share = (
                1 / self.current_gradient_accumulation_steps if self._ce_is_share(num_items_in_batch) else 1.0
            )
            loss = cross_entropy + self.penalty.weight * share * term
            dispersion = float(term.detach())
        self._parts.append((float(cross_entropy.detach()), dispersion))
        return (loss, outputs) if return_outputs else loss

    def _ce_is_share(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the cross-entropy of a micro-batch is its share of the step's mean (module docstring)."""
        return bool(self.model_accepts_loss_kwargs) and num_items_in_batch is not None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts:
            parts, self._parts = self._parts, []
            cross_entropy = sum(part[0] for part in parts)
            logs["cross_entropy"] = cross_entropy / (1 if self.model_accepts_loss_kwargs else len(parts))
            terms = [part[1] for part in parts if part[1] is not None]
            if terms:
                logs["dispersion"] = sum(terms) / len(terms)
        super().log(logs, start_time)


class _Rows(TrainerCallback):
    """Keeps a row per optimizer step, saves the rows with each checkpoint, and reports progress."""

    def __init__(self, rows: list[dict[str, Any]], checkpoints: Path, progress: Progress) -> None:
        self.rows, self.checkpoints, self.progress = rows, checkpoints, progress

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if logs is None or "cross_entropy" not in logs:
            return
        row = {
            "step": state.global_step,
            "loss": logs["cross_entropy"],
            "dispersion": logs.get("dispersion"),
            "lr": logs.get("learning_rate"),
            "grad_norm": float(logs["grad_norm"]) if "grad_norm" in logs else None,
        }
        self.rows.append(row)
        term = "" if row["dispersion"] is None else f", dispersion {row['dispersion']:.4f}"
        self.progress(state.global_step, state.max_steps, f"loss {row['loss']:.3f}{term}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Written last, so that its presence says the checkpoint is whole.
        target = self.checkpoints / f"checkpoint-{state.global_step}" / ROWS
        unfinished = target.with_suffix(".partial")
        unfinished.write_text(json.dumps(self.rows))
        unfinished.replace(target)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """The Trainer seeds the process's global streams; give them back as they were."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines and no bars of transformers inside the block."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _arguments(settings: TrainSettings, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.clip,
        bf16=settings.precision == "bf16",
        optim="adamw_torch_fused",
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`: one with its rows, which are written last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / ROWS).is_file()]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


def _remove_half_written(folder: Path) -> None:
    """Left in place they would count as the newest, and the Trainer would rotate the whole ones away."""
    for path in folder.glob("checkpoint-*"):
        if not (path / ROWS).is_file():
            shutil.rmtree(path)


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fit(
    model: nn.Module,
    tokens: np.ndarray,
    settings: TrainSettings,
    *,
    checkpoints: Path,
    penalty: Penalty | None = None,
    progress: Progress = silent,
) -> Fit:
    """Train `model` in place and say how it went.

    Args:
        model: a causal language model, weights float32 (bf16 is autocast), perhaps wrapped by peft.
        tokens: `(blocks, context)` unsigned integers, already in the order in which they are to be seen;
            at least `steps * accumulate * batch` blocks.
        checkpoints: folder for checkpoints; the newest complete one in it is resumed from.
        penalty: the dispersion term, or None.
    Raises ValueError if there are too few blocks.
    """
    needed = settings.steps * settings.accumulate * settings.batch
    if len(tokens) < needed:
        raise ValueError(f"{settings.steps} steps need {needed} blocks of tokens, {len(tokens)} were given")
    resumed = last_checkpoint(checkpoints)
    _remove_half_written(checkpoints)
    rows: list[dict[str, Any]] = json.loads((resumed / ROWS).read_text()) if resumed else []
    resumed_from = len(rows)
    started = time.perf_counter()
    if settings.gradient_checkpointing:
        # Set on the model: the Trainer's own option changed its name within transformers 5.
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    with _own_random_state(), quiet(), penalty.watch(model) if penalty else nullcontext():
        trainer = DispersionTrainer(
            model=model,
            args=_arguments(settings, checkpoints),
            train_dataset=Blocks(tokens[:needed]),
            penalty=penalty,
            callbacks=[_Rows(rows, checkpoints, progress)],
        )
        trainer.remove_callback(PrinterCallback)  # it prints every log row to stdout
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    model.eval()
    seen = needed * tokens.shape[1]
    return Fit(rows, time.perf_counter() - started, seen, resumed_from, peak_memory_bytes())
