"""Mid-train a causal language model on packed token blocks, with or without a dispersion term.

The loop is the transformers `Trainer` with `DispersionMixin` (mixin.py). `fit` adds what a fair and exact
build needs: the blocks are read in the order given, shuffled beforehand once for all arms, so that two arms
that differ only in the term see the same batches, schedule and random numbers; checkpoints that are whole or
not there (checkpoints.py); a log with a row per step; and speed that changes no result: no logits kept
(fused_head.py), freed memory kept (memory.py), on request compiled layers (compiled.py).

The Trainer's AdamW decays weights, not norms and biases. Gradient checkpointing is set on the model, because
the Trainer's own option changed its name within transformers 5.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.dispersion.config import DispersionConfig
from edgedisp.train import checkpoints as saved
from edgedisp.train import distributed
from edgedisp.train.checkpoints import last_checkpoint
from edgedisp.train.compiled import compiled_layers, why_not_compiled
from edgedisp.train.data import Blocks
from edgedisp.train.fused_head import fused_head, why_not_fused
from edgedisp.train.memory import activations_recomputed, freed_memory_kept, peak_memory_bytes
from edgedisp.train.mixin import DispersionTrainer
from edgedisp.train.reporting import Reporting, reported_in
from edgedisp.train.settings import Fit, TrainSettings
from edgedisp.train.techniques import Technique
from edgedisp.train.transformers_trainer import PrinterCallback, TrainerCallback, TrainingArguments
from edgedisp.train.watch import Watch

__all__ = ["Fit", "TrainSettings", "fit", "last_checkpoint", "quiet"]


def fit(
    model: nn.Module,
    tokens: np.ndarray,
    settings: TrainSettings,
    *,
    checkpoints: Path,
    dispersion: DispersionConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    end_of_text: int | None = None,
    watch: Watch | None = None,
    reporting: Reporting | None = None,
    share: distributed.Share | None = None,
    progress: Progress = silent,
) -> Fit:
    """Train `model` in place and say how it went.

    Args:
        model: a causal language model, weights float32 (bf16 is autocast), perhaps wrapped by peft.
        tokens: `(blocks, context)` unsigned integers, already in the order in which they are to be seen;
            at least `steps * accumulate * batch` blocks.
        checkpoints: folder for this run's checkpoints; the newest whole one in it is resumed from. Another
            program's are never touched: a folder that holds some is refused.
        dispersion: the dispersion term, such as a `DispersionConfig`, or None.
        callbacks: of transformers, for other techniques; a `Technique` among them is detached at the end.
            Their kinds and their public numbers, words and flags are part of what a checkpoint is compared
            by.
        end_of_text: the token that ends a document; given, nothing looks across documents (data.py).
        watch: looks at the condensation on the way; its rows are part of the result.
        share: what this process takes of each step, where several train together (distributed.py). Each
            of them calls `fit` with the same arguments; `settings` are the step's, not the process's.
    Raises ValueError if there are too few blocks, BadInput for a checkpoint of another run or another
    program, NotFinite if the loss or a gradient is NaN or infinite.
    """
    needed = settings.steps * settings.accumulate * settings.batch
    if len(tokens) < needed:
        raise ValueError(f"{settings.steps} steps need {needed} blocks of tokens, {len(tokens)} were given")
    used = tokens[:needed]
    share = share or distributed.Share(1, settings.batch, settings.accumulate)
    distributed.join(share)
    run = saved.run_identity(
        model,
        used,
        settings,
        dispersion=dispersion,
        end_of_text=end_of_text,
        callbacks=[_told_apart(callback) for callback in callbacks],
        weights=share.held,
    )
    saved.check_own(checkpoints)
    resumed = saved.newest(checkpoints)
    if resumed is not None:
        saved.check_same_run(resumed, run)
    distributed.meet()  # all have seen the same checkpoints
    if distributed.leads():
        saved.keep_only(checkpoints, None if resumed is None else resumed.folder)
    kept = _Rows(run, checkpoints, watch, progress)
    kept.restore(resumed)
    resumed_from = len(kept.rows)
    started = time.perf_counter()
    with _prepared(model, settings, callbacks, reporting) as is_fused:
        trainer = _FitTrainer(
            model=model,
            args=_arguments(settings, share, checkpoints, reporting),
            train_dataset=Blocks(used, end_of_text),
            dispersion=dispersion,
            watch=watch,
            callbacks=[*callbacks, kept],
        )
        kept.trainer = trainer
        distributed.check_divided(trainer, share)
        trainer.remove_callback(PrinterCallback)  # it prints every log row to stdout
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed.folder))
    weights = distributed.whole_weights(trainer)
    distributed.meet()
    model.eval()
    return Fit(
        log=kept.rows,
        seconds=time.perf_counter() - started,
        tokens=needed * tokens.shape[1],
        resumed_from=resumed_from,
        peak_memory_bytes=peak_memory_bytes(),
        watched=[] if watch is None else watch.rows,
        skipped_sequences=kept.skipped_sequences,
        fused_head=is_fused,
        weights=weights,
    )


@contextmanager
def _prepared(
    model: nn.Module,
    settings: TrainSettings,
    callbacks: Sequence[TrainerCallback],
    reporting: Reporting | None,
) -> Iterator[bool]:
    """All that is different while `fit` trains. Yields whether the logits are spared."""
    with ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, Technique):
                stack.callback(callback.detach)
        if settings.gradient_checkpointing:
            stack.enter_context(activations_recomputed(model))
        stack.enter_context(_own_random_state())
        stack.enter_context(quiet())
        stack.enter_context(distributed.quiet_sharding())
        stack.enter_context(reported_in(reporting))
        stack.enter_context(_own_forward(model))
        stack.enter_context(freed_memory_kept())
        if settings.compile:
            if (reason := why_not_compiled(model)) is not None:
                raise BadInput(f"train.compile: {reason}; or leave it off")
            stack.enter_context(compiled_layers(model))
        is_fused = settings.fused_head and why_not_fused(model) is None
        if is_fused:
            stack.enter_context(fused_head(model))
        yield is_fused


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Take out what accelerate leaves in a model, before and after: its autocast, and the mark "prepared".

    A marked model is not prepared again, so a bf16 training after an fp32 one would silently be fp32. The
    Trainer leaves `use_cache: false` in the model's config, which would be saved with the model.
    """
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    _unprepare(model)
    try:
        yield
    finally:
        _unprepare(model)
        if use_cache is not None:
            config.use_cache = use_cache


