"""A recipe: one YAML file that says which build is wanted, read into a frozen, checked `Recipe`.

    recipe = load(Path("recipes/wikipedia.yaml"), overrides=["train.tokens=10k"])

Start reading at schema.py. There are no includes or environment variables: a recipe can be read alone.
"""

from edgedisp.recipe.arms import ArmRun as ArmRun
from edgedisp.recipe.data_schema import Data as Data
from edgedisp.recipe.data_schema import Source as Source
from edgedisp.recipe.device_profile import Target as Target
from edgedisp.recipe.device_profile import load_target as load_target
from edgedisp.recipe.load import load as load
from edgedisp.recipe.recipe import Recipe as Recipe
from edgedisp.recipe.schema import Adapter as Adapter
from edgedisp.recipe.schema import Dispersion as Dispersion
from edgedisp.recipe.schema import Evaluate as Evaluate
from edgedisp.recipe.schema import Latency as Latency
from edgedisp.recipe.schema import Model as Model
from edgedisp.recipe.schema import QuantizeBits as QuantizeBits
from edgedisp.recipe.schema import Train as Train
from edgedisp.recipe.values import BITS as BITS
