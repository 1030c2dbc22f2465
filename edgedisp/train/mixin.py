"""A dispersion term for any transformers Trainer: `DispersionMixin`, and `DispersionTrainer` made of it.

    trainer = DispersionTrainer(model, args, train_dataset=data, dispersion=DispersionConfig(weight=0.1))
    trainer.train()

    class DispersionSFT(DispersionMixin, SFTTrainer): ...  # TRL's; the mixin comes first

The loss is `cross-entropy + weight * dispersion`. What the host class computes is left as it is, whatever
that is; the term comes from hooks in the same forward pass, so nothing is computed twice. Logged beside
`loss` (their sum): `cross_entropy`, `dispersion` and, if there were any, `skipped_sequences`, the number of
sequences so far in this training that had fewer than two tokens to compare. Evaluation is untouched.

Gradient accumulation. Where the Trainer does not divide a micro-batch's loss by the number of micro-batches,
because the model took `num_items_in_batch` and its cross-entropy is a share of the step's mean already, the
term is made such a share here: weighted by its sequences among those of the step, over all processes. So n
micro-batches are one big batch for both terms, also when the last one is smaller.

Random numbers. Which tokens the term draws depends on the number of each sequence among all that training
sees. It follows from step, micro-batch and process alone, so that a resumed run and data-parallel processes
draw as one unbroken process does.

A loss that is not finite stops training before the optimizer step that it would spoil (`NotFinite`). On a
CPU every micro-batch is looked at; elsewhere the device is asked once per optimizer step, as the Trainer
itself does per micro-batch unless `logging_nan_inf_filter` is off.

Left out: `torch.nn.DataParallel` (hooks see one replica alone; use torchrun), and loss functions that run
several forward passes with gradients: the term is that of the last one.
"""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgedisp.core.errors import BuildFailed
from edgedisp.dispersion.config import DispersionConfig
from edgedisp.dispersion.hooks import DispersionLoss
from edgedisp.train.transformers_trainer import Trainer, TrainerCallback, get_last_checkpoint
from edgedisp.train.watch import Watch

if TYPE_CHECKING:
    Host = Trainer
else:
    Host = object


class NotFinite(BuildFailed):
    """Training met a loss or gradient that is NaN or infinite: says where, and what can be resumed."""


