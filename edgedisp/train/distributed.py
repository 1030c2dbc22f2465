"""Several processes, one training: what each takes of a step, and who holds the weights.

torchrun or accelerate launch starts the processes; torch, accelerate and the Trainer do the rest.

Plain data parallelism (DDP): every process holds the whole model and reads its share of the blocks, and
gradients are averaged. accelerate deals out micro-batches in turn, so the processes together read in each
step the blocks that one process would. Loss, dispersion and weights are those of a single process to float
tolerance: only the order in which gradients are added up differs. Dropout is the exception; its masks come
from each process's own stream.

FSDP (`Sharding`; torch's `fully_shard`, FSDP2): each process holds a part of the weights, gradients and
optimizer states, and gathers a layer when its turn comes. Weights are gathered in float32 and autocast rounds
them as it does elsewhere. accelerate's own choice for bf16, to gather and to ADD UP gradients in bf16, halves
the traffic but is another training than one process does.

A checkpoint can be continued by another number of processes, as nothing in it depends on that number but
the random streams of dropout, which then begin anew. From DDP to FSDP, or back, it cannot.

Left out: FSDP over a quantized base, DeepSpeed, tensor and pipeline parallelism; models of this size need
none of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from edgedisp.train.transformers_trainer import Trainer, TrainingArguments

TIME_LIMIT = timedelta(hours=6)
"""How long a process waits for another in one operation. A slow disk or a sleeping laptop must not end a run,
and a process that dies is noticed by the launcher, not by this."""


@dataclass(frozen=True)
class Sharding:
    """FSDP, as in a recipe's `train.distributed`.

    `reshard`: give gathered weights back between forward and backward pass; `wrap`: classes of the modules
    that are gathered at a time, None for the decoder layers; `cpu_offload`: the parts lie in host memory.
    """

    reshard: bool = True
    wrap: Sequence[str] | None = None
    cpu_offload: bool = False


@dataclass(frozen=True)
class Share:
    """What one of `count` processes takes of a step: `accumulate` micro-batches of `batch` sequences."""

    count: int
    batch: int
    accumulate: int
    sharding: Sharding | None = None

    @property
    def held(self) -> str:
        """Who holds the weights, in words; a checkpoint of one kind is none of the other."""
        return "whole" if self.sharding is None or self.count == 1 else "divided (FSDP)"

    def arguments(self) -> dict[str, Any]:
        """What TrainingArguments must be told."""
        told: dict[str, Any] = {
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulate,
        }
        if self.count == 1:
            return told
        told["log_level_replica"] = "error"  # the others say nothing that the first would not say
        told["ddp_find_unused_parameters"] = False  # all are used; looking for them costs time in each step
        if self.sharding is not None:
            config: dict[str, Any] = {
                "version": 2,
                "reshard_after_forward": self.sharding.reshard,
                "cpu_offload": self.sharding.cpu_offload,
                "state_dict_type": "SHARDED_STATE_DICT",  # each process writes its part of a checkpoint
            }
            if self.sharding.wrap is not None:
                config["transformer_layer_cls_to_wrap"] = list(self.sharding.wrap)
            told |= {"fsdp": True, "fsdp_config": config}
        return told


def join(share: Share) -> None:
    """Meet the other processes, once in this process's life; does nothing for one process.

    Raises ValueError if a launcher started another number of them.
    """
    if share.count > 1 and not torch.distributed.is_initialized():
        # On GPUs torch then makes NCCL for them and gloo beside it, which offloading needs.
        torch.distributed.init_process_group(
            None if torch.cuda.is_available() else "gloo", timeout=TIME_LIMIT
        )
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() != share.count:
        raise ValueError(
            f"the training was divided for {share.count} processes, {torch.distributed.get_world_size()} run"
        )


def meet() -> None:
    """Wait until every process is here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def leave() -> None:
    """Part from the other processes. A second `join` in this process would find the first one's addresses."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leads() -> bool:
    """Whether this is the process that writes."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def gather_in_float32(args: TrainingArguments) -> None:
    """See the module; the policy has no place among the Trainer's own options."""
    if args.fsdp_plugin_args is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        args.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()


def check_divided(trainer: Trainer, share: Share) -> None:
    """Raise ValueError if FSDP was asked for and accelerate passed it over, as it does silently on CPUs."""
    if share.count > 1 and share.sharding is not None and not trainer.is_fsdp_enabled:
        raise ValueError("accelerate does not divide a model among processes on this kind of device (FSDP)")


@contextmanager
def quiet_sharding() -> Iterator[None]:
    """Without FSDP's warning that a module returns a view, whose change in place would go unnoticed.

    The fused head hands on a view, and nothing changes it in place.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        yield


def whole_weights(trainer: Trainer) -> dict[str, Tensor] | None:
    """The state of a model that FSDP has divided, on the CPU, empty but in the leading process; else None.

    Every process has to call it.
    """
    if not trainer.is_fsdp_enabled:
        return None
    model: Any = trainer.model
    found: dict[str, Tensor] = trainer.accelerator.get_state_dict(model)
    return found
