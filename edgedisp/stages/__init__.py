"""One function per stage: it reads folders of earlier stages, writes its own, and returns its results.

This is the one room in which the rooms meet. A function here says in a few lines what the stage does;
how is said in the rooms. Every function takes the part of the recipe that it depends on, never the whole:
what a stage does not get, it cannot depend on, and the cache key in pipeline.py is made of just that.

    start.py     base, tokens: the weights and the tokens file that every arm starts from
    training.py  midtrain, condensation: an arm's model folder, and the geometry of its vectors
    bundles.py   export, quantize, verify, pack: ONNX bundles out of a model folder
    figures.py   items, accuracy, latency: what is measured of them
"""

from edgedisp.stages.bundles import export, pack, quantize, verify
from edgedisp.stages.figures import accuracy, count_items, items, latency
from edgedisp.stages.start import base, fetch_base, tokens, twin_base
from edgedisp.stages.training import condensation, midtrain, train_settings

__all__ = [
    "accuracy",
    "base",
    "condensation",
    "count_items",
    "export",
    "fetch_base",
    "items",
    "latency",
    "midtrain",
    "pack",
    "quantize",
    "tokens",
    "train_settings",
    "twin_base",
    "verify",
]
