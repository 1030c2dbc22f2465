"""Mid-train a causal language model on packed token blocks, with or without a dispersion term.

The loop is the transformers `Trainer` with `DispersionMixin`. `fit` reads the blocks in order, so that two
arms see the same batches, schedule and random numbers; checkpoints are whole or unused.

Several processes (torchrun, accelerate launch) share each step of `batch x accumulate` sequences. Under DDP
each has the whole model, under FSDP2 (`train.distributed`) a part of it; weights are gathered, and gradients
added up, in float32. Loss and weights agree with one process to float tolerance, dropout aside. A checkpoint
can be continued by another number of processes, but not from DDP to FSDP or back.
"""

from __future__ import annotations

import math
import os
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from edgedisp.core.distributed import place, split
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.dispersion.config import DispersionConfig
from edgedisp.models import quiet
from edgedisp.recipe import Train
from edgedisp.train.arm_callbacks import TrainingTechnique
from edgedisp.train.checkpoints import PREFIX, keep_only, mark_whole, newest_checkpoint, read_marker
from edgedisp.train.chunked_cross_entropy import chunked_head, unsupported
from edgedisp.train.dispersion_trainer import CondensationWatch, DispersionTrainer
from edgedisp.train.packed_dataset import PackedDataset
from edgedisp.train.performance import (
    cannot_compile,
    checkpoint_activations,
    compiled_layers,
    keep_freed_memory,
    peak_memory_bytes,
)

TENSORBOARD_DIR = "TENSORBOARD_LOGGING_DIR"  # environment variable of transformers
TIME_LIMIT = timedelta(hours=6)  # a slow disk or a sleeping laptop must not end a collective operation


@dataclass(frozen=True)
class FitOptions:
    """What `fit` needs besides the recipe's `train` section.

    `output_dir`: folder of the checkpoints. `end_of_text`: the token that ends a document; with it, attention
    stays inside documents. `log_dir`, `run_name`: for `train.report_to`.
    """

    steps: int
    seed: int
    output_dir: Path
    dispersion: DispersionConfig | None = None
    callbacks: Sequence[TrainerCallback] = ()
    end_of_text: int | None = None
    watch: CondensationWatch | None = None
    log_dir: Path | None = None
    run_name: str | None = None


