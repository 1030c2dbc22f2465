"""Bits, group and method for each weight, searched under a budget of bytes or of perplexity.

The candidates of a weight: 4 bits in groups of 16 to 128, with and without zero points, each by the method
with the least Fisher score in groups of 32, and 8 bits rounded to nearest. Their losses follow from
sensitivity.py, their bytes from the layout of the file, and knapsack.py chooses. For a limit on perplexity,
the limit on predicted KL is moved by bisection until the measured perplexity holds.

One arm's search decides for all, so that twins are stored alike; the others follow its record
(`MixedPrecision`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.graph.decoder_graph import INLINE_BYTES
from edgedisp.graph.onnx_graph import PAGE
from edgedisp.quantize.calibration import gptq_model
from edgedisp.quantize.grid import Blocks, Grid, concatenate, dequantize
from edgedisp.quantize.knapsack import Option, Solution, frontier, least_cost, least_loss, solution
from edgedisp.quantize.onnx_rewrite import BlocksOf, Choice, bundle_bytes
from edgedisp.quantize.rounding_methods import METHODS
from edgedisp.quantize.sensitivity import (
    Moments,
    Text,
    Unit,
    changed,
    find_units,
    loss,
    measure,
    moments,
    read_unit,
    shares,
)

GROUPS_TRIED = (16, 32, 64, 128)
FOUR_BITS = tuple(Grid(4, group, symmetric) for symmetric in (False, True) for group in GROUPS_TRIED)
EIGHT_BITS = tuple(Grid(8, group, True) for group in (32, 64, 128))
USUAL = Choice(Grid(4, 32, False))  # the rounding whose loss is measured, and the uniform bundle's layers
OUTER = Grid(8, 32, True)  # the uniform bundle's embedding and head
TRIALS = 6  # whole assignments measured for a limit on perplexity
CURVE_POINTS = 24

PIECES, PIECE_TOKENS = 4, 128  # on which KL and gradients are taken
PERPLEXITY_TOKENS = 4096  # on which a limit on perplexity is held
FEWEST_TOKENS = 64
REFERENCE_BYTES = 1 << 28  # of the unrounded model's log-probabilities, which are kept


@dataclass(frozen=True)
class SearchText:
    """Training text for a search: `pieces` for KL and gradients, `blocks` for perplexity (int64 [tokens]
    each), and `calibration` (unsigned [blocks, context]) where GPTQ rounds the layers."""

    pieces: list[Tensor]
    blocks: list[Tensor]
    calibration: NDArray[Any] | None

    @classmethod
    def of(cls, tokens: NDArray[Any], model: Any, calibration_tokens: int | None) -> SearchText:
        """From a corpus [blocks, context]: pieces from all over it, as many as memory allows; blocks and
        calibration from its beginning. BadInput for too little text."""
        context, vocabulary = tokens.shape[1], model.get_output_embeddings().weight.shape[0]
        length = min(PIECE_TOKENS, context)
        fitting = REFERENCE_BYTES // (4 * vocabulary * length)
        count = max(1, min(PIECES * PIECE_TOKENS // length, len(tokens), fitting))
        if count * length < FEWEST_TOKENS:
            raise BadInput(
                f"quantize: a search needs at least {FEWEST_TOKENS} tokens of training text, there are "
                f"{count * length}; raise train.tokens"
            )
        places = np.linspace(0, len(tokens) - 1, count).round().astype(int)
        rows = [np.asarray(tokens[place][:length], np.int64) for place in places]
        blocks = np.asarray(tokens[: -(-PERPLEXITY_TOKENS // context)], np.int64)
        calibration = None if calibration_tokens is None else tokens[: -(-calibration_tokens // context)]
        return cls([torch.from_numpy(row) for row in rows], list(torch.from_numpy(blocks)), calibration)


class MixedPrecision:
    """The weights of the fp32 bundle `source`, made of the torch `model`, stored by a choice for each of
    them."""

    def __init__(
        self, source: Path, model: nn.Module, text: SearchText, *, seed: int = 0, progress: Progress = silent
    ) -> None:
        self.source, self.model, self.text, self.progress = source, model.eval(), text, progress
        self.units = find_units(source, model)
        self.moments = moments(model, self.units, text.pieces, seed, progress)
        self.reference = Text(model, text.pieces)
        self._loss = loss(model, text.blocks)  # of the unrounded model
        self._usual_by_gptq: dict[str, Blocks] = {}  # by parameter name
        self._rounded: dict[tuple[str, Choice], Blocks] = {}  # of the assignment measured last

    def assignment_of(self, rows: Sequence[dict[str, Any]], accuracy_level: int) -> dict[str, Choice]:
        """The choices of another bundle's record (`by_tensor`). BuildFailed if it is of another graph."""
        assignment = {}
        for row in rows:
            method = row["method"] if row["method"] in METHODS else "k_quant"
            grid = Grid(row["bits"], row["group"], row["symmetric"])
            assignment[row["name"]] = Choice(grid, method, accuracy_level)
        if set(assignment) != {unit.name for unit in self.units}:
            raise BuildFailed(f"{self.source}: its weights are not those of the bundle whose search decides")
        return assignment

    def round(self, assignment: Mapping[str, Choice]) -> tuple[BlocksOf, dict[str, float]]:
        """The blocks of every weight for the rewriter, and what they cost: {measured_kl on the pieces,
        perplexity_increase on the blocks}. With calibration text, the layers of the model are rounded in
        place."""
        self._rounded, self._usual_by_gptq = {}, {}  # the memory is needed
        by_parameter: dict[str, Blocks] = {}
        units = self.units
        if self.text.calibration is not None:
            inner, units = [u for u in units if not u.outer], [u for u in units if u.outer]
            grids = {name: assignment[u.name].grid for u in inner for name in u.origin.parameters}
            by_parameter = gptq_model(self.model, self.text.calibration, grids, progress=self.progress)
        by_unit = {u.name: self._blocks(u, read_unit(self.model, u), assignment[u.name]) for u in units}
        with changed(self.model, units, lambda u, _: dequantize(by_unit[u.name], assignment[u.name].grid)):
            cost = self._cost()
        origins = {unit.name: unit.origin for unit in self.units}

        def blocks(name: str) -> Blocks | None:
            if name in by_unit:
                return origins[name].in_graph_order(by_unit[name])
            return origins[name].blocks(by_parameter)

        return blocks, cost

    def _blocks(self, unit: Unit, weight: Tensor, choice: Choice) -> Blocks:
        if self._usual_by_gptq and choice.grid == USUAL.grid and not unit.outer:
            return concatenate([self._usual_by_gptq[name] for name in unit.origin.parameters])
        return choice.blocks(weight, self.moments[unit.name].importance)

    def _cost(self) -> dict[str, float]:
        """Of the model as it is, against the unrounded one."""
        increase = math.expm1(loss(self.model, self.text.blocks) - self._loss)
        return {"measured_kl": self.reference.kl(self.model), "perplexity_increase": increase}


