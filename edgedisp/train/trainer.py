"""Mid-train a causal language model on packed token blocks with the transformers `Trainer`.

`fit` reads the blocks in order, so that two arms see the same batches, schedule and random numbers;
checkpoints are whole or unused.

Several processes (torchrun, accelerate launch) share each step of `batch x accumulate` sequences, under DDP
or FSDP2 (`train.distributed`). Gradients are added up in float32: loss and weights agree with one process to
float tolerance, dropout aside. A checkpoint can be continued by another number of processes.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from edgedisp.core.distributed import get_world_size, is_main_process, split
from edgedisp.core.errors import BadInput
from edgedisp.core.files import list_files, listing_damage, read_json, sealed, write_json
from edgedisp.core.hub import quiet
from edgedisp.core.progress import Progress, silent, warn
from edgedisp.core.results import Training
from edgedisp.data.packing import PADDING, START, TARGET, row_positions
from edgedisp.dispersion.condensation import quick_condensation
from edgedisp.dispersion.losses import DispersionConfig
from edgedisp.recipe import Train
from edgedisp.train.chunked_cross_entropy import IGNORED, chunked_head
from edgedisp.train.dispersion_trainer import DispersionTrainer
from edgedisp.train.performance import compiled_layers, keep_freed_memory

# Column of the log -> key of the Trainer's.
LOG = {"loss": "cross_entropy", "dispersion": "dispersion", "lr": "learning_rate", "grad_norm": "grad_norm"}
MARKER = "edgedisp.json"  # in a checkpoint that is whole
PREFIX = "checkpoint-"  # the Trainer's own name for checkpoint folders
TENSORBOARD_DIR = "TENSORBOARD_LOGGING_DIR"  # environment variable of transformers
TIME_LIMIT = timedelta(hours=6)  # a slow disk or a sleeping laptop must not end a collective operation


@dataclass(frozen=True)
class FitOptions:
    """output_dir: folder of the checkpoints. end_of_text, marks, disperse_answers: see PackedDataset.
    watch_blocks: token blocks `(sequences, tokens)` whose condensation is measured before the first step,
    every `watch_every` steps and after the last. log_dir, run_name: for `train.report_to`."""

    steps: int
    seed: int
    output_dir: Path
    dispersion: DispersionConfig | None = None
    callbacks: Sequence[TrainerCallback] = ()
    end_of_text: int | None = None
    marks: np.ndarray | None = None
    disperse_answers: bool = False
    watch_blocks: Tensor | None = None
    watch_every: int = 1
    log_dir: Path | None = None
    run_name: str | None = None


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed blocks of tokens `(blocks, context)`; labels are the inputs (the model shifts them).

    Attention runs through the block. With `end_of_text`, the token that ends a document, it does not:
    position ids count from 0 in each document, of which transformers makes a block-diagonal mask, and the
    first token of a document is no target. The dispersion loss still pairs all tokens of a block.

    With `marks` (data/packing.py) it is the rows that stand apart, and only the marked tokens are targets;
    `dispersion_mask` says which tokens dispersion is of: all but padding, or `disperse_answers` the targets.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        end_of_text: int | None = None,
        marks: np.ndarray | None = None,
        disperse_answers: bool = False,
    ) -> None:
        self.tokens, self.end_of_text = tokens, end_of_text
        self.marks, self.disperse_answers = marks, disperse_answers

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, more = self.tokens[index].astype(np.int64), {}
        if self.marks is not None:
            marks = self.marks[index]
            is_first, is_target = marks & START != 0, marks & TARGET != 0
            more["dispersion_mask"] = is_target if self.disperse_answers else marks & PADDING == 0
        elif self.end_of_text is not None:
            is_first = np.append(True, tokens[:-1] == self.end_of_text)
            is_target = ~is_first
        else:
            return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(tokens)}
        labels, positions = np.where(is_target, tokens, IGNORED), row_positions(is_first)
        arrays = {"input_ids": tokens, "labels": labels, "position_ids": positions, **more}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def fit(
    model: nn.Module, tokens: np.ndarray, train: Train, options: FitOptions, progress: Progress = silent
) -> tuple[Training, dict[str, Tensor] | None]:
    """Train `model` in place; the newest whole checkpoint in `options.output_dir` is resumed from.

    model: a causal language model with float32 weights, perhaps wrapped by peft; throw it away if `fit`
    raises. tokens: `(blocks, context)` unsigned integers, at least `steps * accumulate * batch` blocks. Every
    process of a launch calls `fit` alike and takes its share of each step.

    Returns the results without `settings` and `weights_sha256`, and None; if FSDP divided the model, its
    whole state dict, on the CPU of the leading process. Raises ValueError if there are too few blocks,
    BadInput for a checkpoint that cannot be continued, NotFinite if the loss or a gradient is not finite.
    """
    blocks = options.steps * train.accumulate * train.batch
    if len(tokens) < blocks:
        raise ValueError(f"{options.steps} steps need {blocks} blocks of tokens, {len(tokens)} were given")
    if get_world_size() > 1 and not torch.distributed.is_initialized():
        # On GPUs torch then makes NCCL for them and gloo beside it, which offloading needs.
        backend = None if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=TIME_LIMIT)
    monitor = _Monitor(options, train.distributed is not None and get_world_size() > 1, progress)
    newest = monitor.resume()
    started = time.perf_counter()
    with _prepared(model, train, options) as is_chunked:
        trainer = DispersionTrainer(
            model=model,
            args=_arguments(train, options),
            train_dataset=PackedDataset(
                tokens[:blocks], options.end_of_text, options.marks, options.disperse_answers
            ),
            dispersion=options.dispersion,
            callbacks=list(options.callbacks),
        )
        trainer.remove_callback(PrinterCallback)  # it prints every log row to stdout
        trainer.callback_handler.callbacks.insert(0, monitor)  # before those that write logs
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    # Collective: every process has to call it.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    barrier()
    # Takes accelerate's autocast off, and its mark, for which a second training would have no autocast.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(model).pop("_is_accelerate_prepared", None)
    model.eval()
    seconds, resumed_from = time.perf_counter() - started, 0 if newest is None else _step(newest)
    total = blocks * tokens.shape[1]
    rows = [row for row in trainer.state.log_history if "cross_entropy" in row]
    result = Training(
        steps=options.steps,
        tokens=total,
        seconds=seconds,
        weights_sha256="",
        tokens_per_s=total * (1 - resumed_from / options.steps) / seconds or None,
        processes=get_world_size(),
        resumed_from=resumed_from,
        log=[{"step": row["step"], **{name: row.get(key) for name, key in LOG.items()}} for row in rows],
        watched=monitor.watched,
        watch_seconds=math.fsum(row["seconds"] for row in monitor.watched),
        chunked_cross_entropy=is_chunked,
    )
    return result, weights


@contextmanager
def _prepared(model: Any, train: Train, options: FitOptions) -> Iterator[bool]:
    """What differs while `fit` trains. Yields whether the loss is computed in chunks."""
    with ExitStack() as stack:
        # The Trainer seeds the process's global streams and turns the model's key-value cache off.
        stack.enter_context(torch.random.fork_rng())
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(setattr, model.config, "use_cache", model.config.use_cache)
        stack.enter_context(quiet())
        stack.enter_context(warnings.catch_warnings())  # of the chunked head, whose view nothing changes
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        if options.log_dir is not None and TENSORBOARD_DIR not in os.environ:
            os.environ[TENSORBOARD_DIR] = str(options.log_dir)
            stack.callback(os.environ.pop, TENSORBOARD_DIR)
        if train.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        stack.enter_context(keep_freed_memory())
        if train.compile:
            stack.enter_context(compiled_layers(model))
        yield stack.enter_context(chunked_head(model, targets_alone=options.marks is not None))


def _arguments(train: Train, options: FitOptions) -> TrainingArguments:
    batch, accumulate = split(train.batch, train.accumulate, get_world_size())
    fsdp: dict[str, Any] = {}
    if (sharding := train.distributed) is not None and get_world_size() > 1:
        config = {
            "version": 2,
            "reshard_after_forward": sharding.fsdp == "full_shard",
            "cpu_offload": sharding.cpu_offload,
            "state_dict_type": "SHARDED_STATE_DICT",  # each process writes its part of a checkpoint
        }
        if sharding.wrap != "auto":
            config["transformer_layer_cls_to_wrap"] = list(sharding.wrap)
        fsdp = {"fsdp": True, "fsdp_config": config}
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
        # About five in a run, and at least ten steps apart.
        save_steps=train.checkpoint_every or max(10, math.ceil(options.steps / 5)),
        logging_steps=1,
        logging_nan_inf_filter=False,  # such a loss stops training
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        log_level_replica="error",
        ddp_find_unused_parameters=False,  # all are used; looking for others costs time in each step
        **fsdp,
    )
    if args.fsdp_plugin_args is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # accelerate's own choice for bf16 adds up gradients in bf16, which is another training.
        args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()
    return args


# ---------------------------------------------------------------- checkpoints and processes


class _Monitor(TrainerCallback):
    """Reports progress, watches the condensation, which changes no weight, and marks whole checkpoints.
    `watched` collects `{"step", "cosine_by_layer", "seconds"}`; step 0 is before training."""

    def __init__(self, options: FitOptions, is_sharded: bool, progress: Progress) -> None:
        self.options, self.is_sharded, self.progress = options, is_sharded, progress
        self.watched: list[dict[str, Any]] = []

    def resume(self) -> Path | None:
        """The newest whole checkpoint, alone in its folder; restores the rows of the watch."""
        newest = newest_checkpoint(self.options.output_dir)
        if newest is not None:
            marker = read_json(newest / MARKER)
            if marker["is_sharded"] != self.is_sharded:
                raise BadInput(
                    f"{newest}: a checkpoint cannot be continued from FSDP to DDP or back; remove it"
                )
            self.watched = marker["watched"]
        barrier()  # all processes have seen the same checkpoints
        if is_main_process():
            _remove_checkpoints(self.options.output_dir, except_for=newest)
        return newest

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.watched:
            self._watch(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.options.watch_every == 0 or state.global_step == state.max_steps:
            self._watch(kwargs["model"], state.global_step)

    def _watch(self, model: nn.Module, step: int) -> None:
        if (blocks := self.options.watch_blocks) is not None:
            started = time.perf_counter()
            cosines = quick_condensation(model.eval(), blocks)  # the Trainer calls `train()` at each step
            seconds = time.perf_counter() - started
            self.watched.append({"step": step, "cosine_by_layer": cosines, "seconds": seconds})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "cross_entropy" not in logs:
            return
        term = f", dispersion {logs['dispersion']:.4f}" if "dispersion" in logs else ""
        self.progress(state.global_step, state.max_steps, f"loss {logs['cross_entropy']:.3f}{term}")
        if self.watched and self.watched[-1]["step"] == state.global_step:
            cosines = self.watched[-1]["cosine_by_layer"]
            logs["cosine_by_layer/mean"] = sum(cosines) / len(cosines)
            logs.update({f"cosine_by_layer/{layer:02d}": value for layer, value in enumerate(cosines)})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Marks the checkpoint, and only then removes the one before it."""
        barrier()  # the other processes' random states are part of the checkpoint
        if state.is_world_process_zero:
            folder = self.options.output_dir / f"{PREFIX}{state.global_step}"
            marker = {"watched": self.watched, "is_sharded": self.is_sharded, "files": list_files(folder)}
            write_json(folder / MARKER, sealed(marker))
            _remove_checkpoints(self.options.output_dir, except_for=folder)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint under `output_dir` whose files are those that its marker, written last, lists."""
    marked = sorted((path.parent for path in output_dir.glob(f"{PREFIX}*/{MARKER}")), key=_step, reverse=True)
    for checkpoint in marked:
        if (damage := listing_damage(checkpoint / MARKER)) is None:
            return checkpoint
        warn(f"{checkpoint}/{damage}; it is not continued")
    return None


def _remove_checkpoints(output_dir: Path, except_for: Path | None) -> None:
    for path in output_dir.glob(f"{PREFIX}*"):
        if path != except_for:
            shutil.rmtree(path)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def barrier() -> None:
    """Wait until every process of the launch is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave_processes() -> None:
    """After the last training: part from the other processes of a launch."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