@dataclass
class FitResult:
    """`log` has a row per optimizer step (`step`, `loss` = cross-entropy in nats per token, `dispersion`,
    `lr`, `grad_norm`), `watched` the rows of the condensation watch. `weights` is None unless FSDP divided
    the model: then it is the whole state dict, on the CPU, in the leading process.
    """

    log: list[dict[str, Any]]
    seconds: float
    tokens: int
    resumed_from: int
    peak_memory_bytes: int
    watched: list[dict[str, Any]] = field(default_factory=list)
    skipped_sequences: int = 0
    chunked_cross_entropy: bool = False
    weights: dict[str, Tensor] | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Of this process: steps done before a resume are not counted."""
        new = self.tokens * (1 - self.resumed_from / len(self.log)) if self.log else 0
        return new / self.seconds if self.seconds and new else None

    @property
    def watch_seconds(self) -> float:
        """Seconds of the whole run spent on the condensation watch."""
        return math.fsum(row["seconds"] for row in self.watched)


def fit(
    model: nn.Module, tokens: np.ndarray, train: Train, options: FitOptions, progress: Progress = silent
) -> FitResult:
    """Train `model` in place; the newest whole checkpoint in `options.output_dir` is resumed from.

    Args:
        model: a causal language model, weights float32 (bf16 is autocast), perhaps wrapped by peft.
        tokens: `(blocks, context)` unsigned integers, at least `steps * accumulate * batch` blocks.
        train: `precision` resolved to bf16 or fp32. In a launch of several processes each calls `fit` alike
            and takes its share of the step.
    Raises ValueError if there are too few blocks, BadInput for a checkpoint that cannot be continued,
    NotFinite if the loss or a gradient is NaN or infinite.
    """
    needed = options.steps * train.accumulate * train.batch
    if len(tokens) < needed:
        raise ValueError(f"{options.steps} steps need {needed} blocks of tokens, {len(tokens)} were given")
    _join_processes()
    is_sharded = train.distributed is not None and place().count > 1
    newest = newest_checkpoint(options.output_dir)
    state = {} if newest is None else read_marker(newest)
    if newest is not None and state["is_sharded"] != is_sharded:
        raise BadInput(f"{newest}: a checkpoint cannot be continued from FSDP to DDP or back; remove it")
    barrier()  # all processes have seen the same checkpoints
    if place().leads:
        keep_only(options.output_dir, newest)
    log = _Log(options, state, is_sharded, progress)
    resumed_from = len(log.rows)
    started = time.perf_counter()
    with _prepared(model, train, options) as is_chunked:
        trainer = _FitTrainer(
            model=model,
            args=_arguments(train, options),
            train_dataset=PackedDataset(tokens[:needed], options.end_of_text),
            dispersion=options.dispersion,
            watch=options.watch,
            callbacks=[*options.callbacks, log],
        )
        if is_sharded and not trainer.is_fsdp_enabled:  # as accelerate decides silently on CPUs
            raise ValueError("accelerate does not divide a model on this kind of device (FSDP)")
        trainer.remove_callback(PrinterCallback)  # it prints every log row to stdout
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    # Collective: every process has to call it.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    barrier()
    model.eval()
    return FitResult(
        log=log.rows,
        seconds=time.perf_counter() - started,
        tokens=needed * tokens.shape[1],
        resumed_from=resumed_from,
        peak_memory_bytes=peak_memory_bytes(),
        watched=[] if options.watch is None else options.watch.rows,
        skipped_sequences=log.skipped_sequences,
        chunked_cross_entropy=is_chunked,
        weights=weights,
    )


@contextmanager
def _prepared(model: nn.Module, train: Train, options: FitOptions) -> Iterator[bool]:
    """All that is different while `fit` trains. Yields whether the loss is computed in chunks."""
    with ExitStack() as stack:
        for callback in options.callbacks:
            if isinstance(callback, TrainingTechnique):
                stack.callback(callback.detach)
        if train.gradient_checkpointing:  # the Trainer's option has another name before transformers 5
            checkpoint_activations(model)
        # The Trainer seeds the process's global streams.
        stack.enter_context(torch.random.fork_rng())
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(quiet())
        # The chunked head returns a view, which nothing changes in place.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        if options.log_dir is not None and TENSORBOARD_DIR not in os.environ:
            os.environ[TENSORBOARD_DIR] = str(options.log_dir)
            stack.callback(os.environ.pop, TENSORBOARD_DIR)
        stack.callback(_restore_model, model, getattr(getattr(model, "config", None), "use_cache", None))
        stack.enter_context(keep_freed_memory())
        if train.compile:
            if (reason := cannot_compile(model)) is not None:
                raise BadInput(f"train.compile: {reason}; or leave it off")
            stack.enter_context(compiled_layers(model))
        is_chunked = unsupported(model) is None
        if is_chunked:
            stack.enter_context(chunked_head(model))
        yield is_chunked


def _restore_model(model: nn.Module, use_cache: bool | None) -> None:
    """Undo what stays in a trained model: the Trainer's `use_cache`, accelerate's autocast and its mark, for
    which a bf16 training after an fp32 one would silently be fp32."""
    attributes = vars(model)
    attributes.pop("_is_accelerate_prepared", None)
    if "_original_forward" in attributes:
        original = attributes.pop("_original_forward")
        attributes.pop("forward", None)
        if getattr(original, "__func__", None) is not type(model).forward:
            attributes["forward"] = original
    if use_cache is not None:
        config: Any = model.config
        config.use_cache = use_cache


def _arguments(train: Train, options: FitOptions) -> TrainingArguments:
    batch, accumulate = split(train.batch, train.accumulate, place().count)
    args = TrainingArguments(
        output_dir=str(options.output_dir),
        run_name=options.run_name,
        report_to=list(train.report_to),
        max_steps=options.steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        learning_rate=train.lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(train.schedule, train.schedule),
        warmup_steps=round(train.warmup * options.steps),
        weight_decay=train.weight_decay,  # of weights, not of norms and biases
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        max_grad_norm=train.clip,
        bf16=train.precision == "bf16",
        optim="adamw_torch_fused",
        seed=options.seed,
        data_seed=options.seed,
        save_strategy="steps",
        # About five in a run, and at least ten steps apart.
        save_steps=train.checkpoint_every or max(10, math.ceil(options.steps / 5)),
        save_total_limit=None,  # it would remove the old checkpoint before the new one is marked whole
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # such a loss stops training
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        **_distributed_arguments(train),
    )
    if args.fsdp_plugin_args is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # accelerate's own choice for bf16 adds up gradients in bf16, which is another training.
        args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()
    return args


def _distributed_arguments(train: Train) -> dict[str, Any]:
    if place().count == 1:
        return {}
    # All parameters are used; looking for unused ones costs time in each step.
    arguments: dict[str, Any] = {"log_level_replica": "error", "ddp_find_unused_parameters": False}
    if (sharding := train.distributed) is not None:
        config = {
            "version": 2,
            "reshard_after_forward": sharding.fsdp == "full_shard",
            "cpu_offload": sharding.cpu_offload,
            "state_dict_type": "SHARDED_STATE_DICT",  # each process writes its part of a checkpoint
        }
        if sharding.wrap != "auto":
            config["transformer_layer_cls_to_wrap"] = list(sharding.wrap)
        arguments |= {"fsdp": True, "fsdp_config": config}
    return arguments


class _FitTrainer(DispersionTrainer):
    def last_checkpoint(self) -> str | None:
        newest = newest_checkpoint(Path(self.args.output_dir or ""))
        return None if newest is None else str(newest)


class _Log(TrainerCallback):
    """Collects a row per optimizer step, completes each checkpoint with them, and reports progress."""

    def __init__(self, options: FitOptions, state: dict[str, Any], is_sharded: bool, progress: Progress):
        self.output_dir, self.watch, self.progress = options.output_dir, options.watch, progress
        self.is_sharded = is_sharded
        self.rows: list[dict[str, Any]] = state.get("rows", [])
        self.skipped_sequences: int = state.get("skipped_sequences", 0)
        self._skipped_before = self.skipped_sequences  # in the processes that this one continues
        if self.watch is not None and state:
            self.watch.rows = state["watched"]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "cross_entropy" not in (logs or {}):
            return
        row = {
            "step": state.global_step,
            "loss": logs["cross_entropy"],
            "dispersion": logs.get("dispersion"),
            "lr": logs.get("learning_rate"),
            "grad_norm": float(logs["grad_norm"]) if "grad_norm" in logs else None,
        }
        self.rows.append(row)
        self.skipped_sequences = self._skipped_before + logs.get("skipped_sequences", 0)
        term = "" if row["dispersion"] is None else f", dispersion {row['dispersion']:.4f}"
        self.progress(state.global_step, state.max_steps, f"loss {row['loss']:.3f}{term}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        barrier()  # the other processes' random states are part of the checkpoint
        if not state.is_world_process_zero:
            return
        folder = self.output_dir / f"{PREFIX}{state.global_step}"
        marker = {
            "rows": self.rows,
            "watched": [] if self.watch is None else self.watch.rows,
            "skipped_sequences": self.skipped_sequences,
            "is_sharded": self.is_sharded,
        }
        mark_whole(folder, marker)
        keep_only(self.output_dir, folder)


def _join_processes() -> None:
    """Meet the other processes of a launch, once in this process's life."""
    if place().count > 1 and not torch.distributed.is_initialized():
        # On GPUs torch then makes NCCL for them and gloo beside it, which offloading needs.
        backend = None if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=TIME_LIMIT)


def barrier() -> None:
    """Wait until every process of the launch is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_processes() -> None:
    """After the last training: part from the other processes of a launch."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
