"""Bits, group and method for each weight, searched under a budget of bytes or of perplexity.

The KL of every weight is measured once, rounded as in `USUAL`. Its losses as other candidates are in
proportion to their squared errors, columns weighted by E[x^2]; losses add up over weights. One exact knapsack
(dynamic programming over bytes) then gives the least predicted KL for every size of file. A limit on
perplexity is met by bisection over the predicted KL, with whole assignments measured.

The search of the first arm decides for all, so that twins are stored alike; the others follow its record
(`MixedPrecision`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.graph.onnx_graph import GRAPH, INLINE_BYTES, PAGE
from edgedisp.quantize.calibration import gptq_model
from edgedisp.quantize.grid import METHODS, Blocks, Choice, Grid, concatenate, dequantize
from edgedisp.quantize.onnx_rewrite import BlocksOf
from edgedisp.quantize.onnx_weights import read_fp32_graph
from edgedisp.quantize.sensitivity import Reference, Weight, find_weights, importances, loss, replaced

FOUR_BITS = tuple(Grid(4, group, symmetric) for symmetric in (False, True) for group in (16, 32, 64, 128))
EIGHT_BITS = tuple(Grid(8, group, True) for group in (32, 64, 128))
# k_quant never has a larger weighted error than rtn; at 8 bits the difference is worth nothing.
CANDIDATES = (*(Choice(grid, "k_quant") for grid in FOUR_BITS), *(Choice(grid, "rtn") for grid in EIGHT_BITS))
USUAL = Choice(Grid(4, 32, False), "k_quant")  # whose loss is measured; the layers of a uniform bundle
OUTER = Choice(Grid(8, 32, True), "rtn")  # embedding and head of a uniform bundle

TRIALS = 6  # whole assignments measured for a limit on perplexity
CURVE_POINTS = 24
STATES = 1 << 16  # sizes of file that the knapsack tells apart
NODE_BYTES = 1100  # by which a weight's new nodes and names lengthen the graph file
SAMPLED_ROWS = 64  # of a weight, rounded to see what a candidate loses

PIECES, PIECE_TOKENS = 4, 128  # on which KL is measured
PERPLEXITY_TOKENS = 4096  # on which a limit on perplexity is held
FEWEST_TOKENS = 64
REFERENCE_BYTES = 1 << 28  # of the unrounded model's log-probabilities, which stay in memory


def text_pieces(tokens: NDArray[Any], vocabulary: int) -> list[Tensor]:
    """Pieces int64 [tokens] from all over a corpus [blocks, context], as many as memory allows. BadInput for
    too little text."""
    length = min(PIECE_TOKENS, tokens.shape[1])
    fitting = REFERENCE_BYTES // (4 * vocabulary * length)
    count = max(1, min(PIECES * PIECE_TOKENS // length, len(tokens), fitting))
    if count * length < FEWEST_TOKENS:
        raise BadInput(
            f"quantize: a search needs at least {FEWEST_TOKENS} tokens of training text, there are "
            f"{count * length}; raise train.tokens"
        )
    indices = np.linspace(0, len(tokens) - 1, count).round().astype(int)
    return [torch.from_numpy(np.asarray(tokens[index][:length], np.int64)) for index in indices]


class MixedPrecision:
    """The weights of the fp32 bundle `source`, exported from the torch `model`, each stored by its choice.

    tokens: training text, unsigned [blocks, context]. calibration_tokens: as many of them are GPTQ's; None:
    the layers are rounded weight by weight. BadInput for too little text.
    """

    def __init__(
        self,
        source: Path,
        model: nn.Module,
        tokens: NDArray[Any],
        *,
        calibration_tokens: int | None = None,
        progress: Progress = silent,
    ) -> None:
        self.source, self.model, self.progress = source, model.eval().requires_grad_(False), progress
        context, vocabulary = tokens.shape[1], len(model.get_output_embeddings().weight)  # type: ignore[operator]
        pieces = text_pieces(tokens, vocabulary)
        self.calibration = None if calibration_tokens is None else tokens[: -(-calibration_tokens // context)]
        blocks = np.asarray(tokens[: -(-PERPLEXITY_TOKENS // context)], np.int64)
        self.blocks = list(torch.from_numpy(blocks))
        self.weights = find_weights(source, model)
        self.importances = importances(model, self.weights, pieces)
        self.reference = Reference(model, pieces)
        self._loss = loss(model, self.blocks)  # of the unrounded model
        self._rounded: dict[str, tuple[Choice, Blocks]] = {}  # the latest of each weight
        self._gptq: dict[str, Blocks] = {}  # of the layers' weights on USUAL's grid

    def assignment_of(self, rows: Sequence[dict[str, Any]]) -> dict[str, Choice]:
        """The choices of another bundle's record (`by_tensor`). BuildFailed if it is of another graph."""
        assignment = {}
        for row in rows:
            method = row["method"] if row["method"] in METHODS else "k_quant"
            assignment[row["name"]] = Choice(Grid(row["bits"], row["group"], row["symmetric"]), method)
        if set(assignment) != {weight.name for weight in self.weights}:
            raise BuildFailed(f"{self.source}: its weights are not those of the bundle whose search decides")
        return assignment

    def round(self, assignment: Mapping[str, Choice]) -> tuple[BlocksOf, dict[str, float]]:
        """The blocks of every weight for the rewriter, and what they cost as `cost` returns it. With
        calibration text, GPTQ rounds the layers of the model in place."""
        self._gptq, by_parameter = {}, dict[str, Blocks]()
        weights = {weight.name: weight for weight in self.weights}
        if self.calibration is not None:
            layers = [weight for weight in self.weights if not weight.outer]
            grids = {name: assignment[w.name].grid for w in layers for name in w.origin.parameters}
            by_parameter = gptq_model(self.model, self.calibration, grids, progress=self.progress)
            assignment = {name: choice for name, choice in assignment.items() if weights[name].outer}
        cost = self.cost(assignment)

        def blocks(name: str) -> Blocks | None:
            origin = weights[name].origin
            if name in assignment:
                return origin.in_graph_order(self._rounded[name][1])
            return origin.blocks(by_parameter)

        return blocks, cost

    def cost(self, assignment: Mapping[str, Choice]) -> dict[str, float]:
        """{measured_kl, perplexity_increase} of the model with these weights rounded, against the unrounded
        one; KL in nats per token, on the pieces, perplexity on the blocks."""
        with self._rounding(assignment):
            increase = math.expm1(loss(self.model, self.blocks) - self._loss)
            return {"measured_kl": self.reference.kl(self.model), "perplexity_increase": increase}

    def _rounding(self, assignment: Mapping[str, Choice]) -> AbstractContextManager[None]:
        """The model with these weights rounded; the blocks of each are kept until its choice changes."""

        def change(weight: Weight, values: Tensor) -> Tensor:
            name, choice = weight.name, assignment[weight.name]
            if name in self._gptq and choice.grid == USUAL.grid:
                return dequantize(self._gptq[name], choice.grid)
            if name not in self._rounded or self._rounded[name][0] != choice:
                self._rounded[name] = choice, choice.blocks(values, self.importances[name])
            return dequantize(self._rounded[name][1], choice.grid)

        return replaced(self.model, [w for w in self.weights if w.name in assignment], change)


