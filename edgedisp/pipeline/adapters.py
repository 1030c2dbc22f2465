"""Adapters in a build: kept after training, audited, and merged into the base that carries them better.

An adapter can be merged into the full-precision base or, if it was trained over a quantized one (QLoRA), into
that base dequantized, over which it was trained. Which is better depends on the model and on what
ships, so it is measured: held-out loss with the adapter on, merged either way, rounded to bfloat16, and by
the recipe's int4 method on its grid. All on the same blocks, so that differences are paired.

Who decides: with `merge: auto`, the BASELINE's audit, for every arm. Arms that were merged into different
bases would differ by more than their training. The control is the one to ask: the audit reads held-out text
that is scored later, and whatever luck there is in the choice then favours the control, so a gain of another
arm cannot come from here. An arm whose own audit says otherwise
is reported. Judged by the int4 row where int4 ships, else by the merged row. The dequantized base
is taken only if the whole interval of the paired difference is below zero; a tie goes to the full base.

This is a stage of its own, not a part of training: the grid's options belong to it and must not retrain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import read
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.evaluate.statistics import Metric, Resampling, difference
from edgedisp.pipeline.options import MergeOptions
from edgedisp.pipeline.prepare import weights_digest
from edgedisp.pipeline.rounding import Trained, round_as_bundle
from edgedisp.recipe import Adapter, QuantizeBits
from edgedisp.train import lora

AUDIT_TOKENS = 4096  # held-out tokens a row is scored on; 5 s a row for 135M parameters on 2 cores
LEAST_BLOCKS = 8
BOOTSTRAP = 2000
NATS = Metric("loss", "nll", "tokens", higher_is_better=False)
FULL, DEQUANTIZED = "full", "dequantized"


NO_ADAPTER, ADAPTER_ON = "no adapter", "adapter on"


def model_to_train(chosen: Adapter | None, base_folder: Path, seed: int) -> Any:
    """The base, all of it trainable, or held as the recipe says under a fresh adapter."""
    if chosen is None:
        return models.load(base_folder)
    opened = lora.load_quantized(base_folder, chosen.base) if chosen.base else models.load(base_folder)
    return lora.attach(opened, decoder_layers(opened), chosen, seed)


def save_adapter(trained: Any, chosen: Adapter, base_folder: Path, output_dir: Path) -> None:
    """Write the trained adapter as a PEFT folder that knows its base: by its hub id where it has one."""
    record = read(base_folder)
    results = {} if record is None else record.results
    sha256 = lora.fingerprint(models.load(base_folder))
    name = results.get("hub_id") or str(base_folder.resolve())
    lora.save_adapter(trained, lora.Base(name, sha256, chosen.base, results.get("revision")), output_dir)


@dataclass(frozen=True)
class MergeInputs:
    """decider: the model folder of the arm whose audit decides; None if this arm decides itself."""

    base: Path
    corpus: Path
    adapter: Path
    decider: Path | None = None


def merge(options: MergeOptions, *, output_dir: Path, progress: Progress, **folders: Path) -> dict[str, Any]:
    """Audit the adapter, merge it, and leave a Hugging Face folder; `folders` as in MergeInputs.

    Returns the results of the training with `merged_into` and `merge_audit` {rows [{name, loss, difference,
    low, high}]: nats per token, differences from the adapter on; tokens, blocks, grid; decision {judged_by,
    difference, low, high}: dequantized - full, None for lora; chosen: full or dequantized; why; warning;
    gains {fp32, int4}: the merged model that was chosen - the base without adapter}.
    """
    inputs, adapter = MergeInputs(**folders), options.adapter
    trained = read(inputs.adapter)
    if trained is None:
        raise BuildFailed(f"{inputs.adapter}: the trained adapter is gone; build again")
    held = np.load(inputs.corpus / "heldout.npy", allow_pickle=False).astype(np.int64)
    makers = _Makers(inputs.base, inputs.adapter, adapter.base, options.int4, inputs.corpus)
    scored = _score(makers, held[: max(LEAST_BLOCKS, AUDIT_TOKENS // held.shape[1])], progress)
    compare = partial(_difference, scored, options.seed)
    audit = _figures(scored, makers, options.int4_ships, compare)
    audit |= _choice(adapter, audit["decision"], inputs.decider)
    audit["gains"] = {
        "fp32": compare(NO_ADAPTER, row := makers.merges[audit["chosen"]]),
        "int4": compare(f"{NO_ADAPTER}, int4", f"{row}, int4"),
    }
    models.save(makers.merged(audit["chosen"]), models.load_tokenizer(inputs.base), output_dir)
    models.copy_licence(inputs.base, output_dir)
    return {
        **trained.results,
        "adapter_sha256": trained.results.get("weights_sha256"),
        "merged_into": _named(audit["chosen"], adapter.base),
        "merge_audit": audit,
        "weights_sha256": weights_digest(output_dir),
    }


def _named(kind: str, held_as: str | None) -> str:
    return "the full-precision base" if kind == FULL else f"the dequantized {held_as} base"


@dataclass(frozen=True)
class _Makers:
    """The models that are compared, each made when it is wanted, so that one is in memory at a time."""

    base_folder: Path
    adapter_folder: Path
    held_as: str | None
    int4: QuantizeBits
    corpus_folder: Path

    def base(self) -> Any:
        return models.load(self.base_folder)

    def adapter_on(self) -> Any:
        """As it was trained: over the quantized base for qlora."""
        held = lora.load_quantized(self.base_folder, self.held_as) if self.held_as else self.base()
        return lora.load_adapter(self.adapter_folder, held)

    def merged(self, kind: str) -> Any:
        quantized = lora.load_quantized(self.base_folder, self.held_as or "") if kind == DEQUANTIZED else None
        return lora.merge(self.adapter_folder, self.base(), quantized=quantized)

    def on_int4(self, make: Callable[[], Any]) -> Any:
        """A model whose weights were rounded as the int4 bundle's are: by the recipe's method, on its
        grid."""
        made = make()
        round_as_bundle(Trained(self.int4, 4), made, self.corpus_folder)
        return made

    def on_bfloat16(self, make: Callable[[], Any]) -> Any:
        made = make()
        for weight in made.parameters():
            weight.data = weight.data.bfloat16().float()
        return made

    @property
    def merges(self) -> dict[str, str]:
        """The bases an adapter can be merged into -> how its row is called."""
        rows = {FULL: "merged into full precision"}
        return rows | ({DEQUANTIZED: f"merged into dequantized {self.held_as}"} if self.held_as else {})

    def all(self) -> dict[str, Callable[[], Any]]:
        """Row name -> what makes its model, in the order of the table."""
        rows: dict[str, Callable[[], Any]] = {NO_ADAPTER: self.base, ADAPTER_ON: self.adapter_on}
        for kind, name in self.merges.items():
            rows[name] = partial(self.merged, kind)
        rows[f"{self.merges[FULL]}, bf16"] = partial(self.on_bfloat16, partial(self.merged, FULL))
        for name in (NO_ADAPTER, *self.merges.values()):
            rows[f"{name}, int4"] = partial(self.on_int4, rows[name])
        return rows


def _score(makers: _Makers, blocks: NDArray[np.int64], progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """Row name -> one item a block, as evaluate/statistics.py takes them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = makers.all()
    scored = {}
    for done, (name, make) in enumerate(rows.items()):
        progress(done, len(rows), f"merge audit: {name}")
        losses = lora.block_losses(make().to(device), blocks)
        if not np.isfinite(losses).all():
            raise BuildFailed(f"the merge audit's row `{name}` has a loss that is not finite")
        scored[name] = [
            {"id": str(index), "document": index, "nll": float(loss), "tokens": blocks.shape[1] - 1}
            for index, loss in enumerate(losses)
        ]
    progress(len(rows), len(rows), "merge audit")
    return scored


