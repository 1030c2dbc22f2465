"""`TorchModel`: a torch causal language model as the plain callable that every scorer takes; its parameters.

Batches are padded on the RIGHT. Causal attention never looks right, and positions count real tokens, so a
padded row has the logits of the row alone; logits at padded positions are meaningless.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgedisp.core.errors import BadInput

# As the configurations of the families name it.
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
# BLOOM and MPT have no table of positions (ALiBi) and so no limit; they were trained with this many.
CONTEXT_WITHOUT_LIMIT = 2048
# Parts of module names, as the families write them: self_attn, attn, attention, self_attention; mlp,
# feed_forward, and OPT's bare fc1 and fc2.
COMPONENTS = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "experts", "moe", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"),
}
NORM = ("norm", "ln_", "layernorm")


class TorchModel:
    """`model(ids, mask) -> logits` and greedy decoding, on whatever device the model is.

    threads: CPU threads during a call, None leaves torch's setting. The model is set to eval mode.
    """

    parallel = 1
    """Calls of `logits` at once: torch shares its threads out itself."""

    def __init__(self, model: Any, threads: int | None = None) -> None:
        self.model = model.eval()
        self.threads = threads
        self.context = context_length(self.model.config)
        self.vocab_size = int(self.model.get_output_embeddings().weight.shape[0])
        self._accepts = frozenset(inspect.signature(self.model.forward).parameters)
        # transformers 5.24 gives the cache of keys and values another name.
        self._cache = "cache" if "cache" in self._accepts else "past_key_values"

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids, mask int64 [batch, tokens], mask 1 real and 0 padding -> float32 [batch, tokens, vocab]."""
        with self._running() as device:
            options = {"attention_mask": torch.as_tensor(mask, dtype=torch.int64, device=device)}
            if "position_ids" in self._accepts:
                options["position_ids"] = (options["attention_mask"].cumsum(1) - 1).clamp(min=0)
            rows = torch.as_tensor(ids, dtype=torch.int64, device=device)
            logits = self.model(input_ids=rows, use_cache=False, **options).logits.float().cpu()
        return np.asarray(logits)

    def logits(self, ids: NDArray[np.int64], last: int) -> NDArray[np.float32]:
        """ids int64 [tokens] -> logits float32 [last, vocab] at its `last` positions."""
        with self._running() as device:
            row = torch.as_tensor(ids, dtype=torch.int64, device=device)[None]
            logits = self.model(input_ids=row, use_cache=False, **self._keep(last)).logits[0, -last:]
            return np.asarray(logits.float().cpu())

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        """The new tokens, most likely one by one, with the model's own cache of keys and values.

        Ends after `max_new_tokens`, after a stop token (which is the last of the answer), or when the context
        is full. Raises BadInput for an empty prompt or one that is longer than the context.
        """
        if not ids or len(ids) > self.context:
            raise BadInput(f"a prompt needs 1 to {self.context} tokens (the context), found {len(ids)}.")
        new: list[int] = []
        cache: Any = None
        with self._running() as device:
            while len(new) < min(max_new_tokens, self.context - len(ids)):
                # A family without such a cache (Mamba) reads the whole text again.
                step = new[-1:] if cache is not None else [*ids, *new]
                row = torch.tensor([step], dtype=torch.int64, device=device)
                mask = torch.ones(1, len(ids) + len(new), dtype=torch.int64, device=device)
                cached = {self._cache: cache, "use_cache": True} if cache is not None or not new else {}
                out = self.model(input_ids=row, attention_mask=mask, **cached, **self._keep(1))
                cache = getattr(out, "past_key_values", None)
                new.append(int(out.logits[0, -1].argmax()))
                if new[-1] in stop_ids:
                    break
        return new

    def _keep(self, last: int) -> dict[str, int]:
        return {"logits_to_keep": last} if "logits_to_keep" in self._accepts else {}

    @contextmanager
    def _running(self) -> Iterator[torch.device]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            with torch.inference_mode():
                yield next(self.model.parameters()).device
        finally:
            torch.set_num_threads(before)


def context_length(config: Any) -> int:
    """Most tokens in one sequence, from a model's configuration; 2048 where the family has no limit."""
    inner = config.get_text_config()
    for name in CONTEXT_FIELDS:
        value = getattr(inner, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return CONTEXT_WITHOUT_LIMIT


def count_parameters(model: nn.Module) -> dict[str, Any]:
    """Parameter counts, shared ones once: embedding, attention, mlp, norm, head, other, total; and `tied`.

    Small models carry a large part of their weights in the embedding (SmolLM2-135M 21 %, Gemma-3-270M 63 %).
    tied: the head's matrix is the embedding's, so `head` counts a bias at most.
    """
    transformer: Any = model
    embedding, head = transformer.get_input_embeddings(), transformer.get_output_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    counts = dict.fromkeys(("embedding", "attention", "mlp", "norm", "head", "other"), 0)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():  # yields a shared parameter once
        owner = name.rpartition(".")[0]
        is_head = head is not None and modules[owner] is head and not (tied and parameter is head.weight)
        counts["head" if is_head else component_of(owner, modules[owner])] += parameter.numel()
    return {**counts, "total": sum(counts.values()), "tied": tied}


def component_of(name: str, module: nn.Module) -> str:
    """embedding, attention, mlp, norm or other, for the module `name`."""
    kind, last = type(module).__name__.lower(), name.rpartition(".")[2].lower()
    if "norm" in kind or any(word in last for word in NORM):
        return "norm"
    if "embedding" in kind:
        return "embedding"
    for part in reversed(name.lower().split(".")):  # the innermost name decides: `attention.mlp` is an mlp
        for component, words in COMPONENTS.items():
            if any(word in part for word in words):
                return component
    return "other"