def _unprepare(model: nn.Module) -> None:
    own = vars(model)
    own.pop("_is_accelerate_prepared", None)
    if "_original_forward" in own:
        original = own.pop("_original_forward")
        own.pop("forward", None)
        if getattr(original, "__func__", None) is not type(model).forward:
            own["forward"] = original


def _told_apart(callback: TrainerCallback) -> tuple[str, dict[str, Any]]:
    """A callback's kind and its plain public attributes, such as `alpha` and `seed`."""
    plain = {
        name: value
        for name, value in vars(callback).items()
        if not name.startswith("_") and isinstance(value, int | float | str | bool)
    }
    return type(callback).__name__, plain


class _FitTrainer(DispersionTrainer):
    """Knows which of its checkpoints are whole."""

    def last_checkpoint(self) -> Path | None:
        return last_checkpoint(Path(self.args.output_dir or ""))


class _Rows(TrainerCallback):
    """Keeps a row per optimizer step, completes each checkpoint with them, and reports progress."""

    trainer: DispersionTrainer

    def __init__(
        self, run: dict[str, Any], checkpoints: Path, watch: Watch | None, progress: Progress
    ) -> None:
        self.run, self.checkpoints, self.watch, self.progress = run, checkpoints, watch, progress
        self.rows: list[dict[str, Any]] = []
        self.skipped_before = 0  # by the processes that this one continues
        self.skipped_since = 0  # by this one and those beside it

    @property
    def skipped_sequences(self) -> int:
        return self.skipped_before + self.skipped_since

    def restore(self, checkpoint: saved.Checkpoint | None) -> None:
        if checkpoint is not None:
            self.rows, self.skipped_before = checkpoint.rows, checkpoint.skipped_sequences
            if self.watch is not None:
                self.watch.rows = checkpoint.watched

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
        self.skipped_since = logs.get("skipped_sequences", 0)
        term = "" if row["dispersion"] is None else f", dispersion {row['dispersion']:.4f}"
        self.progress(state.global_step, state.max_steps, f"loss {row['loss']:.3f}{term}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:  # by the Trainer, right after this
            saved.begin(saved.folder_of(self.checkpoints, state.global_step))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        distributed.meet()  # the other processes' random states are part of the checkpoint
        if not state.is_world_process_zero:
            return
        folder = saved.folder_of(self.checkpoints, state.global_step)
        watched = [] if self.watch is None else self.watch.rows
        marker = {"rows": self.rows, "watched": watched, "run": self.run}
        saved.mark(folder, {**marker, "skipped_sequences": self.skipped_sequences})
        saved.keep_only(self.checkpoints, folder)


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


def _arguments(
    settings: TrainSettings, share: distributed.Share, folder: Path, reporting: Reporting | None
) -> TrainingArguments:
    args = TrainingArguments(
        output_dir=str(folder),
        run_name=None if reporting is None else reporting.name,
        report_to=[] if reporting is None else list(reporting.to),
        max_steps=settings.steps,
        **share.arguments(),
        train_sampling_strategy="sequential",
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
        save_total_limit=None,  # it would remove the old checkpoint before the new one is marked whole
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # such a loss stops training
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    distributed.gather_in_float32(args)
    return args
