"""A dispersion term for any transformers Trainer: `DispersionMixin`, and `DispersionTrainer` made of it.

    trainer = DispersionTrainer(model, args, train_dataset=data, dispersion=DispersionConfig(weight=0.1))
    class DispersionSFT(DispersionMixin, SFTTrainer): ...  # TRL's; the mixin comes first

The loss is `Trainer's loss + weight * dispersion`, from hooks in the same forward pass. Logged with `loss`:
`cross_entropy`, `dispersion`, and `skipped_sequences`, those with fewer than two tokens to compare.
Evaluation is untouched. Losses of several forward passes with gradients are not supported.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from edgedisp.core.errors import BuildFailed
from edgedisp.dispersion.condensation import quick_condensation
from edgedisp.dispersion.hooks import DispersionLoss
from edgedisp.dispersion.losses import DispersionConfig

if TYPE_CHECKING:
    Host = Trainer
else:
    Host = object


class NotFinite(BuildFailed):
    """A loss or gradient is NaN or infinite: says where, and what can be resumed."""


@dataclass
class _Sums:
    """Since the last log; tensors, so that no step waits for the device."""

    steps: int = 0
    cross_entropy: Tensor | float = 0.0
    dispersion: Tensor | float = 0.0


class DispersionMixin(Host):
    """Adds a dispersion term to a Trainer class; it comes first among the bases.

    Args (in addition to the Trainer's):
        dispersion: the term, or None for the Trainer's loss alone (then logged as `cross_entropy` too).
        watch: measures the condensation as training goes on.

    The term of a micro-batch is weighted by its sequences among those of the step, over all processes, so n
    micro-batches are one big batch for both terms. The sample of tokens depends on the number of each
    sequence, which follows from step, micro-batch and process: resumed and data-parallel runs sample alike.

    `train` raises NotFinite for a loss or gradient that is not finite, before the optimizer step that it
    would spoil. Raises ValueError for more than one GPU in one process (`torch.nn.DataParallel`).
    """

    def __init__(
        self,
        *args: Any,
        dispersion: DispersionConfig | None = None,
        watch: CondensationWatch | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if dispersion is not None and self.args.n_gpu > 1:
            raise ValueError(
                f"dispersion does not work under torch.nn.DataParallel ({self.args.n_gpu} GPUs in one "
                "process); start one process per GPU with torchrun, or show one GPU with CUDA_VISIBLE_DEVICES"
            )
        self.dispersion = dispersion
        self.dispersion_loss = None if dispersion is None else DispersionLoss(dispersion)
        self.watch = watch
        self._hooks = ExitStack()
        self._micro_batch, self._shares = 0, list[Tensor | float]()  # of the optimizer step and its sequences
        self._sums, self._skipped = _Sums(), 0  # sequences that were skipped, at the last log
        self._is_finite: Tensor | None = None  # all losses of the step, on devices that are slow to ask
        self.add_callback(_OnTrainBegin(self))
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
        if self.dispersion_loss is not None:
            self.dispersion_loss.begin(_mask(inputs), self._first_sequence())
        computed: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, *outputs = computed if return_outputs else (computed,)
        loss = self._with_term(loss, num_items_in_batch)
        self._micro_batch += 1
        return (loss, *outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums.steps:
            logs.update(self._logged_parts())
            if self.watch is not None:
                logs.update(self.watch.to_log(self.state.global_step))
        super().log(logs, *args, **kwargs)

    def begin_watching(self) -> None:
        """Called when training begins, and again if it begins anew with a smaller batch."""
        self._hooks.close()
        if self.dispersion is not None:
            model: Any = self.model
            self.dispersion_loss = DispersionLoss(self.dispersion)
            self._hooks.enter_context(self.dispersion_loss.watch(model))
            if self.args.torch_compile:
                torch._dynamo.reset()  # code that was compiled before the hooks does not run them
        self._sums, self._skipped, self._is_finite = _Sums(), 0, None

    def _with_term(self, host_loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """`host_loss + weight * dispersion`, each as the Trainer expects a micro-batch's part of the step."""
        divided_later = 1 if self._is_share(num_items_in_batch) else self.current_gradient_accumulation_steps
        loss, term = host_loss, None
        if self.dispersion is not None and self.dispersion_loss is not None:
            term = self.dispersion_loss.loss()
            # 1 outside of the training loop
            share = self._shares[self._micro_batch] if self._micro_batch < len(self._shares) else 1.0
            self._sums.dispersion = self._sums.dispersion + share * term.detach()
            loss = host_loss + self.dispersion.weight * divided_later * share * term
        self._sums.cross_entropy = self._sums.cross_entropy + host_loss.detach() / divided_later
        finite = torch.isfinite(loss.detach())
        if finite.device.type != "cpu":
            self._is_finite = finite if self._is_finite is None else self._is_finite & finite
        elif not finite:
            raise self._not_finite(self._cause(host_loss, term))
        return loss

    def _is_share(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether a micro-batch's loss is already its share of the step's mean, as in `training_step`."""
        if self.loss_is_scaled_for_ga is not None:
            return bool(self.loss_is_scaled_for_ga)
        is_by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return is_by_model or self.compute_loss_func is not None

    def _shares_of(self, batches: list[dict[str, Any]]) -> list[Tensor | float]:
        """Sequences of each micro-batch that count in the term, as shares of the step's.

        Gradients are averaged over processes, so the whole is the mean of the processes' counts.
        """
        if self.dispersion_loss is None:
            return []
        counts = [_sequences(batch, self.dispersion_loss) for batch in batches]
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
        micro_batches = self.state.global_step * self.args.gradient_accumulation_steps + self._micro_batch
        return (micro_batches * self.args.world_size + self.args.process_index) * batch

    def _logged_parts(self) -> dict[str, float]:
        """Means over the optimizer steps since the last log, over all processes."""
        sums, self._sums = self._sums, _Sums()
        skipped = 0 if self.dispersion_loss is None else self.dispersion_loss.skipped_sequences
        means = [float(sums.cross_entropy) / sums.steps, float(sums.dispersion) / sums.steps]
        parts = [*means, float(skipped - self._skipped)]
        self._skipped = skipped
        if self.args.world_size > 1:
            device = self.args.device
            gathered: Any = self.accelerator.gather(torch.tensor([parts], device=device))
            parts = [*gathered[:, :2].mean(dim=0).tolist(), float(gathered[:, 2].sum())]
        logged = {"cross_entropy": parts[0]}
        if self.dispersion_loss is not None:
            logged["dispersion"] = parts[1]
        if parts[2]:
            logged["skipped_sequences"] = int(parts[2])
        return logged

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer calls this between the backward pass and the optimizer step."""
        norm = super()._get_grad_norm(*args, **kwargs)
        finite, self._is_finite = self._is_finite, None
        if finite is not None and not finite:
            cause = self._cause(None, None)
            raise self._not_finite(cause or "the loss of one of its micro-batches is not finite")
        # Under fp16 an infinite gradient is the scaler's business: it skips the step and scales less.
        if getattr(self.accelerator, "scaler", None) is None and not math.isfinite(float(norm)):
            raise self._not_finite(f"the norm of the gradient is {float(norm)}")
        return norm

    def _cause(self, host_loss: Tensor | None, term: Tensor | None) -> str:
        """What is not finite in the last forward pass, as far as that is known."""
        causes = []
        if host_loss is not None and not torch.isfinite(host_loss):
            causes.append(f"cross-entropy is {float(host_loss.detach())}")
        layers = {} if self.dispersion_loss is None else self.dispersion_loss.by_layer()
        bad = [layer for layer, value in layers.items() if not math.isfinite(value)]
        if bad:
            names = f"layer{'s' * (len(bad) > 1)} {', '.join(map(str, bad))}"
            causes.append(f"the dispersion loss is {layers[bad[0]]} at {names} (of {len(layers)} watched)")
        elif term is not None and not torch.isfinite(term):
            causes.append(f"the dispersion loss is {float(term.detach())}")
        return " and ".join(causes)

    def _not_finite(self, what: str) -> NotFinite:
        folder = self.args.output_dir
        last = get_last_checkpoint(folder) if folder and Path(folder).is_dir() else None
        resume = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        return NotFinite(
            f"training stopped in step {self.state.global_step + 1}: {what}. No weight was changed by it; "
            f"{resume}. A lower learning rate, a longer warm-up or fp32 may hold it."
        )


class DispersionTrainer(DispersionMixin, Trainer):
    """The transformers `Trainer` with a dispersion term; see `DispersionMixin` for its arguments."""


class _OnTrainBegin(TrainerCallback):
    def __init__(self, trainer: DispersionMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_watching()


def _mask(inputs: dict[str, Any]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _sequences(batch: dict[str, Any], term: DispersionLoss) -> Tensor | int:
    """How many sequences of a batch count in the term; a scalar tensor if there is a mask."""
    if (mask := _mask(batch)) is not None:
        return term.sequences(mask)
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim() > 1:
            return int(term.sequences(torch.ones(value.shape[:2], dtype=torch.bool)))
    return 1


class CondensationWatch(TrainerCallback):
    """Measures `quick_condensation` before the first step, every `every` optimizer steps and after the last.

    It runs in evaluation mode and without gradients, on random streams that are restored afterwards: the
    weights of a run are bit-identical with and without it. Raises ValueError for `every` below 1.

    blocks: `(sequences, tokens)` int64. `rows` collects `{"step", "cosine_by_layer", "seconds"}`; step 0 is
    the model before training.
    """

    def __init__(self, blocks: Tensor, every: int) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it has to be at least 1 step")
        self.blocks, self.every = blocks, every
        self.rows: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and not self.rows:
            self._measure(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(kwargs["model"], state.global_step)
            control.should_log = True

    def to_log(self, step: int) -> dict[str, float]:
        """The cosines of this step as flat numbers for a log, empty if there are none."""
        if not self.rows or self.rows[-1]["step"] != step:
            return {}
        values = self.rows[-1]["cosine_by_layer"]
        mean = {"cosine_by_layer/mean": sum(values) / len(values)}
        return {f"cosine_by_layer/{layer:02d}": value for layer, value in enumerate(values)} | mean

    def _measure(self, model: nn.Module, step: int) -> None:
        started = time.perf_counter()
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            cosines = quick_condensation(
                model.eval(), self.blocks
            )  # the Trainer calls `train()` at each step
        seconds = time.perf_counter() - started
        self.rows.append({"step": step, "cosine_by_layer": cosines, "seconds": seconds})