def _difference(
    scored: dict[str, list[dict[str, Any]]], seed: int, before: str, after: str
) -> dict[str, Any]:
    """{difference, low, high} of two rows, after - before, nats per token."""
    change = difference([(scored[before], scored[after])], NATS, Resampling(BOOTSTRAP, seed)).estimate
    return {"difference": change.value, "low": change.low, "high": change.high}


def _figures(
    scored: dict[str, list[dict[str, Any]]],
    makers: _Makers,
    int4_ships: bool,
    compare: Callable[[str, str], dict[str, Any]],
) -> dict[str, Any]:
    """The table, and the difference that decides."""
    tokens = sum(item["tokens"] for item in scored[ADAPTER_ON])
    losses = {name: sum(item["nll"] for item in items) / tokens for name, items in scored.items()}
    suffix = ", int4" if int4_ships else ""
    full, dequantized = (f"{makers.merges.get(kind)}{suffix}" for kind in (FULL, DEQUANTIZED))
    decision = None
    if dequantized in scored:
        decision = {"judged_by": "int4" if int4_ships else "fp32", **compare(full, dequantized)}
    return {
        "rows": [{"name": name, "loss": loss, **compare(ADAPTER_ON, name)} for name, loss in losses.items()],
        "tokens": tokens,
        "blocks": len(scored[ADAPTER_ON]),
        "grid": {"bits": 4, **makers.int4.model_dump(include={"method", "group", "symmetric", "head_bits"})},
        "decision": decision,
    }


def _choice(chosen: Adapter, decision: dict[str, Any] | None, decider: Path | None) -> dict[str, Any]:
    """The base, why, and a warning where this arm's own audit speaks for the other one."""
    if decision is None:
        return {"chosen": FULL, "why": "a lora adapter is trained over full precision", "warning": None}
    own, reason = _better(decision, chosen.base)
    kind, why = own, reason
    if chosen.merge != "auto":
        kind, why = str(chosen.merge), f"the recipe says merge: {chosen.merge}"
    elif decider is not None:
        record = read(decider)
        if record is None:
            raise BuildFailed(f"{decider}: the merge audit that decides is gone; build again")
        kind = record.results["merge_audit"]["chosen"]
        why = f"the audit of the arm {decider.parent.name} decides for every arm"
    a_tie = own == FULL and not (decision["low"] or 0) > 0
    speaks_up = own != kind and not a_tie
    warning = f"this arm's own audit speaks for {_named(own, chosen.base)}: {reason}" if speaks_up else None
    return {"chosen": kind, "why": why, "warning": warning}


def _better(decision: dict[str, Any], held_as: str | None) -> tuple[str, str]:
    """The base that the paired difference speaks for, and the sentence that says so."""
    value, low, high = (decision[name] for name in ("difference", "low", "high"))
    row = "after int4" if decision["judged_by"] == "int4" else "merged"
    said = f"{row}, the dequantized {held_as} base is {value:+.4f} nats per token from the full one"
    if low is None:
        return FULL, f"{said}, without an interval (a single block): a tie, which goes to full precision"
    said = f"{said} [{low:+.4f}, {high:+.4f}]"
    if high < 0:
        return DEQUANTIZED, f"{said}: better"
    return FULL, f"{said}: {'worse' if low > 0 else 'a tie, which goes to full precision'}"
