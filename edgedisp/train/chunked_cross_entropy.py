"""Cross-entropy straight from hidden states, so that the logits of a batch never exist as a whole.

The logits of 4 x 1,024 tokens over a vocabulary of 152,000 are 2.5 GB in float32. Here a few hundred rows at
a time are multiplied with the head, their loss and gradient are taken at once, and the rows are dropped, as
Liger and Unsloth do. The arithmetic is that of `ForCausalLMLoss`: products in the autocast type; log-softmax,
loss and the head's gradient in float32. torch's own `linear_cross_entropy` (2.13) returns the loss in the
type of its inputs (11.06 for 11.02 in bf16) and takes 5 to 12 times as long on a CPU.

`chunked_head` puts it into an ordinary causal language model and takes it out again. Inside, and in training
passes alone, the head returns its input and the model's loss function does the rest, so wrappers of peft and
data parallelism keep working. Beware: `outputs.logits` are then the hidden states.
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

CHUNK_BYTES = 1 << 28
"""Float32 logits in memory at a time: 1,365 tokens of a vocabulary of 49,152. Each chunk costs one more pass
over the head's gradient."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies divided by `items`, with its gradients taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        items: Tensor,
        ignored: int,
    ) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if dtype == torch.float16:
            raise ValueError(
                "the chunked cross-entropy takes its gradients before the loss scale; use bfloat16"
            )
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        with torch.autocast(device, enabled=False):
            inputs, head = hidden.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            d_inputs = torch.empty_like(inputs) if wants_hidden else None
            d_head = torch.empty_like(weight, dtype=torch.float32) if wants_weight else None
            d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants_bias else None
            chunks = list(_chunks(len(hidden), len(weight)))
            buffers = _Buffers(chunks[0].stop if chunks else 0, head, wants_weight)
            for rows in chunks:
                logits = buffers.product(inputs[rows], head)
                if bias is not None:
                    logits += bias
                loss, d_logits = _loss_and_gradient(logits, labels[rows], items, ignored)
                total += loss
                if d_bias is not None:
                    d_bias += d_logits.sum(dim=0)
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
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
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
        return (*gradients, None, None, None)


def _chunks(rows: int, classes: int) -> Iterator[slice]:
    """Even slices of `rows` whose logits stay below CHUNK_BYTES."""
    most = max(1, CHUNK_BYTES // (4 * classes))
    size = -(-rows // -(-rows // most)) if rows else 1
    for start in range(0, rows, size):
        yield slice(start, start + size)


class _Buffers:
    """Memory for one chunk after another: on a CPU, fresh memory costs more than the arithmetic."""

    def __init__(self, rows: int, head: Tensor, wants_head: bool) -> None:
        is_exact = head.dtype == torch.float32
        self.logits = head.new_empty((rows, len(head)), dtype=torch.float32)
        self.low = None if is_exact else torch.empty_like(self.logits, dtype=head.dtype)
        self.d_head = torch.empty_like(head) if wants_head and not is_exact else None

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
        if first:
            total.copy_(product)
        else:
            total.add_(product)


def _loss_and_gradient(logits: Tensor, labels: Tensor, items: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """(sum of the rows' losses, gradient of the logits for `sum / items`, in their memory), both float32."""
    counted = labels != ignored
    targets = torch.where(counted, labels, 0).unsqueeze(1)
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    loss = torch.where(counted, (normaliser - logits.gather(1, targets)).squeeze(1), 0.0).sum()
    d_logits = logits.sub_(normaliser).exp_()  # the probabilities, less 1 at the target
    d_logits.scatter_add_(1, targets, torch.full_like(targets, -1.0, dtype=torch.float32))
    return loss, d_logits.mul_((counted / items).unsqueeze(1))


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, labels)` without the logits; scalar float32.

    Args:
        hidden: `(tokens, features)`, float32 or bfloat16; products are in its type, or autocast's.
        weight: `(classes, features)`, bias: `(classes,)`.
        labels: `(tokens,)` int64, already shifted; `ignore_index` takes no part.
        num_items_in_batch: the sum is divided by it; None divides by the number of labels that count.

    The gradients are taken in the forward pass, so `backward` can run once and not be differentiated again.
    Raises ValueError for float16, whose small gradients would vanish.
    """
    if num_items_in_batch is None:
        items = (labels != ignore_index).sum()
    else:
        items = torch.as_tensor(num_items_in_batch, device=hidden.device)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, labels, items.float(), ignore_index)
    return loss


def unsupported(model: nn.Module) -> str | None:
    """Why `chunked_head` does not suit a model (no plain head, changed logits), or None if it does."""
    inner = _causal_model(model)
    if inner is None:
        return "it has no output head"
    head = inner.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__name__}, no plain linear map"
    if inner.loss_function is not ForCausalLMLoss:
        return "its loss is not the usual one of causal language models"
    return None if _logits_are_the_heads(inner, head) else "it changes its logits before the loss"


@contextmanager
def chunked_head(model: nn.Module) -> Iterator[None]:
    """Inside the block, training passes of `model` compute their loss without logits; see the module.

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

    def forward(hidden: Tensor) -> Tensor:
        output: Tensor = hidden if is_training() else plain_forward(hidden)
        return output

    def loss(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        if not is_training():
            return plain_loss(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **others
            )
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return chunked_cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            head.weight,
            shift_labels.reshape(-1).to(logits.device),
            bias=head.bias,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
        )

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
