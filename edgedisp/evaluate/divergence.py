"""KL(reference || model) of two models' next-token distributions, in nats, and their top tokens.

Logits are added block by block and one number per token is stored: a file of logits would take 10 GB for a
usual text. KL in the other direction is not measured: it blows up where the model is sure and wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedisp.core.errors import BuildFailed
from edgedisp.core.results import Divergence

_CELLS = 4_000_000  # positions x vocabulary reduced at a time: 32 MB as float64


class DivergenceMeter:
    """Adds up blocks of logits. max_abs_difference: the largest of a logit."""

    def __init__(self) -> None:
        self.max_abs_difference = 0.0
        self._kl: list[float] = []
        self._top1 = 0
        self._top5 = 0.0

    def add(self, reference: NDArray[np.floating[Any]], logits: NDArray[np.floating[Any]]) -> None:
        """Add the positions of a block: logits [..., vocab] of both models.

        Raises ValueError when the shapes differ, BuildFailed when a logit is NaN or infinite.
        """
        if reference.shape != logits.shape:
            raise ValueError(f"logits of shape {reference.shape} and {logits.shape} cannot be compared")
        for name, part in (("reference", reference), ("other", logits)):
            if not np.isfinite(part).all():
                raise BuildFailed(f"divergence: the {name} model gave logits that are not finite")
        vocab = logits.shape[-1]
        step, k = max(1, _CELLS // vocab), min(5, vocab)
        both = reference.reshape(-1, vocab), logits.reshape(-1, vocab)
        for start in range(0, len(both[0]), step):
            first, second = (part[start : start + step].astype(np.float64) for part in both)
            self.max_abs_difference = max(self.max_abs_difference, float(np.abs(first - second).max()))
            self._top1 += int((first.argmax(axis=-1) == second.argmax(axis=-1)).sum())
            tops = [np.argpartition(part, -k, axis=-1)[:, -k:] for part in (first, second)]
            self._top5 += float((tops[0][:, :, None] == tops[1][:, None, :]).any(axis=-1).mean(axis=-1).sum())
            log_p, log_q = log_softmax(first), log_softmax(second)
            kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
            self._kl += np.maximum(kl, 0.0).tolist()  # equal rows can be at -1e-17

    def result(self) -> Divergence:
        """The figures over all tokens. Raises ValueError when nothing was added."""
        if not (n := len(self._kl)):
            raise ValueError("no logits were added")
        median, p90, p99, most = np.quantile(self._kl, [0.5, 0.9, 0.99, 1.0]).tolist()
        mean = float(np.mean(self._kl))
        return Divergence(n, mean, median, p90, p99, most, self._top1 / n, self._top5 / n)


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
