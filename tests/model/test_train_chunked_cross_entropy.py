"""The chunked cross-entropy: loss and gradients are the plain road's, the logits never exist as a whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training import open_tiny

from edgedisp.train import chunked_cross_entropy as module
from edgedisp.train.chunked_cross_entropy import chunked_cross_entropy, chunked_head

ARCHITECTURES = ["llama", "gemma3_text", "gpt2", "opt"]


def ids_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 400, (3, 11), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 4:7] = -100
    labels[2] = -100
    return ids, labels


def loss_and_gradients(model: Any, precision: str, **inputs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    model.zero_grad()
    model.train()
    torch.manual_seed(0)  # GPT-2 has dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("items", [None, torch.tensor(40)], ids=["mean", "share"])
def test_loss_and_gradients_are_those_of_the_plain_road(
    tiny_folder: dict[str, Path], architecture: str, precision: str, items: torch.Tensor | None
) -> None:
    ids, labels = ids_and_labels()
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if items is not None:
        inputs["num_items_in_batch"] = items
    model = open_tiny(tiny_folder[architecture])
    plain, expected = loss_and_gradients(model, precision, **inputs)
    with chunked_head(model) as is_chunked:
        fused, gradients = loss_and_gradients(model, precision, **inputs)
    assert is_chunked and fused.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)
    rounding = 1e-5 if precision == "fp32" else 2e-2
    for name, gradient in gradients.items():
        if name.endswith("k_proj.bias"):  # shifts all scores of a query alike: zero, but for rounding
            continue
        off = (gradient - expected[name]).norm() / expected[name].norm()
        assert off < rounding, (name, off)


@pytest.mark.parametrize("items", [None, 17])
def test_chunks_add_up_to_the_formula_in_float64(monkeypatch: pytest.MonkeyPatch, items: int | None) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 7 * 4 * 50)  # at most 7 of 30 rows of a vocabulary of 50
    stream = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(30, 8, generator=stream), torch.randn(50, 8, generator=stream)
    labels = torch.randint(0, 50, (30,), generator=stream)
    labels[::4] = -100
    inputs = [value.clone().requires_grad_() for value in (hidden, weight)]
    loss = 3 * chunked_cross_entropy(*inputs, labels, items)
    loss.backward()
    exact = [value.detach().double().requires_grad_() for value in inputs]
    logits = F.linear(*exact)
    total = F.cross_entropy(logits, labels, reduction="sum")
    expected = 3 * total / (items or int((labels != -100).sum()))
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for value, double in zip(inputs, exact):
        torch.testing.assert_close(value.grad.double(), double.grad, rtol=1e-5, atol=1e-6)


class Rows(TorchDispatchMode):
    """Notes how many rows the tensors have that are made inside and are `width` wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.seen = width, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.width:
                self.seen.add(math.prod(tensor.shape[:-1]))
        return out


def test_no_more_logits_exist_than_one_chunk(
    tiny_folder: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_tiny(tiny_folder["llama"])
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * vocabulary)
    ids, labels = ids_and_labels()
    transposed = {model.config.hidden_size}  # the head's weight
    with Rows(vocabulary) as plain:
        loss_and_gradients(model, "fp32", input_ids=ids, labels=labels)
    assert ids.numel() in plain.seen - transposed
    with chunked_head(model), Rows(vocabulary) as fused:
        loss_and_gradients(model, "fp32", input_ids=ids, labels=labels)
    assert max(fused.seen - transposed) == 5


def test_a_model_whose_loss_needs_logits_keeps_them(tiny_folder: dict[str, Path]) -> None:
    from peft import LoraConfig, get_peft_model

    capped = open_tiny(tiny_folder["gemma3_text"], final_logit_softcapping=30.0)
    adapter = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    adapted = get_peft_model(open_tiny(tiny_folder["llama"], tie_word_embeddings=False), adapter)
    biased = open_tiny(tiny_folder["llama"], tie_word_embeddings=False)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(biased.config.vocab_size))
    other_loss = open_tiny(tiny_folder["llama"])
    other_loss.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    for model in (capped, adapted, biased, other_loss, torch.nn.Linear(2, 2)):
        with chunked_head(model) as is_chunked:
            assert not is_chunked


def test_a_second_backward_and_float16_are_refused() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(10, 8)
    labels = torch.arange(4)
    loss = chunked_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward can run once"):
        loss.backward()
    with pytest.raises(ValueError, match="use bfloat16"):
        chunked_cross_entropy(hidden.half(), weight.half(), labels)
