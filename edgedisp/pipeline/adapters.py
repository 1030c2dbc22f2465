"""Adapters in a build: attached, audited, and merged into the base that carries them better.

An adapter trained over a quantized base (QLoRA) can be merged into that base dequantized, or into the
full-precision one. Which is better is measured on held-out blocks: with the adapter on, merged either way,
rounded to bfloat16, and rounded as the int4 bundle. The dequantized base is taken only if the whole interval
of the paired difference is below zero. With `merge: auto` the BASELINE's audit decides for every arm: arms in
different bases would differ by more than their training, and luck in the choice then favours the control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.evaluate.statistics import Metric, Resampling, difference
from edgedisp.pipeline.options import BundleRounding, MergeOptions
from edgedisp.pipeline.prepare import heldout_blocks, weights_digest
from edgedisp.pipeline.rounding import round_as_bundle
from edgedisp.pipeline.stage import Inputs, results_of
from edgedisp.recipe import Adapter
from edgedisp.train import lora

AUDIT_TOKENS = 4096  # held-out tokens a row is scored on; 5 s a row for 135M parameters on 2 cores
LEAST_BLOCKS = 8
BOOTSTRAP = 2000
NATS = Metric("loss", "nll", "tokens", higher_is_better=False)
FULL, DEQUANTIZED = "full", "dequantized"
NO_ADAPTER, ADAPTER_ON = "no adapter", "adapter on"


def model_to_train(adapter: Adapter | None, base: Path, seed: int) -> Any:
    """The base, all of it trainable, or frozen under a fresh adapter."""
    model = _base(adapter, base)
    return model if adapter is None else lora.attach(model, decoder_layers(model), adapter, seed)


def _base(adapter: Adapter | None, folder: Path) -> Any:
    """The base as it is trained: quantized under a qlora adapter."""
    quantization = None if adapter is None else adapter.base
    return models.load(folder) if quantization is None else lora.load_quantized(folder, quantization)


def save_adapter(trained: Any, adapter: Adapter, base: Path, output_dir: Path) -> None:
    """Write the trained adapter as a PEFT folder that names its base: by its hub id where it has one."""
    results = results_of(base)
    sha256 = lora.fingerprint(models.load(base))
    name = results.get("hub_id") or str(base.resolve())
    lora.save_adapter(trained, lora.Base(name, sha256, adapter.base, results.get("revision")), output_dir)


def trained_model(adapter: Adapter | None, base: Path, folder: Path) -> Any:
    """The model that a training left in `folder`, in eval mode; an adapter's layers stay in it, unmerged."""
    if adapter is None:
        return models.load(folder)
    wrapped: Any = lora.load_adapter(folder, _base(adapter, base))
    return wrapped.get_base_model().eval()


