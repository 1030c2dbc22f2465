"""Mid-train a causal language model on packed token blocks, with or without a dispersion term.

The loop is the transformers `Trainer` with `DispersionMixin`. `fit` reads the blocks in order, so that two
arms see the same batches, schedule and random numbers; checkpoints are whole or unused.

Several processes (torchrun, accelerate launch) share each step of `batch x accumulate` sequences, under DDP
or FSDP2 (`train.distributed`). Gradients are added up in float32: loss and weights agree with one process to
float tolerance, dropout aside. A checkpoint can be continued by another number of processes.
"""

from __future__ import annotations

import json
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
from edgedisp.core.files import write_json
from edgedisp.core.progress import Progress, silent
from edgedisp.core.results import Training
from edgedisp.dispersion.losses import DispersionConfig
from edgedisp.models import quiet
from edgedisp.recipe import Train
from edgedisp.train.callbacks import TrainingTechnique
from edgedisp.train.chunked_cross_entropy import IGNORED, chunked_head
from edgedisp.train.dispersion_trainer import CondensationWatch, DispersionTrainer
from edgedisp.train.performance import (
    cannot_compile,
    checkpoint_activations,
    compiled_layers,
    keep_freed_memory,
)

# Column of the log -> key of the Trainer's.
LOG = {"loss": "cross_entropy", "dispersion": "dispersion", "lr": "learning_rate", "grad_norm": "grad_norm"}
MARKER = "edgedisp.json"  # in a checkpoint that is whole
PREFIX = "checkpoint-"  # the Trainer's own name for checkpoint folders
TENSORBOARD_DIR = "TENSORBOARD_LOGGING_DIR"  # environment variable of transformers
TIME_LIMIT = timedelta(hours=6)  # a slow disk or a sleeping laptop must not end a collective operation


