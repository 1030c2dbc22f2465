"""Bits, group and method for each weight, searched under a budget of bytes or of perplexity.

Rounding a weight W to Q adds about 1/2 sum_ij F_ij (W - Q)_ij^2 nats per token to KL(model || rounded model),
F being the diagonal of the Fisher matrix (Hassibi & Stork 1992). One pass with gradients over training text
gives F for all weights. Costs add up, so one exact knapsack over bytes gives the least predicted KL for every
size of file. A limit on perplexity is met by bisection, with whole models measured.

The search of the first arm decides for all, so that twins are stored alike; the others follow its record.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.graph.onnx_graph import GRAPH, INLINE_BYTES, PAGE
from edgedisp.quantize.calibration import CalibrationText, gptq_model, read_weight, write_weight
from edgedisp.quantize.grid import Blocks, Choice, Grid, dequantize
from edgedisp.quantize.onnx_weights import embedding_and_head, find_uses, read_fp32_graph, read_weight_map

FOUR_BITS = tuple(Grid(4, group, symmetric) for symmetric in (False, True) for group in (16, 32, 64, 128))
EIGHT_BITS = tuple(Grid(8, group, True) for group in (32, 64, 128))
# k_quant never has a larger weighted error than rtn; at 8 bits the difference is worth nothing.
METHOD = {4: "k_quant", 8: "rtn"}
CANDIDATES = tuple(Choice(grid, METHOD[grid.bits]) for grid in (*FOUR_BITS, *EIGHT_BITS))
INT4, INT8 = CANDIDATES.index(Choice(FOUR_BITS[1], "k_quant")), CANDIDATES.index(Choice(EIGHT_BITS[0], "rtn"))
"""Of the layers of uniform bundles, whose embedding and head have 8 bits."""

TEXT_TOKENS, BLOCK_TOKENS = 4096, 256  # on which gradients are taken and rounded models are measured
TRIALS = 5  # whole models measured for a limit on perplexity
CURVE_POINTS = 24
STATES = 1 << 16  # sizes of file that the knapsack tells apart
NODE_BYTES = 1100  # by which a weight's new nodes and names lengthen the graph file
SAMPLED_ROWS = 64  # of a weight, rounded to see what a candidate loses

Tokens = NDArray[Any]
"""Unsigned [blocks, context]."""


@dataclass(frozen=True)
class Weight:
    """What is rounded by one choice: `parameters` of the torch model, one above the other, whose rows are
    the weights `names` of the graph: one, or equal parts (Phi-3's gate and up). outer: embedding or head."""

    names: tuple[str, ...]
    parameters: tuple[str, ...]
    outer: bool

    def modules(self, model: nn.Module) -> list[Any]:
        return [model.get_submodule(name.removesuffix(".weight")) for name in self.parameters]


@dataclass(frozen=True)
class Rounded:
    """A rounded model: its blocks by torch parameter, KL(unrounded || rounded) in nats per token, and the
    share by which its perplexity is higher, on training text."""

    blocks: dict[str, Blocks]
    measured_kl: float
    perplexity_increase: float


@dataclass(frozen=True)
class Solution:
    """assignment: weight of the graph -> its choice. size_bytes: of graph and weights, to a step of the
    search. predicted_kl: nats per token, of weights rounded one by one."""

    assignment: dict[str, Choice]
    size_bytes: int
    predicted_kl: float

    def point(self, name: str) -> dict[str, Any]:
        return {"name": name, "size_bytes": self.size_bytes, "predicted_kl": self.predicted_kl}


class MixedPrecision:
    """The weights of the fp32 bundle `source`, exported from the torch `model`, each rounded by its choice.

    tokens: training text. calibration: text for GPTQ; None: the layers are rounded weight by weight.
    """

    def __init__(
        self,
        source: Path,
        model: nn.Module,
        tokens: Tokens,
        calibration: CalibrationText | None,
        progress: Progress,
    ) -> None:
        self.model, self.calibration = model.eval().requires_grad_(False), calibration
        self.progress, self.blocks, self.weights = progress, text_blocks(tokens), find_weights(source)
        self.tokens = sum(map(len, self.blocks))
        self.fisher = fisher(model, self.weights, self.blocks, progress)

    @torch.no_grad()
    def round(self, assignment: Mapping[str, Choice]) -> Rounded:
        """Round a copy of the model, the layers by GPTQ where there is calibration text, and measure it."""
        model, blocks = copy.deepcopy(self.model), dict[str, Blocks]()
        if self.calibration is not None:
            layers = [weight for weight in self.weights if not weight.outer]
            grids = {
                name: assignment[weight.names[0]].grid for weight in layers for name in weight.parameters
            }
            blocks = gptq_model(model, self.calibration, grids, progress=self.progress)
        for index, weight in enumerate(self.weights):
            self.progress(index, len(self.weights), "rounding each weight")
            choice = assignment[weight.names[0]]
            for name, module in zip(weight.parameters, weight.modules(model)):
                if name not in blocks:
                    blocks[name] = choice.blocks(read_weight(module), self.fisher[weight])
                    write_weight(module, dequantize(blocks[name], choice.grid))
        kl = increase = 0.0
        for index, block in enumerate(self.blocks):
            self.progress(index, len(self.blocks), "measuring the rounded model")
            before, after = (
                each(input_ids=block[None], use_cache=False).logits[0].float().log_softmax(-1)
                for each in (self.model, model)
            )
            kl += float(kl_div(after, before, reduction="sum", log_target=True))
            increase += float((before - after)[:-1].gather(1, block[1:, None]).double().sum())
        predicted_tokens = max(1, self.tokens - len(self.blocks))
        return Rounded(blocks, max(kl / self.tokens, 0.0), math.expm1(increase / predicted_tokens))


class Search(MixedPrecision):
    """Solutions under a budget. Deterministic."""

    def __init__(self, source: Path, *others: Any) -> None:
        super().__init__(source, *others)
        losses, stored = zip(*map(self._losses_and_bytes, self.weights))
        self.losses, sizes = np.array(losses), np.array(stored)
        self._step = 1 << max(0, math.ceil(math.log2(sizes.max(1).sum() / STATES)))
        self._costs = -(-sizes // self._step)
        self._least, self._picks = knapsack(self._costs, self.losses, int(self._costs.max(1).sum()))
        names = {name for weight in self.weights for name in weight.names}
        values = read_fp32_graph(source).graph.initializers.values()
        fp32 = (value.const_value.nbytes for value in values if value.const_value and value.name not in names)
        self._fixed_bytes = (source / GRAPH).stat().st_size + NODE_BYTES * len(names) + _in_pages(fp32)

    def _losses_and_bytes(self, weight: Weight) -> tuple[list[float], list[int]]:
        """Of each candidate: predicted KL in nats per token, seen on some rows, and bytes in the files."""
        values, fisher = torch.cat([*map(read_weight, weight.modules(self.model))]), self.fisher[weight]
        sample = values[torch.linspace(0, len(values) - 1, min(SAMPLED_ROWS, len(values))).round().long()]
        losses = []
        for choice in CANDIDATES:
            error = dequantize(choice.blocks(sample, fisher), choice.grid) - sample
            losses.append(0.5 * float((error.square() @ fisher).double().mean()))
        parts, (rows, columns) = len(weight.names), values.shape
        arrays = (choice.grid.array_bytes(rows // parts, columns) for choice in CANDIDATES)
        return losses, [parts * _in_pages(sizes) for sizes in arrays]

    def within(self, budget: int) -> Solution:
        """The least predicted KL in at most `budget` bytes. BadInput says what the smallest bundle takes."""
        steps = min((budget - self._fixed_bytes) // self._step, len(self._least) - 1)
        if steps < 0 or math.isinf(self._least[steps]):
            raise out_of_reach(budget, self._smallest().size_bytes)
        return self._at(steps)

    def below(self, increase: float) -> tuple[Solution, Rounded]:
        """The smallest file whose perplexity on training text is at most 1 + `increase` times the model's,
        and the rounded model. BadInput says what can be reached."""
        low, high = float(self._least[-1]), self._smallest().predicted_kl
        limit, best = min(max(math.log1p(increase), low), high), None
        for trial in range(TRIALS):
            if best is None and trial == TRIALS - 1:
                limit = low
            solution = self._smallest(limit)
            rounded = self.round(solution.assignment)
            if rounded.perplexity_increase <= increase:
                best, low = (solution, rounded), limit
            else:
                high = limit
            if best is not None and high <= 1.02 * low:
                break
            limit = math.sqrt(max(low, 1e-3 * high) * high)
        if best is None:
            least = f"the least there is, on training text, is {rounded.perplexity_increase:.2%}"
            raise BadInput(f"quantize.max_perplexity_increase: {increase:.2%} cannot be reached; {least}")
        return best

    def record(self, solution: Solution, rounded: Rounded) -> dict[str, Any]:
        """What was chosen and from what: {predicted_kl; points: the solution with its measured KL, uniform
        bundles; curve: least predicted KL by size; sensitivity: weight -> predicted KL at 4 bits}. A point is
        {name, size_bytes, predicted_kl}; KL in nats per token."""
        span = np.argmax(np.isfinite(self._least)), np.argmin(self._least)
        sizes = np.unique(np.linspace(*span, CURVE_POINTS).round().astype(int))
        points = [solution.point("chosen") | {"measured_kl": rounded.measured_kl}]
        for name, layers in (("uniform int4", INT4), ("uniform int8", INT8)):
            uniform = self._solution([INT8 if weight.outer else layers for weight in self.weights])
            points.append(uniform.point(name))
        return {
            "predicted_kl": solution.predicted_kl,
            "points": points,
            "curve": [self._at(size).point("curve") for size in sizes],
            "sensitivity": {
                name: loss
                for weight, loss in zip(self.weights, self.losses[:, INT4])
                for name in weight.names
            },
        }

    def _smallest(self, limit: float = sys.float_info.max) -> Solution:
        """The smallest file at a predicted KL of at most `limit`, or at the least one there is."""
        return self._at(int(np.argmax(self._least <= max(limit, self._least[-1]))))

    def _at(self, steps: int) -> Solution:
        return self._solution(picks_at(self._costs, self._picks, steps))

    def _solution(self, picks: Sequence[int]) -> Solution:
        assignment = {
            name: CANDIDATES[pick] for weight, pick in zip(self.weights, picks) for name in weight.names
        }
        indices = range(len(picks)), list(picks)
        size = self._fixed_bytes + int(self._costs[indices].sum()) * self._step
        return Solution(assignment, size, float(self.losses[indices].sum()))


def assignment_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Choice]:
    """The choices of another bundle's record (`by_tensor`)."""
    grids = {row["name"]: Grid(row["bits"], row["group"], row["symmetric"]) for row in rows}
    return {name: Choice(grid, METHOD[grid.bits]) for name, grid in grids.items()}


def text_blocks(tokens: Tokens) -> list[Tensor]:
    """Blocks int64 [tokens] from all over a corpus, of up to TEXT_TOKENS tokens."""
    length = min(BLOCK_TOKENS, tokens.shape[1])
    count = min(-(-TEXT_TOKENS // length), len(tokens))
    indices = np.linspace(0, len(tokens) - 1, count).round().astype(int)
    return [torch.from_numpy(tokens[index][:length].astype(np.int64)) for index in indices]


def find_weights(bundle: Path) -> list[Weight]:
    """The weights of an fp32 bundle. BuildFailed names one that is none of the model's."""
    uses, origins = find_uses(read_fp32_graph(bundle).graph), read_weight_map(bundle)
    if unknown := uses.keys() - origins.keys():
        raise BuildFailed(f"{bundle}: {min(unknown)} is no weight of the model")
    outer, names_of = embedding_and_head(uses), dict[tuple[str, ...], list[str]]()
    for name in uses:
        names_of.setdefault(origins[name].parameters, []).append(name)
    return [
        Weight(tuple(names), parameters, not outer.isdisjoint(names))
        for parameters, names in names_of.items()
    ]


def fisher(
    model: nn.Module, weights: Sequence[Weight], blocks: Sequence[Tensor], progress: Progress = silent
) -> dict[Weight, Tensor]:
    """Weight -> F [columns]: the Fisher matrix's diagonal summed over rows, in nats per token. Half of it is
    what a squared error in every row of a column adds to KL(model || rounded).

    F is the mean squared gradient of the log-likelihood of blocks (int64 [tokens]), their next tokens drawn
    from the model. Columns that no gradient reaches get a little, so that rounding has a cost everywhere.
    """
    modules = {name: m for weight in weights for name, m in zip(weight.parameters, weight.modules(model))}
    parameters = [module.weight.requires_grad_() for module in modules.values()]
    sums = dict.fromkeys(weights, torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    for index, block in enumerate(blocks):
        progress(index, len(blocks), "what an error in each weight costs")
        logits = model(input_ids=block[None], use_cache=False).logits[0].float()
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = cross_entropy(logits, labels, reduction="sum")
        gradients = dict(zip(modules, torch.autograd.grad(loss, parameters)))
        for weight in weights:
            for name in weight.parameters:
                rows = 1 if isinstance(modules[name], Conv1D) else 0
                sums[weight] = sums[weight] + gradients[name].float().square().sum(rows)
    model.requires_grad_(False)
    means = {weight: total / sum(map(len, blocks)) for weight, total in sums.items()}
    return {weight: mean.clamp(min=1e-6 * float(mean.mean()) + 1e-30) for weight, mean in means.items()}


def _in_pages(sizes: Iterable[int]) -> int:
    """Bytes of tensors: large ones take whole pages of their file, small ones lie in the graph."""
    return sum(size if size <= INLINE_BYTES else size + -size % PAGE for size in sizes)


def out_of_reach(budget: int, smallest: int) -> BadInput:
    """What is said of a budget below the smallest bundle, in bytes."""
    takes = f"the smallest takes {math.ceil(smallest / 1e5) / 10:.1f} MB"
    return BadInput(f"quantize.budget: no bundle of this model fits {budget / 1e6:.1f} MB; {takes}")


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