def merge(options: MergeOptions, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Audit the adapter, merge it, and leave a Hugging Face folder.

    Inputs: base, corpus, adapter; decider: the model of the arm whose audit decides, where this one does not.
    Returns the results of the training with `merged_into` and `merge_audit` {rows [{name, loss, difference,
    low, high}]: nats per token, differences from the adapter on; tokens, blocks, grid; decision {judged_by:
    int4 where it ships, difference, low, high}: dequantized - full, None for lora; chosen: full or
    dequantized; why; warning; gains {fp32, int4}: the merged model - the base without adapter}.
    """
    adapter, base, training = options.adapter, inputs["base"], results_of(inputs["adapter"])
    merged_rows = {FULL: "merged into full precision"}
    if adapter.base:
        merged_rows[DEQUANTIZED] = f"merged into dequantized {adapter.base}"
    rows = _score(options, inputs, merged_rows, progress)

    def compare(before: str, after: str) -> dict[str, Any]:
        pairs, resampling = [(rows[before], rows[after])], Resampling(BOOTSTRAP, options.seed)
        change = difference(pairs, NATS, resampling).estimate
        return {"difference": change.value, "low": change.low, "high": change.high}

    decision, suffix = None, ", int4" if options.int4_ships else ""
    if DEQUANTIZED in merged_rows:
        full, dequantized = (f"{merged_rows[kind]}{suffix}" for kind in (FULL, DEQUANTIZED))
        judged_by = "int4" if options.int4_ships else "fp32"
        decision = {"judged_by": judged_by, **compare(full, dequantized)}
    choice = choose_base(adapter, decision, inputs.get("decider"))
    chosen_row = merged_rows[choice["chosen"]]
    tokens = sum(item["tokens"] for item in rows[ADAPTER_ON])
    losses = {name: sum(item["nll"] for item in items) / tokens for name, items in rows.items()}
    grid = options.int4.model_dump(include={"method", "group", "symmetric", "head_bits"})
    audit = {
        "rows": [{"name": name, "loss": loss, **compare(ADAPTER_ON, name)} for name, loss in losses.items()],
        "tokens": tokens,
        "blocks": len(rows[ADAPTER_ON]),
        "grid": {"bits": 4, **grid},
        "decision": decision,
        **choice,
        "gains": {
            "fp32": compare(NO_ADAPTER, chosen_row),
            "int4": compare(f"{NO_ADAPTER}, int4", f"{chosen_row}, int4"),
        },
    }
    merged = _merged(choice["chosen"], adapter, inputs)
    models.save(merged, models.load_tokenizer(base), output_dir)
    models.copy_licence(base, output_dir)
    return {
        **training,
        "adapter_sha256": training.get("weights_sha256"),
        "merged_into": _base_name(choice["chosen"], adapter),
        "merge_audit": audit,
        "weights_sha256": weights_digest(output_dir),
    }


def _merged(kind: str, adapter: Adapter, inputs: Inputs) -> Any:
    quantized = _base(adapter, inputs["base"]) if kind == DEQUANTIZED else None
    return lora.merge(inputs["adapter"], models.load(inputs["base"]), quantized=quantized)


def _base_name(kind: str, adapter: Adapter) -> str:
    return "the full-precision base" if kind == FULL else f"the dequantized {adapter.base} base"


def _score(
    options: MergeOptions, inputs: Inputs, merged_rows: Mapping[str, str], progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Row of the audit -> one item a block, as evaluate/statistics.py takes them; one model is in memory at a
    time."""

    def int4(load: Callable[[], Any]) -> Any:
        model = load()
        round_as_bundle(BundleRounding(4, options.int4), model, inputs["corpus"])
        return model

    def bfloat16(load: Callable[[], Any]) -> Any:
        model = load()
        for weight in model.parameters():
            weight.data = weight.data.bfloat16().float()
        return model

    adapter, base = options.adapter, inputs["base"]
    plain: dict[str, Callable[[], Any]] = {NO_ADAPTER: partial(models.load, base)}
    merged = {name: partial(_merged, kind, adapter, inputs) for kind, name in merged_rows.items()}
    full = merged_rows[FULL]
    loaders = plain | {ADAPTER_ON: partial(trained_model, adapter, base, inputs["adapter"])} | merged
    loaders[f"{full}, bf16"] = partial(bfloat16, merged[full])
    loaders |= {f"{name}, int4": partial(int4, load) for name, load in (plain | merged).items()}

    blocks = heldout_blocks(inputs["corpus"], blocks=LEAST_BLOCKS, tokens=AUDIT_TOKENS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {}
    for number, (name, load) in enumerate(loaders.items()):
        progress(number, len(loaders), f"merge audit: {name}")
        losses = lora.block_losses(load().to(device), blocks)
        if not np.isfinite(losses).all():
            raise BuildFailed(f"the merge audit's row `{name}` has a loss that is not finite")
        rows[name] = [
            {"id": str(index), "document": index, "nll": float(loss), "tokens": blocks.shape[1] - 1}
            for index, loss in enumerate(losses)
        ]
    progress(len(loaders), len(loaders), "merge audit")
    return rows


def choose_base(adapter: Adapter, decision: Mapping[str, Any] | None, decider: Path | None) -> dict[str, Any]:
    """{chosen, why, warning}: the base to merge into, and a warning where this arm's audit clearly speaks for
    the other one. decision: of `merge`; decider: the model folder of the arm whose audit decides."""
    if decision is None:
        return {"chosen": FULL, "why": "a lora adapter is trained over full precision", "warning": None}
    value, low, high = (decision[name] for name in ("difference", "low", "high"))
    is_tie = low is None or low <= 0 <= high
    better = DEQUANTIZED if not is_tie and high < 0 else FULL
    row = "after int4" if decision["judged_by"] == "int4" else "merged"
    interval = ", without an interval (a single block)" if low is None else f" [{low:+.4f}, {high:+.4f}]"
    outcome = (
        "better" if better == DEQUANTIZED else "a tie, which goes to full precision" if is_tie else "worse"
    )
    distance = f"{value:+.4f} nats per token from the full one{interval}"
    reason = f"{row}, the dequantized {adapter.base} base is {distance}: {outcome}"
    base, why = better, reason
    if adapter.merge != "auto":
        base, why = str(adapter.merge), f"the recipe says merge: {adapter.merge}"
    elif decider is not None:
        base = results_of(decider)["merge_audit"]["chosen"]
        why = f"the audit of the arm {decider.parent.name} decides for every arm"
    warning = None
    if better != base and not is_tie:
        warning = f"this arm's own audit speaks for {_base_name(better, adapter)}: {reason}"
    return {"chosen": base, "why": why, "warning": warning}
