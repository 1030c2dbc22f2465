"""A dispersion term for any transformers Trainer: `DispersionMixin`, and `DispersionTrainer` made of it.

    trainer = DispersionTrainer(model, args, train_dataset=data, dispersion=DispersionConfig(weight=0.1))
    class DispersionSFT(DispersionMixin, SFTTrainer): ...  # TRL's; the mixin comes first

The loss is `Trainer's loss + weight * dispersion`, from hooks in the same forward pass. `cross_entropy` and
`dispersion` are logged with `loss`. Evaluation is untouched. Losses of several forward passes with gradients
are not supported.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import get_last_checkpoint

from edgedisp.core.errors import NotFinite
from edgedisp.dispersion.hooks import DispersionLoss
from edgedisp.dispersion.losses import DispersionConfig

if TYPE_CHECKING:
    Host = Trainer
else:
    Host = object


class DispersionMixin(Host):
    """Adds a dispersion term to a Trainer class; it comes first among the bases.

    dispersion: the term, or None for the Trainer's loss alone (then logged as `cross_entropy` too).

    The term of a micro-batch is weighted by its sequences among those of the step, so n micro-batches are one
    big batch for both terms. The sample of tokens depends on the number of each sequence, which follows from
    step, micro-batch and process: resumed and data-parallel runs sample alike.

    `train` raises NotFinite for a loss or gradient that is not finite, before the optimizer step that it
    would spoil. Raises ValueError for more than one GPU in one process (`torch.nn.DataParallel`).
    """

    def __init__(self, *args: Any, dispersion: DispersionConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if dispersion is not None and self.args.n_gpu > 1:
            raise ValueError(
                f"dispersion does not work under torch.nn.DataParallel ({self.args.n_gpu} GPUs in one "
                "process); start one process per GPU with torchrun, or show one GPU with CUDA_VISIBLE_DEVICES"
            )
        model: Any = self.model
        inner = getattr(model, "get_base_model", lambda: model)()
        # A class without a loss type (GPT-2) has the shifted loss too, but is counted as if it had not.
        if isinstance(inner, PreTrainedModel) and inner.loss_type is None:
            self._loss_shifts_labels = True
        self.dispersion = dispersion
        self.dispersion_loss = None if dispersion is None else DispersionLoss(dispersion)
        self._sequences: list[int] = []  # of each micro-batch of the optimizer step
        self._micro_batch = 0
        self._reset_sums()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Called by `train`, again if training begins anew with a smaller batch."""
        self._reset_sums()
        if self.dispersion_loss is None:
            return super()._inner_training_loop(*args, **kwargs)
        model: Any = self.model
        with self.dispersion_loss.watch(model):
            if self.args.torch_compile:
                torch._dynamo.reset()  # code that was compiled before the hooks does not run them
            return super()._inner_training_loop(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches:
            self._micro_batch, self._sequences = 0, [find_batch_size(batch) for batch in batches]
            self._steps += 1
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        mask = inputs.pop("dispersion_mask", None)  # beside attention_mask, which packed rows must not have
        if not (model.training and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.dispersion_loss is not None:
            self.dispersion_loss.next_sequence, self.dispersion_loss.mask = self._first_sequence(), mask
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = self._with_term(loss, num_items_in_batch)
        self._micro_batch += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._steps:
            means = [float(self._cross_entropy) / self._steps]
            if self.dispersion is not None:
                means.append(float(self._dispersion) / self._steps)
            self._reset_sums()
            if self.args.world_size > 1:
                gathered: Any = self.accelerator.gather(torch.tensor([means], device=self.args.device))
                means = gathered.mean(dim=0).tolist()
            logs.update(zip(("cross_entropy", "dispersion"), means))
        super().log(logs, *args, **kwargs)

    def _reset_sums(self) -> None:
        """Of the steps since the last log; tensors, so that no micro-batch waits for the device."""
        self._steps = 0
        self._cross_entropy = self._dispersion = torch.zeros(())

    def _with_term(self, host_loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """`host_loss + weight * dispersion`, each as the Trainer expects a micro-batch's part of the step."""
        divided_later = 1 if self._is_share(num_items_in_batch) else self.current_gradient_accumulation_steps
        self._cross_entropy = self._cross_entropy + host_loss.detach() / divided_later
        if self.dispersion is None or self.dispersion_loss is None:
            return host_loss
        term, share = self.dispersion_loss.loss(), 1.0
        if self._micro_batch < len(self._sequences):  # else outside of the training loop
            share = self._sequences[self._micro_batch] / sum(self._sequences)
        self._dispersion = self._dispersion + share * term.detach()
        return host_loss + self.dispersion.weight * divided_later * share * term

    def _is_share(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether a micro-batch's loss is already its share of the step's mean, as in `training_step`."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        is_by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return is_by_model or self.compute_loss_func is not None

    def _first_sequence(self) -> int:
        """Number of this micro-batch's first sequence among all that training sees."""
        batch = self._train_batch_size  # the state's is that of the processes which wrote a checkpoint
        micro_batches = self.state.global_step * self.args.gradient_accumulation_steps + self._micro_batch
        return (micro_batches * self.args.world_size + self.args.process_index) * batch

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer calls this between the backward pass and the optimizer step."""
        norm = super()._get_grad_norm(*args, **kwargs)
        problems = []
        if not math.isfinite(cross_entropy := float(self._cross_entropy)):
            problems.append(f"cross-entropy is {cross_entropy}")
        if self.dispersion_loss is not None and not math.isfinite(dispersion := float(self._dispersion)):
            layers = self.dispersion_loss.by_layer()
            bad = [str(layer) for layer, value in layers.items() if not math.isfinite(value)]
            where = f" at layer {', '.join(bad)} (of {len(layers)} watched)" if bad else ""
            problems.append(f"the dispersion loss is {dispersion}{where}")
        # Under fp16 an infinite gradient is the scaler's business: it skips the step and scales less.
        has_scaler = getattr(self.accelerator, "scaler", None) is not None
        if not problems and not has_scaler and not math.isfinite(float(norm)):
            problems.append(f"the norm of the gradient is {float(norm)}")
        if problems:
            folder = Path(self.args.output_dir or "")
            last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
            resume = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
            raise NotFinite(
                f"training stopped in step {self.state.global_step + 1}: {' and '.join(problems)}. No weight "
                f"was changed by it; {resume}. A lower learning rate, a longer warm-up or fp32 may hold it."
            )
        return norm


class DispersionTrainer(DispersionMixin, Trainer):
    """The transformers `Trainer` with a dispersion term; see `DispersionMixin`."""
