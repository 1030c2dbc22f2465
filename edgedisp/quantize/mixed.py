"""Mixed precision by search: bits, group and method for each weight, under a budget of bytes or of loss.

`sensitivity.py` says what each candidate of each weight costs in KL, the layout of the files what it costs in
bytes, and `search.py` solves the knapsack between them. Here they meet:

- candidates for each weight, and what they lose: measured once, carried over by the score (`candidates.py`).
- bytes: of the file as it will be, with zero points, scales, rows that fill no group, padding to pages and
  all that is not quantized (`bundle_bytes`, to the byte).
- a limit on perplexity is one on real text. The knapsack is solved for a limit on predicted KL, the result
  is measured, and the limit is moved by bisection; what is returned was measured to hold.

Rounding weights its errors by E[x^2] of the inputs, which the gradient pass brings along. Decode speed is
predicted from bytes alone, as decoding reads every weight once a token: a ratio to the uniform int4 bundle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from torch import Tensor, nn

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.quantize.assignment import Choice
from edgedisp.quantize.candidates import METHODS_TRIED, OUTER, USUAL, Candidates, candidates, read_bytes
from edgedisp.quantize.grid import Blocks, Grid, dequantize
from edgedisp.quantize.made import Made
from edgedisp.quantize.rewrite import bundle_bytes
from edgedisp.quantize.search import Solution, frontier, least_cost, least_loss, solution
from edgedisp.quantize.sensitivity import Text, fisher_of, loss, measure, moments, shares
from edgedisp.quantize.units import Unit, find_units, module_grids, read_unit, written

TRIALS = 6  # whole assignments measured for a limit on perplexity
CURVE_POINTS = 24


class Search:
    """Sensitivities of the weights of one bundle, and solutions under a budget.

    `model` is the torch model that the fp32 bundle `source` was made of. `pieces` (int64 [tokens] each) are
    what KL and gradients are taken on, `blocks` the longer text that a limit on perplexity is held to.
    `methods`: those that may round the layers' weights. `calibrated`: what a calibrated method makes of them
    on USUAL's grid; it stands for that choice then. Everything is determined by the arguments.
    """

    def __init__(
        self,
        source: Path,
        model: nn.Module,
        pieces: Sequence[Tensor],
        blocks: Sequence[Tensor],
        *,
        methods: Sequence[str] = METHODS_TRIED,
        accuracy_level: int = 4,
        calibrated: Made | None = None,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        self.source, self.model, self.blocks = source, model.eval(), list(blocks)
        self.progress, self._calibrated = progress, calibrated
        self.text = Text(model, pieces)
        units = find_units(source, model)
        self.moments = moments(model, units, pieces, seed, progress)
        self.measured = measure(model, units, self.text, self._usual, progress)
        share = shares(self.measured)
        self.fisher: dict[str, float] = {}
        self.candidates: list[Candidates] = []
        for done, unit in enumerate(units):
            progress(done, len(units), "candidates for each weight")
            weight, known = read_unit(model, unit), self.moments[unit.name]
            score = self.fisher[unit.name] = fisher_of(weight, USUAL, known)
            scale = share[unit.name] / max(score, 1e-30)
            self.candidates.append(candidates(unit, weight, known, scale, methods, accuracy_level))
        self.items = [found.options for found in self.candidates]
        cheapest = frontier(self.items)[0]
        self._fixed = bundle_bytes(source, self.assignment(cheapest)) - round(cheapest.cost)
        self.before = loss(model, self.blocks)
        self._held: dict[tuple[str, Choice], Blocks] = {}

    def assignment(self, found: Solution) -> dict[str, Choice]:
        """Weight of the graph -> its choice."""
        return {one.unit.name: one.choices[pick] for one, pick in zip(self.candidates, found.picks)}

    def size_bytes(self, found: Solution) -> int:
        """Of the bundle's graph and weights, to the byte."""
        return bundle_bytes(self.source, self.assignment(found))

    def within(self, budget: int) -> Solution:
        """The least predicted KL in at most `budget` bytes. BadInput says what the smallest bundle takes."""
        allowed = budget - self._fixed
        while (found := least_loss(self.items, allowed)) is not None:
            over = self.size_bytes(found) - budget
            if over <= 0:
                return found
            allowed -= over  # names and offsets in the graph file: some bytes a weight
        raise out_of_reach(budget, self.size_bytes(frontier(self.items)[0]))

    def below(self, increase: float) -> tuple[Solution, list[dict[str, float]]]:
        """The smallest file found whose perplexity on `blocks` is at most 1 + `increase` times the model's,
        and what was measured on the way. BadInput says what can be reached."""
        allowed, good = math.log1p(increase), frontier(self.items)[-1]
        trials = [self._trial(good)]
        if trials[0]["perplexity_increase"] > increase:
            raise BadInput(
                f"quantize.max_perplexity_increase: {increase:.2%} cannot be reached; with the least loss "
                f"there is, perplexity on the training text rises by {trials[0]['perplexity_increase']:.2%}"
            )
        low, high = good.loss, frontier(self.items)[0].loss
        limit = min(max(allowed, low), high)
        while len(trials) < TRIALS:
            found = least_cost(self.items, limit) or good
            trials.append(self._trial(found))
            if trials[-1]["perplexity_increase"] <= increase:
                good, low = found, limit
            else:
                high = limit
            if high <= low * 1.02:
                break
            limit = math.sqrt(max(low, high * 1e-3) * high)
        return good, trials

    def _trial(self, found: Solution) -> dict[str, float]:
        return {
            "size_bytes": self.size_bytes(found),
            "predicted_kl": found.loss,
            "perplexity_increase": self.increase(found),
        }

    def increase(self, found: Solution) -> float:
        """Perplexity on `blocks` over the unrounded model's, less 1: measured."""
        with self._rounded(found):
            return math.expm1(loss(self.model, self.blocks) - self.before)

    def kl(self, found: Solution) -> float:
        """KL(model || rounded), nats per token: measured, on the pieces."""
        with self._rounded(found):
            return self.text.kl(self.model)

    def _rounded(self, found: Solution) -> Any:
        chosen = self.assignment(found)
        held, self._held = self._held, {}

        def change(unit: Unit, weight: Tensor) -> Tensor:
            choice = chosen[unit.name]
            key = (unit.name, choice)
            self._held[key] = held.pop(key) if key in held else self._blocks(unit, weight, choice)
            self.progress(len(self._held), len(chosen), "measuring an assignment")
            return dequantize(self._held[key], choice.grid)

        return written(self.model, [one.unit for one in self.candidates], change)

    def _usual(self, unit: Unit, weight: Tensor) -> Tensor:
        return dequantize(self._blocks(unit, weight, USUAL), USUAL.grid)

    def _blocks(self, unit: Unit, weight: Tensor, choice: Choice) -> Blocks:
        if self._calibrated is not None and choice.grid == USUAL.grid:
            found = self._calibrated.find(weight)
            if found is not None:  # embedding and head are not among them
                return found[0]
        return choice.blocks(weight, self.moments[unit.name].importance)

    def made(self, found: Solution) -> Made:
        """The blocks of every weight, for the rewriter: what was measured is what ships."""
        made, chosen = Made(), self.assignment(found)
        for one in self.candidates:
            weight, choice = read_unit(self.model, one.unit), chosen[one.unit.name]
            held = self._held.get((one.unit.name, choice))
            made.add(weight, held or self._blocks(one.unit, weight, choice), choice.grid)
        return made

    def release(self) -> None:
        """Let go of all blocks, where the layers are rounded anew."""
        self._held, self._calibrated = {}, None

    def add_ends(self, made: Made, found: Solution) -> None:
        """The embedding and the head, which calibration leaves out."""
        chosen = self.assignment(found)
        for one in self.candidates:
            if one.unit.outer:
                weight, choice = read_unit(self.model, one.unit), chosen[one.unit.name]
                made.add(weight, self._blocks(one.unit, weight, choice), choice.grid)

    def as_it_is(self, found: Solution) -> dict[str, float]:
        """What a model comes to whose layers were rounded in place meanwhile, with the ends of `found`."""
        chosen = self.assignment(found)

        def change(unit: Unit, weight: Tensor) -> Tensor:
            choice = chosen[unit.name]
            return dequantize(self._blocks(unit, weight, choice), choice.grid)

        with written(self.model, [one.unit for one in self.candidates if one.unit.outer], change):
            kl, after = self.text.kl(self.model), loss(self.model, self.blocks)
        return {"measured_kl": kl, "perplexity_increase": math.expm1(after - self.before)}

    @property
    def inner_names(self) -> list[str]:
        """The weights of the layers."""
        return [one.unit.name for one in self.candidates if not one.unit.outer]

    def module_grids(self, found: Solution) -> dict[str, Grid]:
        """Linear map of the layers -> its grid."""
        return module_grids([one.unit for one in self.candidates], self.assignment(found))

    def uniform(self, body: Grid, outer: Grid) -> Solution:
        """One grid for the layers and one for the ends, with the methods that were found best on them."""
        picks = []
        for one in self.candidates:
            wanted = outer if one.unit.outer else body
            picks.append(next(i for i, choice in enumerate(one.choices) if choice.grid == wanted))
        return solution(self.items, picks)

    def bytes_read(self, found: Solution) -> int:
        """Bytes of weights that are read for each decoded token; of an embedding alone, next to none."""
        return sum(
            read_bytes(one.unit, one.choices[pick].grid)
            for one, pick in zip(self.candidates, found.picks)
            if one.unit.modules
        )

    def record(self, chosen: Solution) -> dict[str, Any]:
        """What the search found, JSON-able.

        {tokens, perplexity_tokens, predicted_kl, measured_kl, additivity (measured / predicted KL of the
        choice), rank_correlation (Spearman, of the score with what was measured, over weights), curve
        [point], points [point with name and measured_kl], usual {bits, group, symmetric}, sensitivity
        {weight: measured KL of it alone at `usual`}, sensitivity_last (what it adds when all others
        are rounded)}; a point is {size_bytes, predicted_kl, decode_ratio}. KL is in nats per token.
        """
        line = frontier(self.items)
        step = max(1, math.ceil(len(line) / CURVE_POINTS))
        curve = [*line[:-1:step], line[-1]]
        named = {
            "chosen": chosen,
            "uniform int4": self.uniform(USUAL.grid, OUTER.grid),
            "uniform int8": self.uniform(OUTER.grid, OUTER.grid),
            "smallest": line[0],
        }
        points = [
            {"name": name, **self._point(found), "measured_kl": self.kl(found)}
            for name, found in named.items()
        ]
        scores = [self.fisher[name] for name in self.measured]
        alone = {name: found.alone for name, found in self.measured.items()}
        return {
            "tokens": self.text.tokens,
            "perplexity_tokens": sum(map(len, self.blocks)),
            "predicted_kl": chosen.loss,
            "measured_kl": points[0]["measured_kl"],
            "additivity": points[0]["measured_kl"] / chosen.loss if chosen.loss else None,
            "rank_correlation": float(spearmanr(list(alone.values()), scores).statistic),
            "curve": [self._point(found) for found in curve],
            "points": points,
            "usual": {"bits": USUAL.grid.bits, "group": USUAL.grid.group, "symmetric": USUAL.grid.symmetric},
            "sensitivity": alone,
            "sensitivity_last": {name: found.last for name, found in self.measured.items()},
        }

    def _point(self, found: Solution) -> dict[str, Any]:
        usual = self.uniform(USUAL.grid, OUTER.grid)
        return {
            "size_bytes": self._fixed + round(found.cost),
            "predicted_kl": found.loss,
            "decode_ratio": self.bytes_read(usual) / self.bytes_read(found),
        }


def out_of_reach(budget: int, smallest: int) -> BadInput:
    """What is said of a budget below the smallest bundle, in bytes."""
    return BadInput(
        f"quantize.budget: no bundle of this model fits {_megabytes(budget)}; the smallest, every weight "
        f"at 4 bits and in wide groups, takes {_megabytes(smallest, up=True)}"
    )


def _megabytes(size: float, up: bool = False) -> str:
    """`98.3 MB`; rounded up where the number is to be used as a budget."""
    return f"{math.ceil(size / 1e5) / 10 if up else size / 1e6:.1f} MB"