class Search(MixedPrecision):
    """Sensitivities of the weights of one bundle, and solutions under a budget. `accuracy_level` is that of
    every choice. Everything is determined by the arguments."""

    def __init__(
        self,
        source: Path,
        model: nn.Module,
        text: SearchText,
        *,
        accuracy_level: int = 4,
        seed: int = 0,
        progress: Progress = silent,
    ) -> None:
        super().__init__(source, model, text, seed=seed, progress=progress)
        methods: tuple[str, ...] = ("rtn", "k_quant")
        if text.calibration is not None:  # what GPTQ makes up for differs from weight to weight: measure it
            methods = ("k_quant",)
            # Without correction: a weight is looked at alone, and then there is nothing to make up for.
            self._usual_by_gptq = gptq_model(
                copy.deepcopy(model), text.calibration, USUAL.grid, correction=0.0, progress=progress
            )

        def usual(unit: Unit, weight: Tensor) -> Tensor:
            return dequantize(self._blocks(unit, weight, USUAL), USUAL.grid)

        measured = measure(model, self.units, self.reference, usual, progress)
        self.sensitivity = {name: one.alone for name, one in measured.items()}
        share = shares(measured)
        self.choices: list[list[Choice]] = []
        self.items: list[list[Option]] = []
        for index, unit in enumerate(self.units):
            progress(index, len(self.units), "candidates for each weight")
            weight, known = read_unit(model, unit), self.moments[unit.name]
            scale = share[unit.name] / max(known.fisher_of(weight, USUAL), 1e-30)
            scored = _candidates(weight, known, methods, accuracy_level)
            self.choices.append([choice for choice, _ in scored])
            self.items.append([Option(_stored_bytes(unit, c.grid), scale * score) for c, score in scored])
        cheapest = frontier(self.items)[0]
        self._fixed_bytes = self.size_bytes(cheapest) - round(cheapest.cost)

    def assignment(self, chosen: Solution) -> dict[str, Choice]:
        """Weight of the graph -> its choice."""
        picked = zip(self.units, self.choices, chosen.picks)
        return {unit.name: choices[pick] for unit, choices, pick in picked}

    def size_bytes(self, chosen: Solution) -> int:
        """Of the bundle's graph and weights."""
        return bundle_bytes(self.source, self.assignment(chosen))

    def within(self, budget: int) -> Solution:
        """The least predicted KL in at most `budget` bytes. BadInput says what the smallest bundle takes."""
        allowed = budget - self._fixed_bytes
        while (best := least_loss(self.items, allowed)) is not None:
            over = self.size_bytes(best) - budget
            if over <= 0:
                return best
            allowed -= over  # names and offsets in the graph file: some bytes a weight
        raise out_of_reach(budget, self.size_bytes(frontier(self.items)[0]))

    def below(self, increase: float) -> tuple[Solution, list[dict[str, float]]]:
        """The smallest file whose perplexity on the blocks is at most 1 + `increase` times the model's, and
        what was measured on the way. BadInput says what can be reached."""
        line = frontier(self.items)
        best = line[-1]
        trials = [self._trial(best)]
        if trials[0]["perplexity_increase"] > increase:
            raise BadInput(
                f"quantize.max_perplexity_increase: {increase:.2%} cannot be reached; with the least loss "
                f"there is, perplexity on the training text rises by {trials[0]['perplexity_increase']:.2%}"
            )
        low, high = best.loss, line[0].loss
        limit = min(max(math.log1p(increase), low), high)
        while len(trials) < TRIALS:
            smallest = least_cost(self.items, limit) or best
            trials.append(self._trial(smallest))
            if trials[-1]["perplexity_increase"] <= increase:
                best, low = smallest, limit
            else:
                high = limit
            if high <= low * 1.02:
                break
            limit = math.sqrt(max(low, high * 1e-3) * high)
        return best, trials

    def _trial(self, chosen: Solution) -> dict[str, float]:
        increase = self.cost(chosen)["perplexity_increase"]
        size = self.size_bytes(chosen)
        return {"size_bytes": size, "predicted_kl": chosen.loss, "perplexity_increase": increase}

    def cost(self, chosen: Solution) -> dict[str, float]:
        """{measured_kl, perplexity_increase} of `chosen`, each weight rounded alone."""
        assignment, before = self.assignment(chosen), self._rounded
        self._rounded = {}

        def change(unit: Unit, weight: Tensor) -> Tensor:
            choice = assignment[unit.name]
            key = (unit.name, choice)
            self._rounded[key] = before.get(key) or self._blocks(unit, weight, choice)
            self.progress(len(self._rounded), len(assignment), "measuring an assignment")
            return dequantize(self._rounded[key], choice.grid)

        with changed(self.model, self.units, change):
            return self._cost()

    def record(self, chosen: Solution) -> dict[str, Any]:
        """What the search found, JSON-able: {tokens, perplexity_tokens, perplexity_increase, predicted_kl,
        measured_kl, curve [point], points [point with name and measured_kl], sensitivity {weight: measured KL
        of it alone at `USUAL`}}; a point is {size_bytes, predicted_kl, decode_ratio}. KL is in nats per
        token."""
        line = frontier(self.items)
        step = max(1, math.ceil(len(line) / CURVE_POINTS))
        named = {
            "chosen": chosen,
            "uniform int4": self._uniform(USUAL.grid),
            "uniform int8": self._uniform(OUTER),
            "smallest": line[0],
        }
        costs = {name: self.cost(point) for name, point in named.items()}
        return {
            "tokens": self.reference.tokens,
            "perplexity_tokens": sum(map(len, self.text.blocks)),
            "predicted_kl": chosen.loss,
            **costs["chosen"],
            "curve": [self._point(point) for point in [*line[:-1:step], line[-1]]],
            "points": [
                {"name": name, **self._point(point), "measured_kl": costs[name]["measured_kl"]}
                for name, point in named.items()
            ],
            "sensitivity": self.sensitivity,
        }

    def _uniform(self, grid: Grid) -> Solution:
        """The layers on `grid`, embedding and head on `OUTER`, with the methods found best on them."""
        picks = []
        for unit, choices in zip(self.units, self.choices):
            grids = [choice.grid for choice in choices]
            picks.append(grids.index(OUTER if unit.outer else grid))
        return solution(self.items, picks)

    def _point(self, point: Solution) -> dict[str, Any]:
        """The decode ratio to the uniform int4 bundle is that of the bytes that a token reads."""
        return {
            "size_bytes": self._fixed_bytes + round(point.cost),
            "predicted_kl": point.loss,
            "decode_ratio": self._bytes_read(self._uniform(USUAL.grid)) / self._bytes_read(point),
        }

    def _bytes_read(self, point: Solution) -> int:
        """Bytes in memory, scales in fp32; of an embedding alone next to none is read for a token."""
        total = 0
        for unit, choice in zip(self.units, self.assignment(point).values()):
            if unit.modules:
                stored = choice.grid.empty(unit.rows, unit.columns)
                total += stored.size_bytes + stored.scales.nbytes
        return total


