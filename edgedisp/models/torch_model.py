"""`TorchModel`: a torch causal language model as the plain callable that every scorer takes.

Batches are padded on the RIGHT. Causal attention never looks right, and positions count real tokens, so a
padded row has the logits of the row alone; what stands at padded places is meaningless and must be ignored.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgedisp.core.errors import BadInput

# As the configurations of the families name it.
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
# BLOOM and MPT have no table of positions (ALiBi) and so no limit; they were trained with this many.
CONTEXT_WITHOUT_LIMIT = 2048


class TorchModel:
    """`model(ids, mask) -> logits` and greedy decoding, on whatever device the model is.

    threads: CPU threads while a call runs, None leaves torch's setting. The setting is put back after each
    call. The model is set to eval mode.
    """

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
            ids_here = torch.as_tensor(ids, dtype=torch.int64, device=device)
            mask_here = torch.as_tensor(mask, dtype=torch.int64, device=device)
            extra = {}
            if "position_ids" in self._accepts:
                extra["position_ids"] = (mask_here.cumsum(1) - 1).clamp(min=0)
            logits = self.model(input_ids=ids_here, attention_mask=mask_here, use_cache=False, **extra).logits
            found: NDArray[np.float32] = logits.float().cpu().numpy()
        return found

    @property
    def packs(self) -> bool:
        """Yes: in floating point a token's logits do not depend on what else is computed."""
        return True

    @property
    def lanes(self) -> int:
        """One: torch shares its threads out itself."""
        return 1

    @cached_property
    def tree_nodes(self) -> int:
        """Most nodes in a tree of tokens; 0 where the family does not read one, which a small one shows."""
        branches = np.array([[0, 1, 2], [0, 2, 1]])
        ids, depths, ends = np.array([0, 1, 2, 2, 1]), np.array([0, 1, 2, 1, 2]), np.array([5, 3, 3, 5, 5])
        if "position_ids" not in self._accepts or self.vocab_size < 3 or self._windows is None:
            return 0
        if getattr(self.model.config, "attention_types", None) is not None:
            return 0  # GPT-Neo masks by places in the row, farther apart than is tried here
        try:
            found = self.tree(ids, depths, ends, np.array([1, 2, 3, 4]))
        except (TypeError, ValueError, RuntimeError, IndexError):
            return 0
        plain = self(branches, np.ones_like(branches))[:, 1:].reshape(found.shape)
        return self.context if np.allclose(found, plain, rtol=1e-3, atol=1e-3) else 0

    def tree(
        self,
        ids: NDArray[np.int64],
        depths: NDArray[np.int64],
        ends: NDArray[np.int64],
        wanted: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Logits float32 [wanted, vocab] of some nodes of a tree of tokens; ids, depths, ends int64 [nodes].

        Node i sees node j where j <= i < ends[j] (evaluate/forest.py).
        """
        with self._running() as device:
            parts = (ids, np.arange(len(ids)), depths, ends, wanted)
            tokens, at, deep, end, asked = (torch.from_numpy(part).to(device) for part in parts)
            seen = (at <= at[:, None]) & (at[:, None] < end)
            masks = {
                kind: self._additive(seen if window is None else seen & (deep[:, None] - deep < window))
                for kind, window in (self._windows or {}).items()
            }
            kept: dict[str, Any] = {}
            if "logits_to_keep" in self._accepts:
                kept["logits_to_keep"] = asked
            logits = self.model(
                input_ids=tokens[None],
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=deep[None],
                use_cache=False,
                **kept,
            ).logits[0]
            chosen = logits if kept else logits[asked]
            found: NDArray[np.float32] = chosen.float().cpu().numpy()
        return found

    @cached_property
    def _windows(self) -> dict[str, int | None] | None:
        """Kind of layer -> how far back it sees, None for all the way; None for kinds that are not known."""
        config = self.model.config.get_text_config()
        near = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if not kinds:
            return {"full_attention": near}
        known: dict[str, int | None] = {"full_attention": None, "sliding_attention": near}
        return {kind: known[kind] for kind in sorted(set(kinds))} if set(kinds) <= set(known) else None

    def _additive(self, seen: torch.Tensor) -> torch.Tensor:
        """bool [nodes, nodes] -> what is added to the scores, [1, 1, nodes, nodes]."""
        kind = next(self.model.parameters()).dtype
        mask = torch.zeros(seen.shape, dtype=kind, device=seen.device)
        return mask.masked_fill(~seen, torch.finfo(kind).min)[None, None]

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        """The new tokens, most likely one by one, with the model's own cache of keys and values.

        Ends after `max_new_tokens`, after a stop token (which is the last of the answer), or when the context
        is full. Raises BadInput for an empty prompt or one that is longer than the context.
        """
        if not ids or len(ids) > self.context:
            raise BadInput(f"a prompt needs 1 to {self.context} tokens (the context), found {len(ids)}.")
        last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self._accepts else {}
        found: list[int] = []
        cache: Any = None
        with self._running() as device:
            step = torch.tensor([ids], dtype=torch.int64, device=device)
            while len(found) < min(max_new_tokens, self.context - len(ids)):
                seen = len(ids) + len(found)
                mask = torch.ones(1, seen, dtype=torch.int64, device=device)
                cached = {self._cache: cache, "use_cache": True} if cache is not None or not found else {}
                out = self.model(input_ids=step, attention_mask=mask, **cached, **last_only)
                cache = getattr(out, "past_key_values", None)
                token = int(out.logits[0, -1].argmax())
                found.append(token)
                if token in stop_ids:
                    break
                # A family without such a cache (Mamba) is given the whole text again.
                rest = [token] if cache is not None else [*ids, *found]
                step = torch.tensor([rest], dtype=torch.int64, device=device)
        return found

    @contextmanager
    def _running(self) -> Iterator[torch.device]:
        before = torch.get_num_threads()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                yield next(self.model.parameters()).device
        finally:
            if self.threads is not None:
                torch.set_num_threads(before)


def context_length(config: Any) -> int:
    """Most tokens in one sequence, from a model's configuration; 2048 where the family has no limit."""
    inner = config.get_text_config()
    for name in CONTEXT_FIELDS:
        value = getattr(inner, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return CONTEXT_WITHOUT_LIMIT
