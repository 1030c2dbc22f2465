"""How far one model's next-token distributions lie from another's, without writing the logits down.

Both models read the same tokens; their logits are handed in batch by batch and only one number per token is
kept: KL(reference || other) in nats. A file of logits would need tokens x vocabulary x 4 bytes (10 GB for
the usual perplexity text), which is why few people ever run this check.

A mean hides where it comes from. So the KL is also told by position (early tokens have little context, and
attention sinks stand there), and the tokens with the largest are kept with what both models would have said.

Everything is reduced in float64, a few positions at a time. Left out: KL in the other direction, which blows
up where the other model is sure and wrong and so says more about its tail than about what it will emit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedisp.core.errors import BuildFailed

_CELLS = 4_000_000  # positions x vocabulary reduced at a time: 32 MB as float64


WORST = 10  # tokens kept


@dataclass(frozen=True)
class Worst:
    """A place where the models differ most: the block and position that predict, and the tokens that the
    reference and the other model hold most likely there, with their probabilities."""

    kl: float
    block: int
    position: int
    reference_token: int
    reference_probability: float
    other_token: int
    other_probability: float


class Divergence:
    """Gathers batches with `add` and sums them up with `record`."""

    def __init__(self) -> None:
        self._kl: list[NDArray[np.float64]] = []
        self._positions: list[NDArray[np.int64]] = []
        self._blocks = 0
        self._worst: list[Worst] = []
        self._max_abs_difference = 0.0
        self._top1 = 0
        self._top5 = 0.0

    def add(
        self,
        reference: NDArray[np.floating[Any]],
        logits: NDArray[np.floating[Any]],
        mask: NDArray[np.integer[Any]] | None = None,
    ) -> None:
        """Add the positions of one batch: logits [..., tokens, vocab] of both, mask [..., tokens] (0 =
        padding, skipped). A batch is one or more blocks, numbered in the order of adding.

        Raises ValueError when the shapes differ, BuildFailed when a counted logit is NaN or infinite.
        """
        if reference.shape != logits.shape:
            raise ValueError(f"logits of shape {reference.shape} and {logits.shape} cannot be compared")
        if mask is not None and mask.shape != reference.shape[:-1]:
            raise ValueError(f"a mask of shape {mask.shape} does not fit logits of shape {reference.shape}")
        keep = slice(None) if mask is None else mask.reshape(-1).astype(bool)
        vocab = reference.shape[-1]
        tokens = reference.shape[-2] if reference.ndim > 1 else 1
        first, second = reference.reshape(-1, vocab)[keep], logits.reshape(-1, vocab)[keep]
        places = np.arange(reference.size // vocab)[keep]
        step = max(1, _CELLS // vocab)
        for start in range(0, len(first), step):
            part = slice(start, start + step)
            self._reduce(
                first[part], second[part], places[part] // tokens + self._blocks, places[part] % tokens
            )
        self._blocks += reference.size // vocab // tokens

    @property
    def kl(self) -> NDArray[np.float64]:
        """KL(reference || other) of every token added so far, in nats, in the order of adding."""
        return np.concatenate(self._kl) if self._kl else np.zeros(0)

    def by_position(self) -> list[dict[str, Any]]:
        """The mean KL over positions 0, 1, 2-3, 4-7 ...: [{start, end, tokens, mean_kl}], end excluded."""
        if not self._kl:
            return []
        kl, positions = self.kl, np.concatenate(self._positions)
        found, start, end = [], 0, 1
        while start <= positions.max():
            here = kl[(positions >= start) & (positions < end)]
            if len(here):
                told = {"start": start, "end": end, "tokens": len(here), "mean_kl": float(here.mean())}
                found.append(told)
            start, end = end, 2 * end
        return found

    def worst(self) -> list[dict[str, Any]]:
        """The places with the largest KL, the largest first: the fields of `Worst`."""
        return [asdict(one) for one in self._worst]

    def record(self) -> dict[str, Any]:
        """The sums: {tokens, max_abs_difference, mean_kl, median_kl, p90_kl, p99_kl, max_kl, ...}.

        max_abs_difference is of logits; KL is in nats; top1_agreement and top5_overlap are shares of 1. All
        but `tokens` are None when nothing was added.
        """
        kl = self.kl
        names = ("median_kl", "p90_kl", "p99_kl", "max_kl")
        if not len(kl):
            empty = ("max_abs_difference", "mean_kl", *names, "top1_agreement", "top5_overlap")
            return {"tokens": 0} | dict.fromkeys(empty)
        quantiles = np.quantile(kl, [0.5, 0.9, 0.99, 1.0]).tolist()
        return {
            "tokens": len(kl),
            "max_abs_difference": self._max_abs_difference,
            "mean_kl": float(kl.mean()),
            **dict(zip(names, quantiles)),
            "top1_agreement": self._top1 / len(kl),
            "top5_overlap": self._top5 / len(kl),
        }

    def _reduce(
        self,
        reference: NDArray[Any],
        logits: NDArray[Any],
        blocks: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> None:
        """Both [tokens, vocab]: everything about these tokens that is kept."""
        for name, part in (("reference", reference), ("other", logits)):
            if not np.isfinite(part).all():
                raise BuildFailed(
                    f"divergence: the {name} model gave logits that are not finite (NaN or infinity)"
                )
        first, second = reference.astype(np.float64), logits.astype(np.float64)
        self._max_abs_difference = max(self._max_abs_difference, float(np.abs(first - second).max()))
        tops = first.argmax(axis=-1), second.argmax(axis=-1)
        self._top1 += int((tops[0] == tops[1]).sum())
        self._top5 += float(_overlap(first, second, min(5, first.shape[-1])).sum())
        log_p, log_q = _log_softmax(first), _log_softmax(second)
        kl = np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), 0.0)  # equal rows can be at -1e-17
        self._kl.append(kl)
        self._positions.append(positions)
        for at in np.argsort(-kl)[:WORST].tolist():
            tokens = int(tops[0][at]), int(tops[1][at])
            sure = float(np.exp(log_p[at, tokens[0]])), float(np.exp(log_q[at, tokens[1]]))
            place = int(blocks[at]), int(positions[at])
            self._worst.append(Worst(float(kl[at]), *place, tokens[0], sure[0], tokens[1], sure[1]))
        self._worst = sorted(self._worst, key=lambda one: -one.kl)[:WORST]


def compare(
    reference: NDArray[np.floating[Any]],
    logits: NDArray[np.floating[Any]],
    mask: NDArray[np.integer[Any]] | None = None,
) -> dict[str, Any]:
    """The record of `Divergence` for logits that are already at hand: [..., vocab] twice, mask [...]."""
    divergence = Divergence()
    divergence.add(reference, logits, mask)
    return divergence.record()


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _overlap(first: NDArray[np.float64], second: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Share of the k most likely tokens that both models name, for each position: float64 [tokens]."""
    tops = [np.argpartition(part, -k, axis=-1)[:, -k:] for part in (first, second)]
    return (tops[0][:, :, None] == tops[1][:, None, :]).any(axis=-1).mean(axis=-1)
