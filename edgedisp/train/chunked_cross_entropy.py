"""Cross-entropy straight from hidden states, so that the logits of a batch never exist as a whole.

The logits of 4 x 1,024 tokens over a vocabulary of 152,000 are 2.5 GB in float32. Here a few hundred rows at
a time are multiplied with the head, their loss and gradient are taken at once, and the rows are dropped. The
arithmetic is that of `ForCausalLMLoss`: products in the autocast type, all else in float32. torch's own
`linear_cross_entropy` (2.13) rounds the loss to bf16 and takes 5 to 12 times as long on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

CHUNK_BYTES = 1 << 28  # of float32 logits at a time; each chunk costs a pass over the head's gradient
IGNORED = -100  # the label that takes no part


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies divided by `items`, with its gradients taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, items: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if dtype == torch.float16:
            raise ValueError("the chunked cross-entropy takes gradients before the loss scale; use bfloat16")
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        with torch.autocast(device, enabled=False):
            inputs, head = hidden.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            d_inputs = torch.empty_like(inputs) if needs_hidden else None
            d_head = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            # One chunk after another uses this memory: on a CPU, fresh memory costs more than the arithmetic.
            most = max(1, CHUNK_BYTES // (4 * len(head)))
            size = math.ceil(len(inputs) / math.ceil(len(inputs) / most))  # of even chunks
            logits = head.new_empty((size, len(head)), dtype=torch.float32)
            # Inputs of the products; in float32 the logits themselves, so that the copies do nothing.
            rounded = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
            d_head_part = torch.empty_like(head)
            for start in range(0, len(inputs), size):
                rows = slice(start, start + size)
                x = inputs[rows]
                part, rounded_part = logits[: len(x)], rounded[: len(x)]
                part.copy_(torch.mm(x, head.T, out=rounded_part))
                total += _loss_and_gradient(part, labels[rows], items)
                rounded_part.copy_(part)
                if d_inputs is not None:
                    torch.mm(rounded_part, head, out=d_inputs[rows])
                if d_head is not None:
                    d_head += torch.mm(rounded_part.T, x, out=d_head_part)
        ctx.gradients = (
            None if d_inputs is None else d_inputs.to(hidden.dtype),
            None if d_head is None else d_head.to(weight.dtype),
        )
        return total / items

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the chunked cross-entropy keeps no graph: backward can run once")
        gradients, ctx.gradients = ctx.gradients, None
        (factor,) = upstream
        if factor.device.type != "cpu" or factor != 1:  # asking a GPU would make the host wait for it
            gradients = tuple(None if gradient is None else gradient.mul_(factor) for gradient in gradients)
        return (*gradients, None, None)


def _loss_and_gradient(logits: Tensor, labels: Tensor, items: Tensor) -> Tensor:
    """Sum of the rows' losses; replaces the logits by the gradient of `sum / items`."""
    counted = labels != IGNORED
    targets = torch.where(counted, labels, 0).unsqueeze(1)
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    loss = torch.where(counted, (normaliser - logits.gather(1, targets)).squeeze(1), 0.0).sum()
    logits.sub_(normaliser).exp_()  # the probabilities, less 1 at the target
    logits.scatter_add_(1, targets, torch.full_like(targets, -1.0, dtype=torch.float32))
    logits.mul_((counted / items).unsqueeze(1))
    return loss


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """`cross_entropy(hidden @ weight.T, labels)` without the logits; scalar float32.

    hidden: `(tokens, features)`, float32 or bfloat16; products are in its type, or autocast's. weight:
    `(classes, features)`. labels: `(tokens,)` int64, already shifted; -100 takes no part. The sum is divided
    by `num_items_in_batch`; None divides by the number of labels that count.

    `backward` can run once and not be differentiated again. Raises ValueError for float16, whose small
    gradients would vanish.
    """
    items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    items = torch.as_tensor(items, device=hidden.device).float()
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, items)
    return loss


@contextmanager
def chunked_head(model: nn.Module, targets_alone: bool = False) -> Iterator[bool]:
    """Inside the block, training passes of `model` compute their loss without logits, if it suits the model.

    The head returns its input, so `outputs.logits` are the hidden states, and the model's loss function does
    the rest. Yields False, and changes nothing, for a model without a plain head, with changed logits or
    another loss. targets_alone: only states with a label that counts meet the head. model: a causal language
    model, bare or wrapped by peft, not yet by data parallelism.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    inner: Any = next((module for module in models if module.get_output_embeddings() is not None), None)
    if inner is None or not _is_suitable(inner):
        yield False
        return
    head = inner.get_output_embeddings()
    plain_forward, plain_loss = head.forward, inner.loss_function

    def is_training() -> bool:
        return bool(head.training) and torch.is_grad_enabled()

    def forward(hidden: Tensor) -> Any:
        return hidden if is_training() else plain_forward(hidden)

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **options: Any) -> Any:
        if not is_training():
            return plain_loss(logits, labels, vocab_size, **options)
        targets = options.get("shift_labels")
        if targets is None:
            targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
        hidden, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).to(logits.device)
        if targets_alone:
            counted = (targets != IGNORED).nonzero().squeeze(1)
            hidden, targets = hidden.index_select(0, counted), targets.index_select(0, counted)
        return chunked_cross_entropy(hidden, head.weight, targets, options.get("num_items_in_batch"))

    head.forward, inner.loss_function = forward, loss
    try:
        yield True
    finally:
        head.forward, inner.loss_function = plain_forward, plain_loss


@torch.no_grad()
def _is_suitable(model: PreTrainedModel) -> bool:
    """Whether the head is plain and a small forward pass gives just what it gives: no cap, no scale."""
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or model.loss_function is not ForCausalLMLoss:
        return False
    outputs: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    was_training = model.training
    ids = torch.arange(2, 10, device=head.weight.device)[None] % len(head.weight)
    try:
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
        model.train(was_training)
    is_whole = len(outputs) == 1 and outputs[0].shape == logits.shape
    return is_whole and torch.equal(outputs[0].to(logits), logits)
