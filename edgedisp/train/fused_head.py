"""Cross-entropy straight from hidden states, so that the logits of a batch never exist as a whole.

The logits of 4 x 1,024 tokens over a vocabulary of 152,000 are 2.5 GB in float32, and the plain road holds
several of that size: the product, its float32 copy, the log-probabilities, their gradient. Here a few hundred
rows at a time are multiplied with the head, their loss and their gradient are taken at once, and the rows are
dropped. What stays is the gradient of the hidden states and of the head. That is what Liger, Unsloth and
torch's own `linear_cross_entropy` do; the arithmetic is that of `ForCausalLMLoss`: products in the autocast
type, log-softmax, loss and the head's gradient in float32, loss and gradients equal to the plain road's.

`fused_head` puts it into an ordinary causal language model and takes it out again. Inside, and in training
passes alone, the head hands its input on and the model's loss function does the rest; the call still goes
through the model, so wrappers of peft and data parallelism do not notice. Beware: `outputs.logits` are then
the hidden states.

Why not `torch.nn.functional.linear_cross_entropy` (torch 2.13): it gives the loss in the type of its inputs,
so under bf16 autocast a loss of 11.02 comes back as 11.06 or worse, and on a CPU its own choice of settings
took 5 to 12 times as long as the plain road (1,024 tokens, 49,152 x 576: 4.4 s in fp32, 6.8 s in bf16,
against 0.8 and 0.5 s).

Left out: Triton kernels (they need a GPU), heads that are adapted or quantized, and logits that the model
changes before the loss, such as Gemma 2's soft cap. `why_not_fused` says which; the plain road serves them.
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
"""Float32 logits held at a time, 256 MB: 1,365 tokens of a vocabulary of 49,152, 441 of one of 152,000. Fewer
would save memory that is small beside a model's, and each chunk costs one more pass over the head's gradient
(49,152 x 576 on one core: 0.06 s, against 0.06 s for all products of 128 tokens and 0.9 s for 1,024)."""


class _FusedCrossEntropy(torch.autograd.Function):
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
                "the fused cross-entropy takes its gradients before the loss scale; use bfloat16"
            )
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        with torch.autocast(device, enabled=False):
            inputs, head = hidden.to(dtype), weight.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            d_inputs = torch.empty_like(inputs) if wants_hidden else None
            d_head = torch.empty_like(weight, dtype=torch.float32) if wants_weight else None
            d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants_bias else None
            chunks = list(_chunks(len(hidden), len(weight)))
            # Made once: on a CPU, fresh memory of this size costs more than what is computed in it.
            room = _Room(chunks[0].stop if chunks else 0, head, wants_weight)
            for rows in chunks:
                loss, d_logits = _one_chunk(inputs[rows], head, bias, labels[rows], items, ignored, room)
                total += loss
                if d_bias is not None:
                    d_bias += d_logits.sum(dim=0)
                d_logits = room.rounded(d_logits)
                if d_inputs is not None:
                    torch.mm(d_logits, head, out=d_inputs[rows])
                if d_head is not None:
                    room.add_product(d_head, d_logits, inputs[rows], first=rows.start == 0)
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
            raise RuntimeError("the fused cross-entropy keeps no graph: backward can run once")
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


class _Room:
    """Memory for one chunk after another: its logits, the same rounded, what it adds to the head."""

    def __init__(self, rows: int, head: Tensor, wants_head: bool) -> None:
        is_exact = head.dtype == torch.float32
        self.logits = head.new_empty((rows, len(head)), dtype=torch.float32)
        self.low = None if is_exact else torch.empty_like(self.logits, dtype=head.dtype)
        self.product = torch.empty_like(head) if wants_head and not is_exact else None

    def multiplied(self, inputs: Tensor, head: Tensor) -> Tensor:
        """`inputs head^T` as float32, in the room."""
        logits = self.logits[: len(inputs)]
        if self.low is None:
            return torch.mm(inputs, head.T, out=logits)
        return logits.copy_(torch.mm(inputs, head.T, out=self.low[: len(inputs)]))

    def rounded(self, d_logits: Tensor) -> Tensor:
        """In the type of the products."""
        return d_logits if self.low is None else self.low[: len(d_logits)].copy_(d_logits)

    def add_product(self, total: Tensor, d_logits: Tensor, inputs: Tensor, *, first: bool) -> None:
        """`total += d_logits^T inputs`, in float32 over the chunks; the first one is written, not added."""
        if self.product is None:
            torch.addmm(total, d_logits.T, inputs, beta=0 if first else 1, out=total)
            return
        product = torch.mm(d_logits.T, inputs, out=self.product)
        if first:
            total.copy_(product)
        else:
            total.add_(product)


def _one_chunk(
    inputs: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    items: Tensor,
    ignored: int,
    room: _Room,
) -> tuple[Tensor, Tensor]:
    """(sum of the rows' losses, gradient of their logits for `sum / items`), both float32."""
    logits = room.multiplied(inputs, head)
    if bias is not None:
        logits += bias
    counted = labels != ignored
    targets = torch.where(counted, labels, 0).unsqueeze(1)
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    loss = torch.where(counted, (normaliser - logits.gather(1, targets)).squeeze(1), 0.0).sum()
    d_logits = logits.sub_(normaliser).exp_()  # the probabilities, less 1 at the target
    d_logits.scatter_add_(1, targets, torch.full_like(targets, -1.0, dtype=torch.float32))
    return loss, d_logits.mul_((counted / items).unsqueeze(1))


def fused_cross_entropy(
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
    loss: Tensor = _FusedCrossEntropy.apply(hidden, weight, bias, labels, items.float(), ignore_index)
    return loss


def why_not_fused(model: nn.Module) -> str | None:
    """Why `fused_head` does not suit a model, or None if it does."""
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
def fused_head(model: nn.Module) -> Iterator[None]:
    """Inside the block, training passes of `model` compute their loss without logits; see the module.

    model: a transformers causal language model, bare or wrapped by peft, not yet by data parallelism.
    Raises ValueError if `why_not_fused` finds a reason.
    """
    reason = why_not_fused(model)
    inner = _causal_model(model)
    if reason is not None or inner is None:
        raise ValueError(f"the fused head does not suit this model: {reason}")
    head: Any = inner.get_output_embeddings()
    plain_forward, plain_loss = head.forward, inner.loss_function

    def is_fused() -> bool:
        return bool(head.training) and torch.is_grad_enabled()

    def forward(hidden: Tensor) -> Tensor:
        handed_on: Tensor = hidden if is_fused() else plain_forward(hidden)
        return handed_on

    def loss(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        if not is_fused():
            return plain_loss(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **others
            )
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return fused_cross_entropy(
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
    """An attribute of the instance inside the block, whatever its class says; as it was afterwards."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _causal_model(model: nn.Module) -> PreTrainedModel | None:
    """The model with the head, inside whatever wraps it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    return None


def _logits_are_the_heads(model: PreTrainedModel, head: nn.Linear) -> bool:
    """Whether a small forward pass gives just what its head gives: no soft cap, no scale, no second head."""
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output))
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
    return len(seen) == 1 and seen[0].shape == logits.shape and torch.equal(seen[0].to(logits), logits)
