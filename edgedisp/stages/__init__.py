"""One function per stage: it reads folders of earlier stages, writes its own, and returns its results.

This is the one room in which the rooms meet. A function here says in a few lines what the stage does;
how is said in the rooms. Every function takes the part of the recipe that it depends on, never the whole:
what a stage does not get, it cannot depend on, and the cache key in pipeline/ is made of just that.

    start.py     base, tokens: the weights and the tokens file that every arm starts from
    training.py  midtrain: an arm's model folder, or its adapter
    adapters.py  merge_adapter: an adapter's audit, and the model folder it is merged into
    condensation.py  the geometry of token vectors, of torch models and bundles
    bundles.py   export, quantize: ONNX bundles out of a model folder
    mixed.py     quantize_searched: bits, group and method by weight
    rounding.py  the rounding that quantization-aware training and its bundle share
    packing.py   pack: a bundle for a kind of device, in the layouts of its runtimes, with a manifest
    survival.py  survival: what is left of training's change after quantization
    measure.py   measure: all that is found out about one model; items: the questions of the tasks
    scoring.py   scores through the cache, noise floor; parity.py: a bundle against its torch model
    figures.py   latency: how fast bundles are on this machine
    device_scores.py  items for devices to score, and their answers held against this machine's scores
    accounting.py  size_account: what every bundle will weigh, before anything runs
    pilot.py     judging, pilot_candidate: a candidate of `edgedisp pilot`, trained and measured

Stages that train are loaded when they are asked for: they need the Trainer, 290 MB of memory.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgedisp.stages.accounting import base_skeleton, check_budget, size_account
from edgedisp.stages.bundles import export, quantize
from edgedisp.stages.figures import latency
from edgedisp.stages.measure import count_items, items, measure
from edgedisp.stages.mixed import quantize_searched
from edgedisp.stages.packing import PackOptions, pack, provenance_of
from edgedisp.stages.start import base, fetch_base, tokens, twin_base
from edgedisp.stages.survival import survival

if TYPE_CHECKING:
    from edgedisp.stages.adapters import merge_adapter
    from edgedisp.stages.pilot import judging, pilot_candidate
    from edgedisp.stages.training import midtrain

TRAINING = {
    "judging": "pilot",
    "merge_adapter": "adapters",
    "midtrain": "training",
    "pilot_candidate": "pilot",
}
"""Stages that train -> their module here."""

__all__ = [
    "PackOptions",
    "base",
    "base_skeleton",
    "check_budget",
    "count_items",
    "export",
    "fetch_base",
    "items",
    "judging",
    "latency",
    "measure",
    "merge_adapter",
    "midtrain",
    "pack",
    "pilot_candidate",
    "provenance_of",
    "quantize",
    "quantize_searched",
    "size_account",
    "survival",
    "tokens",
    "twin_base",
]


def __getattr__(name: str) -> Any:
    if name not in TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{TRAINING[name]}"), name)
