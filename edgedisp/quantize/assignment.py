"""What each weight of a graph is stored as: an assignment, from the weight's name to a choice.

One grid for all of them is the simple case (`uniform`). A search hands in a choice for each weight. The
embedding and the head are the ends: they are looked up and multiplied at every token and cost the most when
rounded coarsely, so the simple case has bits of their own for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from edgedisp.core.errors import BadInput
from edgedisp.quantize.grid import Blocks, Grid, concatenate
from edgedisp.quantize.methods import METHODS
from edgedisp.quantize.uses import Use, head_name

LEVELS = (0, 1, 4)
SLICE_VALUES = 1 << 17  # values rounded at a time: half a MB, so that a method works in the cache


@dataclass(frozen=True)
class Choice:
    """How one weight is stored and multiplied.

    method: a name in `methods.METHODS`, which rounds it where no blocks are at hand. accuracy_level:
    of its product; 0 and 1 compute in fp32, 4 on activations rounded to 8 bits. BadInput for what no kernel
    has.
    """

    grid: Grid
    method: str = "rtn"
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.accuracy_level not in LEVELS:
            raise BadInput(
                f"accuracy_level is {self.accuracy_level}; 0 and 1 compute in fp32, 4 on 8-bit activations"
            )
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise BadInput(f"method {self.method!r} rounds no weight alone; known: {known}")

    def blocks(self, weight: Tensor, importance: Tensor | None = None) -> Blocks:
        """`weight` fp32 [out, in] rounded by the method, a few rows at a time: rows are independent."""
        step = max(1, SLICE_VALUES // weight.shape[1])
        parts = (METHODS[self.method](rows, self.grid, importance) for rows in weight.split(step))
        return concatenate(list(parts))


Assignment = Mapping[str, Choice | None]
"""Weight of the graph -> its choice; None leaves it in fp32."""


def ends(uses: Mapping[str, list[Use]]) -> set[str]:
    """The names of the head and of what the embedding looks up; one name when they are tied."""
    found = {name for name, users in uses.items() if any(use.gather for use in users)}
    head = head_name(dict(uses))
    return found if head is None else found | {head}


def uniform(uses: Mapping[str, list[Use]], body: Choice, outer: Choice) -> dict[str, Choice]:
    """`body` for the weights of the layers, `outer` for the ends."""
    outside = ends(uses)
    return {name: outer if name in outside else body for name in uses}
