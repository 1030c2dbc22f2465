"""A recipe: one YAML file that says which build is wanted, read into a frozen, checked `Recipe`.

    recipe = load(Path("recipes/quickstart.yaml"), overrides=["train.tokens=10k"])
    recipe.train.tokens, recipe.steps, recipe.hash8

A mistake must be found before an hour is spent on it, and all mistakes at once. So `load` collects every
problem (misspelt keys, wrong types, numbers out of bounds, keys that contradict each other) and raises one
`BadInput` in which each problem has its file and line, its key, what was found and what would work.

    number.py    `40k`, `200M`, `5%`, `5e-5`, `1_000` -> exact numbers
    kinds.py     the types: a count, a share, a folder's name, each with the words that describe it
    sections.py  the keys: type, bounds, default and meaning of each, as pydantic models; those of `train`
                 stand in training.py, those of `quantize` in quantizing.py
    arms.py      the arms, and the trainings that follow from arms and seeds
    schema.py    `Recipe`: all sections, and what follows from them (steps, identity)
    clashes.py   what single keys cannot see: combinations that cannot work
    written.py   the file as written: plain data, the line of every key, `--set` overrides
    problems.py  a failed check -> words for the user; removed.py: keys of earlier versions
    read.py      `load`: all of the above, in order
    shrink.py    `smoke`: the same recipe cut down to a minute
    targets.py   `load_target`: device profiles, read the same way
    docs.py      `reference`: the table of all keys for docs/recipe.md

Left out on purpose: includes, inheritance between recipes, environment variables and Python paths. A recipe
is one page that can be read alone, and `recipe.lock.yaml` beside a run holds every key with its value.
"""

from edgedisp.recipe.arms import Arm, ArmRun
from edgedisp.recipe.docs import reference
from edgedisp.recipe.kinds import BITS
from edgedisp.recipe.quantizing import Quantize, QuantizeBits
from edgedisp.recipe.read import load
from edgedisp.recipe.schema import Recipe
from edgedisp.recipe.sections import Data, Evaluate, Latency, Model, Source, Verify
from edgedisp.recipe.shrink import smoke
from edgedisp.recipe.targets import Target, load_target
from edgedisp.recipe.training import Adapter, Dispersion, Distributed, QuantizationAware, Train

__all__ = [
    "BITS",
    "Adapter",
    "Arm",
    "ArmRun",
    "Data",
    "Dispersion",
    "Distributed",
    "Evaluate",
    "Latency",
    "Model",
    "QuantizationAware",
    "Quantize",
    "QuantizeBits",
    "Recipe",
    "Source",
    "Target",
    "Train",
    "Verify",
    "load",
    "load_target",
    "reference",
    "smoke",
]