@dataclass(frozen=True)
class Solution:
    """`picks[i]`: the index in CANDIDATES of weight i. size_bytes: of graph and weights, to a step of the
    search; predicted_kl: nats per token."""

    picks: tuple[int, ...]
    size_bytes: int
    predicted_kl: float


class Search(MixedPrecision):
    """Sensitivities of the weights of a bundle, and solutions under a budget. Deterministic.

    Under GPTQ a weight's sensitivity is that of GPTQ's rounding without correction: what GPTQ makes up for
    differs from weight to weight.
    """

    def __init__(self, source: Path, model: nn.Module, tokens: NDArray[Any], **options: Any) -> None:
        super().__init__(source, model, tokens, **options)
        if self.calibration is not None:
            copied = copy.deepcopy(model)
            rounded = gptq_model(copied, self.calibration, USUAL.grid, correction=0.0, progress=self.progress)
            layers = [weight for weight in self.weights if not weight.outer]
            self._gptq = {w.name: concatenate([rounded[p] for p in w.origin.parameters]) for w in layers}
        self.sensitivity: dict[str, float] = {}
        errors = []
        for index, weight in enumerate(self.weights):
            self.progress(index, len(self.weights), "sensitivity of each weight")
            with self._rounding({weight.name: USUAL}):
                self.sensitivity[weight.name] = self.reference.kl(model)
            errors.append(_errors(weight.read(model), self.importances[weight.name]))
        alone, squared = np.array(list(self.sensitivity.values())), np.array(errors)
        whole = self.cost(dict.fromkeys(self.sensitivity, USUAL))["measured_kl"]
        shares = alone * whole / max(alone.sum(), 1e-30)  # weights cost more among other rounded ones
        self.losses = squared * (shares / np.maximum(squared[:, CANDIDATES.index(USUAL)], 1e-30))[:, None]
        stored = np.array([[_stored_bytes(w, choice.grid) for choice in CANDIDATES] for w in self.weights])
        self._step = 1 << max(0, math.ceil(math.log2(stored.max(1).sum() / STATES)))
        self._costs = -(-stored // self._step)
        self._least, self._picks = knapsack(self._costs, self.losses, int(self._costs.max(1).sum()))
        values = read_fp32_graph(source).graph.initializers.values()
        fp32 = [v.const_value.nbytes for v in values if v.const_value and v.name not in self.sensitivity]
        graph = (source / GRAPH).stat().st_size + NODE_BYTES * len(self.weights)
        self._fixed_bytes = graph + sum(map(_in_pages, fp32))

    def assignment(self, solution: Solution) -> dict[str, Choice]:
        """Weight of the graph -> its choice."""
        return {weight.name: CANDIDATES[pick] for weight, pick in zip(self.weights, solution.picks)}

    def within(self, budget: int) -> Solution:
        """The least predicted KL in at most `budget` bytes. BadInput says what the smallest bundle takes."""
        steps = min((budget - self._fixed_bytes) // self._step, len(self._least) - 1)
        if steps < 0 or math.isinf(self._least[steps]):
            raise out_of_reach(budget, self._smallest(math.inf).size_bytes)
        return self._at(steps)

    def below(self, increase: float) -> tuple[Solution, list[dict[str, float]]]:
        """The smallest file whose perplexity on the blocks is at most 1 + `increase` times the model's, and
        what was measured on the way. BadInput says what can be reached."""
        trials: list[dict[str, float]] = []

        def is_within(solution: Solution) -> bool:
            cost = self.cost(self.assignment(solution))["perplexity_increase"]
            sizes = {"size_bytes": solution.size_bytes, "predicted_kl": solution.predicted_kl}
            trials.append({**sizes, "perplexity_increase": cost})
            return cost <= increase

        best = self._smallest(0.0)
        if not is_within(best):
            raise BadInput(
                f"quantize.max_perplexity_increase: {increase:.2%} cannot be reached; with the least loss "
                f"there is, perplexity on the training text rises by {trials[0]['perplexity_increase']:.2%}"
            )
        low, high = best.predicted_kl, self._smallest(math.inf).predicted_kl
        limit = min(max(math.log1p(increase), low), high)
        while len(trials) < TRIALS and high > low * 1.02:
            solution = self._smallest(limit)
            if is_within(solution):
                best, low = solution, limit
            else:
                high = limit
            limit = math.sqrt(max(low, high * 1e-3) * high)
        return best, trials

    def record(self, solution: Solution) -> dict[str, Any]:
        """Why each weight is stored as it is, JSON-able: {tokens, perplexity_tokens, perplexity_increase,
        predicted_kl, measured_kl, curve [point], points [point with name and measured_kl], sensitivity
        {weight: measured KL of it alone at `USUAL`}}; a point is {size_bytes, predicted_kl, decode_ratio}. KL
        is in nats per token."""
        uniform_int4 = self._uniform(USUAL)
        usual_bytes = self._bytes_read(uniform_int4)

        def point(solution: Solution) -> dict[str, Any]:
            """The decode ratio to the uniform int4 bundle is that of the bytes that a token reads."""
            sizes = {"size_bytes": solution.size_bytes, "predicted_kl": solution.predicted_kl}
            return {**sizes, "decode_ratio": usual_bytes / self._bytes_read(solution)}

        solutions = {
            "chosen": solution,
            "uniform int4": uniform_int4,
            "uniform int8": self._uniform(OUTER),
            "smallest": self._smallest(math.inf),
        }
        costs = {name: self.cost(self.assignment(each)) for name, each in solutions.items()}

        first, last = int(np.argmax(np.isfinite(self._least))), int(np.argmin(self._least))
        sizes = np.unique(np.linspace(first, last, CURVE_POINTS).round().astype(int))
        return {
            "tokens": self.reference.tokens,
            "perplexity_tokens": sum(map(len, self.blocks)),
            "predicted_kl": solution.predicted_kl,
            **costs["chosen"],
            "curve": [point(self._at(size)) for size in sizes],
            "points": [
                {"name": name, **point(each), "measured_kl": costs[name]["measured_kl"]}
                for name, each in solutions.items()
            ],
            "sensitivity": self.sensitivity,
        }

    def _smallest(self, limit: float) -> Solution:
        """The smallest file at a predicted KL of at most `limit`, or at the least one there is."""
        is_within = np.isfinite(self._least) & (self._least <= max(limit, self._least[-1]))
        return self._at(int(np.argmax(is_within)))

    def _at(self, steps: int) -> Solution:
        return self._solution(picks_at(self._costs, self._picks, steps))

    def _uniform(self, layers: Choice) -> Solution:
        return self._solution([CANDIDATES.index(OUTER if w.outer else layers) for w in self.weights])

    def _solution(self, picks: Sequence[int]) -> Solution:
        indices = range(len(picks)), list(picks)
        size = self._fixed_bytes + int(self._costs[indices].sum()) * self._step
        return Solution(tuple(picks), size, float(self.losses[indices].sum()))

    def _bytes_read(self, solution: Solution) -> int:
        """Bytes in memory, scales in fp32; of an embedding alone next to none is read for a token."""
        total = 0
        for weight, choice in zip(self.weights, self.assignment(solution).values()):
            if weight.module:
                data, scales, *zero_points = choice.grid.array_bytes(weight.rows, weight.columns)
                total += data + 2 * scales + sum(zero_points)
        return total


def _errors(values: Tensor, importance: Tensor | None) -> list[float]:
    """Weighted squared error of each candidate, seen on some rows of a weight [rows, columns]."""
    sample = values[torch.linspace(0, len(values) - 1, min(SAMPLED_ROWS, len(values))).round().long()]
    weighting = torch.ones(sample.shape[1]) if importance is None else importance
    rounded = (dequantize(choice.blocks(sample, importance), choice.grid) for choice in CANDIDATES)
    return [float(((values - sample).square() @ weighting).double().sum()) for values in rounded]


def _stored_bytes(weight: Weight, grid: Grid) -> int:
    """Of a weight's tensors in the files."""
    return sum(map(_in_pages, grid.array_bytes(weight.rows, weight.columns)))


def _in_pages(size: int) -> int:
    """Large tensors take whole pages of their file, small ones lie in the graph as they are."""
    return size if size <= INLINE_BYTES else size + -size % PAGE


def out_of_reach(budget: int, smallest: int) -> BadInput:
    """What is said of a budget below the smallest bundle, in bytes."""
    return BadInput(
        f"quantize.budget: no bundle of this model fits {budget / 1e6:.1f} MB; the smallest, every weight "
        f"at 4 bits and in wide groups, takes {math.ceil(smallest / 1e5) / 10:.1f} MB"
    )


def knapsack(
    costs: NDArray[np.int64], losses: NDArray[np.float64], budget: int
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """One option for each item at the least total loss: the multiple-choice knapsack, exactly.

    costs and losses: [items, options]. Returns least_losses [budget + 1], the least loss at a total cost of
    at most 0, 1, ... budget (inf: impossible), and picks [items, budget + 1] for `picks_at`.
    """
    least, picks = np.zeros(budget + 1), np.zeros((len(costs), budget + 1), np.uint8)
    for item, (item_costs, item_losses) in enumerate(zip(costs, losses)):
        totals = np.full((len(item_costs), budget + 1), np.inf)
        for row, cost, added in zip(totals, item_costs, item_losses):
            row[cost:] = least[: max(0, budget + 1 - cost)] + added
        picks[item], least = totals.argmin(0), totals.min(0)
    return least, picks


def picks_at(costs: NDArray[np.int64], picks: NDArray[np.uint8], budget: int) -> tuple[int, ...]:
    """The option of each item in the solution for `budget`."""
    options: list[int] = []
    for item_costs, item_picks in zip(reversed(costs), reversed(picks)):
        options.append(int(item_picks[budget]))
        budget -= int(item_costs[options[-1]])
    return tuple(reversed(options))
