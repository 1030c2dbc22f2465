"""How far a bundle's next-token distributions lie from its fp32 parent's, and from the baseline's bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgedisp import models
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import write_json
from edgedisp.evaluate.divergence import Divergence
from edgedisp.graph.session import OnnxModel

CONTEXT_SHOWN = 24  # tokens before a place that is shown


def divergence(
    tokens: int,
    bundle: Path,
    parent: Path | None,
    baseline: Path | None,
    corpus_folder: Path,
    tokenizer_folder: Path,
    threads: int,
    own: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Read held-out blocks with all models at once; one number a token is kept.

    `parent`: the fp32 bundle that this one was quantized from; `baseline`: the baseline's bundle of the same
    precision. Returns {parent, baseline}, each None or the record of `Divergence` with by_position and worst.
    """
    held = np.load(corpus_folder / "heldout.npy", allow_pickle=False)
    held = held[: max(1, -(-tokens // held.shape[1]))].astype(np.int64)
    references = {"parent": parent, "baseline": baseline}
    opened = {name: OnnxModel(folder, threads) for name, folder in references.items() if folder is not None}
    shipped = OnnxModel(bundle, threads)
    found = {name: Divergence() for name in opened}
    for done, block in enumerate(held):
        ids, mask = block[None], np.ones_like(block[None])
        logits = shipped(ids, mask)
        for name, reference in opened.items():
            found[name].add(reference(ids, mask), logits)
        progress(done + 1, len(held), "blocks")
    tokenizer = models.load_tokenizer(tokenizer_folder)
    results: dict[str, Any] = dict.fromkeys(references)
    for name, one in found.items():
        worst = [_in_words(place, held, tokenizer) for place in one.worst()]
        results[name] = {**one.record(), "by_position": one.by_position(), "worst": worst}
    write_json(own / "divergence.json", results)
    return results


def _in_words(place: dict[str, Any], held: Any, tokenizer: Any) -> dict[str, Any]:
    """The place with its text: what was read, what followed in truth, and what each model held likeliest."""
    block, position = held[place["block"]], place["position"]

    def text(ids: Any) -> str:
        return str(tokenizer.decode([int(one) for one in ids], clean_up_tokenization_spaces=False))

    follows = block[position + 1 : position + 2]
    return {
        **place,
        "context": text(block[max(0, position + 1 - CONTEXT_SHOWN) : position + 1]),
        "truth": text(follows) if len(follows) else None,
        "reference": text([place["reference_token"]]),
        "other": text([place["other_token"]]),
    }
