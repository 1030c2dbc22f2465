"""Cross-entropy straight from hidden states, so that the logits of a batch never exist as a whole.

The logits of 4 x 1,024 tokens over a vocabulary of 152,000 are 2.5 GB in float32. Here a few hundred rows at
a time are multiplied with the head, their loss and gradient are taken at once, and the rows are dropped, as
Liger and Unsloth do. The arithmetic is that of `ForCausalLMLoss`: products in the autocast type; log-softmax,
loss and the head's gradient in float32. torch's own `linear_cross_entropy` (2.13) returns the loss in the
type of its inputs (11.06 for 11.02 in bf16) and takes 5 to 12 times as long on a CPU.

`chunked_head` puts it into a causal language model for training passes: the head returns its input and the
model's loss function does the rest, so wrappers keep working. `outputs.logits` are then the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from edgedisp.train.packed_dataset import IGNORED

CHUNK_BYTES = 1 << 28
"""Float32 logits in memory at a time: 1,365 tokens of a vocabulary of 49,152. Each chunk costs one more pass
over the head's gradient."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies divided by `items`, with its gradients taken in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, items: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if dtype == torch.float16:
            raise ValueError(
                "the chunked cross-entropy takes its gradients before the loss scale; use bfloat16"
            )
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        with torch.autocast(device, enabled=False):
            inputs, head = hidden.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            d_inputs = torch.empty_like(inputs) if needs_hidden else None
            d_head = torch.empty_like(weight, dtype=torch.float32) if needs_weight else None
            chunks = list(_chunks(len(hidden), len(weight)))
            buffers = _Buffers(chunks[0].stop if chunks else 0, head, needs_weight)
            for rows in chunks:
                logits = buffers.product(inputs[rows], head)
                loss, d_logits = _loss_and_gradient(logits, labels[rows], items)
                total += loss
                d_logits = buffers.rounded(d_logits)
                if d_inputs is not None:
                    torch.mm(d_logits, head, out=d_inputs[rows])
                if d_head is not None:
                    buffers.add_product(d_head, d_logits, inputs[rows], first=rows.start == 0)
            if d_head is not None and not chunks:
                d_head.zero_()
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


def _chunks(rows: int, classes: int) -> Iterator[slice]:
    """Even slices of `rows` whose logits stay below CHUNK_BYTES."""
    most = max(1, CHUNK_BYTES // (4 * classes))
    size = -(-rows // -(-rows // most)) if rows else 1
    for start in range(0, rows, size):
        yield slice(start, start + size)


class _Buffers:
    """Memory for one chunk after another: on a CPU, fresh memory costs more than the arithmetic."""

    def __init__(self, rows: int, head: Tensor, needs_head: bool) -> None:
        is_exact = head.dtype == torch.float32
        self.logits = head.new_empty((rows, len(head)), dtype=torch.float32)
        self.low = None if is_exact else torch.empty_like(self.logits, dtype=head.dtype)
        self.d_head = torch.empty_like(head) if needs_head and not is_exact else None

    def product(self, inputs: Tensor, head: Tensor) -> Tensor:
        """`inputs head^T` as float32."""
        logits = self.logits[: len(inputs)]
        if self.low is None:
            return torch.mm(inputs, head.T, out=logits)
        return logits.copy_(torch.mm(inputs, head.T, out=self.low[: len(inputs)]))

    def rounded(self, d_logits: Tensor) -> Tensor:
        """In the type of the products."""
        return d_logits if self.low is None else self.low[: len(d_logits)].copy_(d_logits)

    def add_product(self, total: Tensor, d_logits: Tensor, inputs: Tensor, *, first: bool) -> None:
        """`total += d_logits^T inputs`, in float32 over the chunks; the first one is written, not added."""
        if self.d_head is None:
            torch.addmm(total, d_logits.T, inputs, beta=0 if first else 1, out=total)
            return
        product = torch.mm(d_logits.T, inputs, out=self.d_head)
        total.copy_(product) if first else total.add_(product)


def _loss_and_gradient(logits: Tensor, labels: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the rows' losses, gradient of the logits for `sum / items`, in their memory), both float32."""
    counted = labels != IGNORED
    targets = torch.where(counted, labels, 0).unsqueeze(1)
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    loss = torch.where(counted, (normaliser - logits.gather(1, targets)).squeeze(1), 0.0).sum()
    d_logits = logits.sub_(normaliser).exp_()  # the probabilities, less 1 at the target
    d_logits.scatter_add_(1, targets, torch.full_like(targets, -1.0, dtype=torch.float32))
    return loss, d_logits.mul_((counted / items).unsqueeze(1))


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """`cross_entropy(hidden @ weight.T, labels)` without the logits; scalar float32.

    Args:
        hidden: `(tokens, features)`, float32 or bfloat16; products are in its type, or autocast's.
        weight: `(classes, features)`.
        labels: `(tokens,)` int64, already shifted; -100 takes no part.
        num_items_in_batch: the sum is divided by it; None divides by the number of labels that count.

    `backward` can run once and not be differentiated again. Raises ValueError for float16, whose small
    gradients would vanish.
    """
    if num_items_in_batch is None:
        items = (labels != IGNORED).sum()
    else:
        items = torch.as_tensor(num_items_in_batch, device=hidden.device)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, labels, items.float())
    return loss


def unsupported(model: nn.Module) -> str | None:
    """Why `chunked_head` does not suit a model (no plain head, changed logits), or None if it does."""
    inner = _causal_model(model)
    if inner is None:
        return "it has no output head"
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, no plain linear map"
    if head.bias is not None:
        return "its head has a bias"
    if inner.loss_function is not ForCausalLMLoss:
        return "its loss is not the usual one of causal language models"
    return None if _logits_are_the_heads(inner, head) else "it changes its logits before the loss"


@contextmanager
def chunked_head(model: nn.Module) -> Iterator[None]:
    """Inside the block, training passes of `model` compute their loss without logits.

    model: a transformers causal language model, bare or wrapped by peft, not yet by data parallelism.
    Raises ValueError if it is `unsupported`.
    """
    reason = unsupported(model)
    inner = _causal_model(model)
    if reason is not None or inner is None:
        raise ValueError(f"the chunked cross-entropy does not suit this model: {reason}")
    head: Any = inner.get_output_embeddings()
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
        return chunked_cross_entropy(hidden, head.weight, targets, options.get("num_items_in_batch"))

    with _attribute(head, "forward", forward), _attribute(inner, "_loss_function", loss):
        yield


@contextmanager
def _attribute(owner: Any, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """An attribute of the instance inside the block; as it was afterwards."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        vars(owner).update(before)


def _causal_model(model: nn.Module) -> PreTrainedModel | None:
    """The model with the head, inside whatever wraps it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    return None


def _logits_are_the_heads(model: PreTrainedModel, head: nn.Linear) -> bool:
    """Whether a small forward pass gives just what its head gives: no soft cap, no scale, no second head."""
    outputs: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    modes = [(module, module.training) for module in model.modules()]
    ids = torch.arange(2, 10, device=head.weight.device)[None] % len(head.weight)
    try:
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    return (
        len(outputs) == 1 and outputs[0].shape == logits.shape and torch.equal(outputs[0].to(logits), logits)
    )