class DispersionMixin(Host):
    """Adds a dispersion term to a Trainer class; see the module docstring. It comes first among the bases.

    Args (beside the host's):
        dispersion: the term, or None for the host's loss alone (which is then logged as `cross_entropy` too).
        watch: looks at the condensation as training goes on; see `edgedisp.train.watch.Watch`.

    Raises ValueError for more than one GPU in one process. `train` raises NotFinite.
    """

    def __init__(
        self,
        *args: Any,
        dispersion: DispersionConfig | None = None,
        watch: Watch | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if dispersion is not None and self.args.n_gpu > 1:
            raise ValueError(
                f"dispersion does not work under torch.nn.DataParallel ({self.args.n_gpu} GPUs in one "
                "process); start one process per GPU with torchrun, or show one GPU with CUDA_VISIBLE_DEVICES"
            )
        self.dispersion = dispersion
        self.collector = None if dispersion is None else DispersionLoss(dispersion)
        self.watch = watch
        self._hooks = ExitStack()
        self._micro_batch = 0  # within the optimizer step
        self._shares: list[Tensor | float] = []  # of the step's sequences, by micro-batch
        self._sums = _Sums()
        self._is_finite: Tensor | None = None  # of the losses of this step, where asking costs a wait
        self._grad_norm: Any = None
        self._takes_use_cache = "use_cache" in inspect.signature(_innermost(self.model).forward).parameters
        self.add_callback(_Moments(self))
        if watch is not None:
            self.add_callback(watch)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._hooks:
            return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches:
            self._micro_batch, self._shares = 0, self._shares_of(batches)
            self._sums.steps += 1
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._takes_use_cache:
            inputs = {**inputs, "use_cache": False}  # a cache would copy all keys and values for nothing
        if self.collector is not None:
            self.collector.begin(_mask(inputs), self._first_sequence())
        computed: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = computed[0] if return_outputs else computed
        loss = self._with_term(loss, num_items_in_batch)
        self._micro_batch += 1
        return (loss, *computed[1:]) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums.steps:
            logs.update(self._logged_parts())
            if self.watch is not None:
                logs.update(self.watch.to_log(self.state.global_step))
        super().log(logs, *args, **kwargs)

    def last_checkpoint(self) -> Path | None:
        """The checkpoint that training can be resumed from, for the message when it has to stop."""
        folder = self.args.output_dir
        found = get_last_checkpoint(folder) if folder and Path(folder).is_dir() else None
        return None if found is None else Path(found)

    def _with_term(self, host_loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """`host_loss + weight * dispersion`, each as the Trainer expects a micro-batch's part of the step."""
        divided_later = 1 if self._is_share(num_items_in_batch) else self.current_gradient_accumulation_steps
        loss, term = host_loss, None
        if self.dispersion is not None and self.collector is not None:
            term = self.collector.loss()
            share = self._share()
            self._sums.dispersion = self._sums.dispersion + share * term.detach()
            loss = host_loss + self.dispersion.weight * divided_later * share * term
        self._sums.cross_entropy = self._sums.cross_entropy + host_loss.detach() / divided_later
        finite = torch.isfinite(loss.detach())
        if finite.device.type != "cpu":
            self._is_finite = finite if self._is_finite is None else self._is_finite & finite
        elif not finite:
            self._stop(host_loss, term)
        return loss

    def _is_share(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the host's loss of a micro-batch is a share of the step's mean, as `training_step` asks."""
        told: bool | None = self.loss_is_scaled_for_ga
        if told is not None:
            return told
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model) or self.compute_loss_func is not None

    def _share(self) -> Tensor | float:
        """What this micro-batch's mean counts in the step's; 1 outside of the training loop."""
        return self._shares[self._micro_batch] if self._micro_batch < len(self._shares) else 1.0

    def _shares_of(self, batches: list[dict[str, Any]]) -> list[Tensor | float]:
        """Sequences of each micro-batch that count in the term, as shares of the step's.

        Gradients are averaged over processes, so the whole is the mean of the processes' counts.
        """
        if self.collector is None:
            return []
        counts = [_sequences(batch, self.collector) for batch in batches]
        whole: Any = sum(counts)
        if self.args.world_size > 1:
            gathered: Any = self.accelerator.gather(torch.as_tensor(whole, device=self.args.device))
            whole = gathered.float().mean()
        if isinstance(whole, Tensor):
            return [count / torch.where(whole > 0, whole, 1) for count in counts]
        return [count / max(whole, 1) for count in counts]

    def _first_sequence(self) -> int:
        """Number of this micro-batch's first sequence among all that training sees."""
        batch = self._train_batch_size  # the state's is that of the processes which wrote a checkpoint
        done = self.state.global_step * self.args.gradient_accumulation_steps + self._micro_batch
        return (done * self.args.world_size + self.args.process_index) * batch

    def _logged_parts(self) -> dict[str, float]:
        """Means over the optimizer steps since the last log, over all processes."""
        sums, self._sums = self._sums, _Sums()
        skipped = 0 if self.collector is None else self.collector.skipped_sequences
        parts = [float(sums.cross_entropy) / sums.steps, float(sums.dispersion) / sums.steps, float(skipped)]
        if self.args.world_size > 1:
            device = self.args.device
            gathered: Any = self.accelerator.gather(torch.tensor([parts], device=device))
            parts = [*gathered[:, :2].mean(dim=0).tolist(), float(gathered[:, 2].sum())]
        logged = {"cross_entropy": parts[0]}
        if self.collector is not None:
            logged["dispersion"] = parts[1]
        if parts[2]:
            logged["skipped_sequences"] = int(parts[2])
        return logged

    # Called by the moments of the training loop.

    def _training_begins(self) -> None:
        self._hooks.close()  # a loop that was begun anew with a smaller batch (auto_find_batch_size)
        if self.dispersion is not None:
            model: Any = self.model
            self.collector = DispersionLoss(self.dispersion)  # what it counts is counted by training
            self._hooks.enter_context(self.collector.watch(model))
            if self.args.torch_compile:
                torch._dynamo.reset()  # it does not notice new hooks: code from before the watch has none
        self._sums, self._is_finite = _Sums(), None

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, seen here before the optimizer step that a NaN in it would spoil."""
        self._grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self._grad_norm

    def _before_the_optimizer_step(self) -> None:
        finite, self._is_finite = self._is_finite, None
        if finite is not None and not finite:
            self._stop(None, None)
        # Under fp16 an infinite gradient is the scaler's business: it skips the step and scales less.
        if self._grad_norm is not None and getattr(self.accelerator, "scaler", None) is None:
            norm, self._grad_norm = float(self._grad_norm), None
            if not math.isfinite(norm):
                raise self._not_finite(f"the norm of the gradient is {norm}")

    def _stop(self, host_loss: Tensor | None, term: Tensor | None) -> None:
        """Raise NotFinite, naming what is at fault in the pass just made, as far as that is known."""
        found = []
        if host_loss is not None and not torch.isfinite(host_loss):
            found.append(f"cross-entropy is {float(host_loss.detach())}")
        layers = {} if self.collector is None else self.collector.by_layer()
        bad = [layer for layer, value in layers.items() if not math.isfinite(value)]
        if bad:
            named = "layer " + str(bad[0]) if len(bad) == 1 else f"layers {', '.join(map(str, bad))}"
            found.append(f"the dispersion loss is {layers[bad[0]]} at {named} (of {len(layers)} watched)")
        elif term is not None and not torch.isfinite(term):
            found.append(f"the dispersion loss is {float(term.detach())}")
        raise self._not_finite(" and ".join(found) or "the loss of one of its micro-batches is not finite")

    def _not_finite(self, what: str) -> NotFinite:
        last = self.last_checkpoint()
        kept = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        return NotFinite(
            f"training stopped in step {self.state.global_step + 1}: {what}. No weight was changed by it; "
            f"{kept}. A lower learning rate, a longer warm-up or fp32 may hold it."
        )


class DispersionTrainer(DispersionMixin, Trainer):
    """The transformers `Trainer` with a dispersion term; see `DispersionMixin` for its arguments."""


class _Moments(TrainerCallback):
    """Calls the trainer at the moments of its loop that only callbacks see."""

    def __init__(self, trainer: DispersionMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._training_begins()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._before_the_optimizer_step()


class _Sums:
    """What was added up since the last log; tensors, so that no step waits for the device."""

    def __init__(self) -> None:
        self.steps = 0
        self.cross_entropy: Tensor | float = 0.0
        self.dispersion: Tensor | float = 0.0


def _mask(inputs: dict[str, Any]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _sequences(batch: dict[str, Any], collector: DispersionLoss) -> Tensor | int:
    """How many sequences of a batch count in the term; a scalar tensor if there is a mask."""
    mask = _mask(batch)
    if mask is not None:
        return collector.sequences(mask)
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() > 1:
            return int(collector.sequences(torch.ones(value.shape[:2], dtype=torch.bool)))
    return 1


def _innermost(model: Any) -> Any:
    """The model inside a peft wrapper, whose own signature tells nothing."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