@dataclass(frozen=True)
class FitOptions:
    """What `fit` needs besides the recipe's `train` section. `output_dir`: folder of the checkpoints.
    `end_of_text`: see PackedDataset. `log_dir`, `run_name`: for `train.report_to`."""

    steps: int
    seed: int
    output_dir: Path
    dispersion: DispersionConfig | None = None
    callbacks: Sequence[TrainerCallback] = ()
    end_of_text: int | None = None
    watch: CondensationWatch | None = None
    log_dir: Path | None = None
    run_name: str | None = None


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed blocks of tokens `(blocks, context)`; labels are the inputs (the model shifts them).

    Attention runs through the block, as in most pre-training. With `end_of_text`, the token that ends a
    document, it does not: position ids count from 0 in each document, of which transformers makes a
    block-diagonal mask, and the first token of a document is no target. The dispersion loss still pairs all
    tokens of a block.
    """

    def __init__(self, tokens: np.ndarray, end_of_text: int | None = None) -> None:
        self.tokens, self.end_of_text = tokens, end_of_text

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        if self.end_of_text is None:
            return {"input_ids": ids, "labels": ids}
        every = torch.arange(len(ids))
        starts = torch.zeros_like(every)
        starts[1:] = torch.where(ids[:-1] == self.end_of_text, every[1:], 0)
        positions = every - starts.cummax(dim=0).values
        labels = ids.masked_fill(positions == 0, IGNORED)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}


def fit(
    model: nn.Module, tokens: np.ndarray, train: Train, options: FitOptions, progress: Progress = silent
) -> tuple[Training, dict[str, Tensor] | None]:
    """Train `model` in place; the newest whole checkpoint in `options.output_dir` is resumed from.

    model: a causal language model with float32 weights, perhaps wrapped by peft. tokens: `(blocks, context)`
    unsigned integers, at least `steps * accumulate * batch` blocks. train: `precision` is bf16 or fp32.
    Every process of a launch calls `fit` alike and takes its share of each step.

    Returns the results without `settings` and `weights_sha256`, and None; if FSDP divided the model, its
    whole state dict, on the CPU of the leading process. Raises ValueError if there are too few blocks,
    BadInput for a checkpoint that cannot be continued, NotFinite if the loss or a gradient is not finite.
    """
    blocks = options.steps * train.accumulate * train.batch
    if len(tokens) < blocks:
        raise ValueError(f"{options.steps} steps need {blocks} blocks of tokens, {len(tokens)} were given")
    _join_processes()
    is_sharded = train.distributed is not None and get_world_size() > 1
    newest = _checkpoint_to_resume(options, is_sharded)
    started = time.perf_counter()
    with _prepared(model, train, options) as is_chunked:
        trainer = DispersionTrainer(
            model=model,
            args=_arguments(train, options),
            train_dataset=PackedDataset(tokens[:blocks], options.end_of_text),
            dispersion=options.dispersion,
            watch=options.watch,
            callbacks=[*options.callbacks, _Checkpoints(options, is_sharded, progress)],
        )
        trainer.remove_callback(PrinterCallback)  # it prints every log row to stdout
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    # Collective: every process has to call it.
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    barrier()
    model.eval()
    seconds, resumed_from = time.perf_counter() - started, 0 if newest is None else _step(newest)
    total, watched = blocks * tokens.shape[1], [] if options.watch is None else options.watch.rows
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
        watched=watched,
        watch_seconds=math.fsum(row["seconds"] for row in watched),
        skipped_sequences=sum(int(row.get("skipped_sequences", 0)) for row in rows),
        chunked_cross_entropy=is_chunked,
    )
    return result, weights


@contextmanager
def _prepared(model: nn.Module, train: Train, options: FitOptions) -> Iterator[bool]:
    """All that is different while `fit` trains. Yields whether the loss is computed in chunks."""
    with ExitStack() as stack:
        for callback in options.callbacks:
            if isinstance(callback, TrainingTechnique):
                stack.callback(callback.detach)
        if train.gradient_checkpointing:
            checkpoint_activations(model)
        # The Trainer seeds the process's global streams.
        stack.enter_context(torch.random.fork_rng())
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(quiet())
        stack.enter_context(warnings.catch_warnings())  # of the chunked head, whose view nothing changes
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
        yield stack.enter_context(chunked_head(model))


def _restore_model(model: nn.Module, use_cache: bool | None) -> None:
    """Undo what stays in a trained model: the Trainer's `use_cache`, accelerate's autocast and its mark, for
    which a bf16 training after an fp32 one would silently be fp32."""
    attributes = vars(model)
    attributes.pop("_is_accelerate_prepared", None)
    if "_original_forward" in attributes:
        attributes["forward"] = attributes.pop("_original_forward")
    if use_cache is not None:
        config: Any = model.config
        config.use_cache = use_cache


def _arguments(train: Train, options: FitOptions) -> TrainingArguments:
    batch, accumulate = split(train.batch, train.accumulate, get_world_size())
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
        **_distributed_arguments(train),
    )
    if args.fsdp_plugin_args is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # accelerate's own choice for bf16 adds up gradients in bf16, which is another training.
        args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()
    return args


def _distributed_arguments(train: Train) -> dict[str, Any]:
    if get_world_size() == 1:
        return {}
    # All parameters are used; looking for unused ones costs time in each step.
    arguments: dict[str, Any] = {"log_level_replica": "error", "ddp_find_unused_parameters": False}
    if (sharding := train.distributed) is None:
        return arguments
    config = {
        "version": 2,
        "reshard_after_forward": sharding.fsdp == "full_shard",
        "cpu_offload": sharding.cpu_offload,
        "state_dict_type": "SHARDED_STATE_DICT",  # each process writes its part of a checkpoint
    }
    if sharding.wrap != "auto":
        config["transformer_layer_cls_to_wrap"] = list(sharding.wrap)
    return {**arguments, "fsdp": True, "fsdp_config": config}


# ---------------------------------------------------------------- checkpoints and processes


class _Checkpoints(TrainerCallback):
    """Reports progress, marks each checkpoint as whole with the sizes of its files, and only then removes the
    one before it."""

    def __init__(self, options: FitOptions, is_sharded: bool, progress: Progress) -> None:
        self.output_dir, self.watch = options.output_dir, options.watch
        self.is_sharded, self.progress = is_sharded, progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "cross_entropy" in (logs or {}):
            term = f", dispersion {logs['dispersion']:.4f}" if "dispersion" in logs else ""
            self.progress(state.global_step, state.max_steps, f"loss {logs['cross_entropy']:.3f}{term}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        barrier()  # the other processes' random states are part of the checkpoint
        if not state.is_world_process_zero:
            return
        folder = self.output_dir / f"{PREFIX}{state.global_step}"
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER]
        marker = {
            "watched": [] if self.watch is None else self.watch.rows,
            "is_sharded": self.is_sharded,
            "sizes": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
        }
        write_json(folder / MARKER, marker)
        _remove_checkpoints(self.output_dir, except_for=folder)


def _checkpoint_to_resume(options: FitOptions, is_sharded: bool) -> Path | None:
    """The newest whole checkpoint, alone in its folder; restores the rows of the watch."""
    newest = newest_checkpoint(options.output_dir)
    if newest is not None:
        marker = _marker(newest)
        if marker["is_sharded"] != is_sharded:
            raise BadInput(f"{newest}: a checkpoint cannot be continued from FSDP to DDP or back; remove it")
        if options.watch is not None:
            options.watch.rows = marker["watched"]
    barrier()  # all processes have seen the same checkpoints
    if is_main_process():
        _remove_checkpoints(options.output_dir, except_for=newest)
    return newest


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint under `output_dir` with a marker and every file as long as the marker says."""
    checkpoints = sorted(_checkpoints(output_dir), key=_step, reverse=True)
    return next((path for path in checkpoints if _marker(path)), None)


def _marker(checkpoint: Path) -> dict[str, Any]:
    """The marker of a whole checkpoint, else empty."""
    try:
        marker: dict[str, Any] = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        sizes = marker["sizes"].items()
        return marker if all((checkpoint / name).stat().st_size == size for name, size in sizes) else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}  # absent or damaged


def _remove_checkpoints(output_dir: Path, except_for: Path | None) -> None:
    for path in _checkpoints(output_dir):
        if path != except_for:
            shutil.rmtree(path)


def _checkpoints(output_dir: Path) -> list[Path]:
    return [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def _join_processes() -> None:
    if get_world_size() > 1 and not torch.distributed.is_initialized():
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
