"""Adapters in a build: attached, audited, and merged into the base that carries them better.

An adapter trained over a quantized base (QLoRA) can be merged into that base dequantized, or into the
full-precision one. The dequantized base is taken only if the whole interval of the paired difference on
held-out blocks is below zero. With `merge: auto` the BASELINE's audit decides for every arm: arms in
different bases would differ by more than their training, and luck in the choice then favours the control.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.files import read_json
from edgedisp.core.progress import Progress
from edgedisp.evaluate.statistics import Metric, Resampling, difference
from edgedisp.graph.app_contract import write_app
from edgedisp.pipeline.chat_corpus import CHAT
from edgedisp.pipeline.options import BundleRounding, MergeOptions
from edgedisp.pipeline.prepare import heldout_blocks, weights_digest
from edgedisp.pipeline.rounding import round_as_bundle
from edgedisp.pipeline.stage import Inputs, results_of
from edgedisp.recipe import Adapter
from edgedisp.train import lora

AUDIT_BLOCKS, AUDIT_TOKENS = 8, 4096  # at least, of a row; 5 s for 135M parameters on 2 cores
CHECKED_BLOCKS = 2  # where there is one base alone, so that nothing is chosen
BOOTSTRAP = 2000
GRID = {"method", "group", "symmetric", "head_bits"}
NATS = Metric("loss", "nll", "tokens", higher_is_better=False)
NO_ADAPTER, ADAPTER_ON = "no adapter", "adapter on"
FULL, DEQUANTIZED = "full", "dequantized"
MERGED = {kind: f"merged into the {kind} base" for kind in (FULL, DEQUANTIZED)}


def model_to_train(adapter: Adapter | None, base: Path, seed: int) -> Any:
    """The base, all of it trainable, or frozen under a fresh adapter."""
    return models.load(base) if adapter is None else lora.attach(_base(adapter, base), adapter, seed)


def _base(adapter: Adapter, folder: Path) -> Any:
    """The base as it is trained: quantized under a qlora adapter."""
    return models.load(folder) if adapter.base is None else lora.load_quantized(folder, adapter.base)


def save_adapter(trained: Any, base: Path, output_dir: Path) -> None:
    """Write the trained adapter as a PEFT folder that names its base: by its hub id where it has one."""
    results = results_of(base)
    lora.save_adapter(
        trained, results.get("hub_id") or str(base.resolve()), results.get("revision"), output_dir
    )


def save_model(trained: Any, inputs: Inputs, output_dir: Path) -> None:
    """Write a trained model as a Hugging Face folder; of chat rows with app.json."""
    base = inputs["base"]
    models.save(trained, models.load_tokenizer(base), output_dir)
    models.copy_licence(base, output_dir)
    if chat := read_json(inputs["corpus"] / CHAT):
        write_app(output_dir, chat)


def merge(options: MergeOptions, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Audit the adapter, merge it, and leave a Hugging Face folder.

    Inputs: base, corpus, adapter; decider: the model of the arm whose audit decides, where this one does not.
    Returns the training's results with `merge_audit`: rows {name, loss, difference from the adapter on},
    gains of the merged model over the base {fp32, int4}, in nats per token; chosen, why, warning. int4 stands
    where `options.int4` does.
    """
    rows = _score(options, inputs, progress)

    def change(before: str, after: str) -> dict[str, Any]:
        resampling = Resampling(BOOTSTRAP, options.seed)
        estimate = difference([(rows[before], rows[after])], NATS, resampling).estimate
        return {"difference": estimate.value, "low": estimate.low, "high": estimate.high}

    suffix = "" if options.int4 is None else ", int4"
    full, dequantized = (f"{merged}{suffix}" for merged in MERGED.values())
    decision = change(full, dequantized) if dequantized in rows else None
    choice = choose_base(options.adapter, decision, inputs.get("decider"))
    tokens, merged = sum(item["tokens"] for item in rows[ADAPTER_ON]), MERGED[choice["chosen"]]
    losses = {name: sum(item["nll"] for item in items) / tokens for name, items in rows.items()}
    grid = None if options.int4 is None else options.int4.model_dump(include=GRID)
    audit = {
        "rows": [{"name": name, "loss": loss, **change(ADAPTER_ON, name)} for name, loss in losses.items()],
        "tokens": tokens,
        "grid": grid,
        "gains": {
            bits: change(f"{NO_ADAPTER}{ending}", f"{merged}{ending}")
            for bits, ending in (("fp32", ""), ("int4", suffix))
            if bits == "fp32" or ending
        },
        **choice,
    }
    model = _merged(choice["chosen"], options, inputs)
    save_model(model, inputs, output_dir)
    results = {"merge_audit": audit, "weights_sha256": weights_digest(output_dir)}
    return results_of(inputs["adapter"]) | results


