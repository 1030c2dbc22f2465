"""`TorchModel`: a torch causal language model as the plain callable that every scorer takes; its parameters.

Batches are padded on the RIGHT. Causal attention never looks right, and positions count real tokens, so a
padded row has the logits of the row alone; logits at padded positions are meaningless.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgedisp.core.errors import BadInput
from edgedisp.core.greedy_decoding import GreedyDecoding, greedy_batch
from edgedisp.core.progress import Progress, silent

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


class TorchModel(GreedyDecoding):
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
            logits = self.model(input_ids=row, use_cache=False, **self.keep(last)).logits[0, -last:]
            return np.asarray(logits.float().cpu())

    def greedy_batch(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop_ids: frozenset[int],
        progress: Progress = silent,
    ) -> list[list[int]]:
        for ids in prompts:
            if not ids or len(ids) > self.context:
                raise BadInput(f"a prompt needs 1 to {self.context} tokens (the context), found {len(ids)}.")
        limits = [min(max_new_tokens, self.context - len(ids)) for ids in prompts]
        with self._running():
            size = cache_bytes(self.model.config)
            return greedy_batch(lambda most: _Reader(self), prompts, limits, stop_ids, size, progress)

    def keep(self, last: int) -> dict[str, int]:
        """What makes `forward` give the logits of the `last` positions alone, where it can."""
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


class _Reader:
    """Reads with the model's own cache of keys and values; a family without one reads all of it again."""

    def __init__(self, scored: TorchModel) -> None:
        self.scored, self.model = scored, scored.model
        accepts = inspect.signature(self.model.forward).parameters
        # transformers 5.24 gives the cache another name.
        self.name = next((name for name in ("cache", "past_key_values") if name in accepts), None)
        self.cache: Any = None
        self.ids = torch.empty(1, 0, dtype=torch.int64, device=next(self.model.parameters()).device)

    def read(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        new = torch.as_tensor(ids, device=self.ids.device)
        layers = getattr(self.cache, "layers", [])
        # Mamba's convolution forgets what it has read where several tokens follow at once.
        if new.shape[1] > 1 and any(hasattr(layer, "conv_states") for layer in layers):
            self.read(ids[:, :-1])
            new = new[:, -1:]
        self.ids = torch.cat([self.ids, new], dim=1)
        cached = {self.name: self.cache, "use_cache": True} if self.name else {}
        step = self.ids if self.cache is None else new
        out = self.model(input_ids=step, **cached, **self.scored.keep(1))
        self.cache = getattr(out, self.name, None) if self.name else None
        return np.asarray(out.logits[:, -1].argmax(dim=-1).cpu())

    def select(self, sequences: NDArray[np.int64]) -> None:
        places = torch.as_tensor(sequences, device=self.ids.device)
        self.ids = self.ids[places]
        if self.cache is not None:
            self.cache.reorder_cache(places)


def cache_bytes(config: Any) -> int:
    """Bytes of the fp32 keys and values of one token in a model of this configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 4 * int(config.num_hidden_layers * heads * width)


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