def _candidates(
    weight: Tensor, known: Moments, methods: Sequence[str], accuracy_level: int
) -> list[tuple[Choice, float]]:
    """What `weight` could be stored as, each with its Fisher score."""

    def scored(grid: Grid, method: str) -> tuple[Choice, float]:
        choice = Choice(grid, method, accuracy_level)
        return choice, known.fisher_of(weight, choice)

    result: list[tuple[Choice, float]] = []
    for symmetric in (False, True):
        best = min((scored(Grid(4, 32, symmetric), name) for name in methods), key=lambda one: one[1])
        others = [Grid(4, group, symmetric) for group in GROUPS_TRIED if group != 32]
        result += [best, *(scored(grid, best[0].method) for grid in others)]
    return result + [scored(grid, "rtn") for grid in EIGHT_BITS]


def _stored_bytes(unit: Unit, grid: Grid) -> int:
    """Of a weight's tensors in the files: large ones in whole pages, small ones as they are."""
    sizes = [array.nbytes for array in grid.empty(unit.rows, unit.columns).arrays]
    return sum(size if size <= INLINE_BYTES else size + -size % PAGE for size in sizes)


def out_of_reach(budget: int, smallest: int) -> BadInput:
    """What is said of a budget below the smallest bundle, in bytes."""
    return BadInput(
        f"quantize.budget: no bundle of this model fits {budget / 1e6:.1f} MB; the smallest, every weight "
        f"at 4 bits and in wide groups, takes {math.ceil(smallest / 1e5) / 10:.1f} MB"
    )