def _merged(kind: str, options: MergeOptions, inputs: Inputs) -> Any:
    base, quantization = inputs["base"], options.adapter.base
    if kind == FULL or quantization is None:
        return lora.merge(inputs["adapter"], models.load(base))
    return lora.merge(inputs["adapter"], lora.load_dequantized(base, quantization))


def _score(options: MergeOptions, inputs: Inputs, progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """Row of the audit -> one item a block, as evaluate/statistics.py takes them."""
    adapter, corpus = options.adapter, inputs["corpus"]
    size = {"blocks": CHECKED_BLOCKS}
    if adapter.base is not None:
        size = {"blocks": AUDIT_BLOCKS, "tokens": AUDIT_TOKENS}
    blocks = torch.from_numpy(heldout_blocks(corpus, **size))
    rows, count = dict[str, list[dict[str, Any]]](), 3 if adapter.base is None else 4
    for number, (name, model) in enumerate(_audited(options, inputs)):
        progress(number, count, f"merge audit: {name}")
        rows |= _rows(name, model, options, blocks, corpus)
        del model  # one at a time is in memory
    return rows


def _audited(options: MergeOptions, inputs: Inputs) -> Iterator[tuple[str, Any]]:
    """Row of the audit, and its model. A lora adapter is put on the base and merged into it, which is read
    once."""
    adapter, base = options.adapter, inputs["base"]
    if adapter.base is not None:
        yield NO_ADAPTER, models.load(base)
        yield ADAPTER_ON, lora.load_adapter(inputs["adapter"], _base(adapter, base))
        for kind, name in MERGED.items():
            yield name, _merged(kind, options, inputs)
        return
    model = models.load(base)
    yield NO_ADAPTER, model
    model = lora.load_adapter(inputs["adapter"], model)
    yield ADAPTER_ON, model
    yield MERGED[FULL], model.merge_and_unload()


def _rows(
    name: str, model: Any, options: MergeOptions, blocks: Tensor, corpus: Path
) -> dict[str, list[dict[str, Any]]]:
    """The rows of one model, which is rounded in place."""
    rows = {name: _items(model, blocks)}
    if name == MERGED[FULL]:
        weights = copy.deepcopy(model.state_dict())
        model.load_state_dict({key: weight.bfloat16() for key, weight in weights.items()})
        rows[f"{name}, bf16"] = _items(model, blocks)
        model.load_state_dict(weights)
        del weights
    if name != ADAPTER_ON and options.int4 is not None:
        round_as_bundle(BundleRounding(4, options.int4), model.cpu(), corpus)
        rows[f"{name}, int4"] = _items(model, blocks)
    return rows


@torch.inference_mode()
def _items(model: Any, blocks: Tensor) -> list[dict[str, Any]]:
    """The cross-entropy of each block of int64 [blocks, tokens], summed over its predictions, in nats."""
    device, items = "cuda" if torch.cuda.is_available() else "cpu", []
    model.to(device).eval()
    for index, ids in enumerate(blocks.to(device)):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        loss = functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        if not math.isfinite(loss):
            raise BuildFailed("merge audit: the loss of a model is not finite")
        items.append({"id": str(index), "document": index, "nll": loss, "tokens": len(ids) - 1})
    return items


def choose_base(adapter: Adapter, change: Mapping[str, Any] | None, decider: Path | None) -> dict[str, Any]:
    """{chosen, why, warning}: the base to merge into, and a warning where this arm's audit clearly speaks for
    the other one. change: dequantized - full, None for lora. decider: the model of the arm that decides."""
    if change is None:
        return {"chosen": FULL, "why": "a lora adapter is trained over full precision", "warning": None}
    value, low, high = change["difference"], change["low"], change["high"]
    is_tie = low is None or low <= 0 <= high
    better = FULL if is_tie or low > 0 else DEQUANTIZED
    interval = "no interval" if low is None else f"[{low:+.4f}, {high:+.4f}]"
    reason = f"the dequantized base is {value:+.4f} nats per token from the full one, {interval}"
    kind, why = better, reason
    if adapter.merge != "auto":
        kind, why = str(adapter.merge), f"the recipe says merge: {adapter.merge}"
    elif decider is not None:
        kind = results_of(decider)["merge_audit"]["chosen"]
        why = f"the audit of the arm {decider.parent.name} decides for every arm"
    warning = f"this arm's own audit speaks for the {better} base: {reason}"
    return {"chosen": kind, "why": why, "warning": None if is_tie or better == kind else warning}
