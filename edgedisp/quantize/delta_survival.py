"""What training changed in each weight, and how much of it is left after quantization.

A short training moves a weight by a fraction of a step. Rounded, it may land on the same integer as before,
and the change is gone. For the change d = trained - reference, and the change dq of the rounded weights,
under the scales and zero points of the shipped bundle:

    beyond_half_step  share of weights with |d| > step / 2
    integers_moved    share whose integer differs
    slope             <dq, d> / <d, d>: 1, the change survives on average; 0, nothing of it does
    cosine            between dq and d; what it lacks of 1 is rounding noise
    rms_steps         root mean square of d / step
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from onnx import helper
from torch import Tensor

from edgedisp.core.progress import Progress, silent
from edgedisp.quantize.grid import Blocks, Grid, Packed, in_groups, inverse, round_to, unpack
from edgedisp.quantize.onnx_rewrite import FP16
from edgedisp.quantize.onnx_weights import (
    QUANTIZED,
    component,
    find_uses,
    read_graph,
    read_tensor,
    read_weight_map,
)

COMPARED_VALUES = 1 << 22  # values compared at a time


class Sums(NamedTuple):
    """Sums over weights from which the figures are computed."""

    weights: float = 0
    beyond: float = 0
    moved: float = 0
    nearest: float = 0
    squared: float = 0  # of d
    squared_steps: float = 0  # of d / step
    squared_rounded: float = 0  # of dq
    product: float = 0  # of d and dq

    @classmethod
    def total(cls, parts: Iterable[Sums]) -> Sums:
        return cls(*map(sum, zip(cls(), *parts)))

    def figures(self) -> dict[str, Any]:
        """The shares and ratios; None where nothing changed."""
        norms = (self.squared * self.squared_rounded) ** 0.5
        return {
            "weights": self.weights,
            "beyond_half_step": self.beyond / self.weights,
            "integers_moved": self.moved / self.weights,
            "rms_steps": (self.squared_steps / self.weights) ** 0.5,
            "slope": self.product / self.squared if self.squared else None,
            "cosine": self.product / norms if norms else None,
        }


def survival(
    bundle: Path,
    parent: Path,
    trained: Mapping[str, Tensor],
    references: Mapping[str, Mapping[str, Tensor]],
    progress: Progress = silent,
) -> dict[str, Any]:
    """What is left in quantized `bundle` of the change from each of `references` to `trained`.

    parent: the fp32 bundle of `bundle`. trained, references: tensors of torch models of one shape, by name.

    Returns {nearest, unmatched [tensor], references {name: {total, bits {bits: ...}, components {name: ...},
    layers [{layer, ...}]}}} with `Sums.figures` in each; `total` is None without a tensor. `nearest`: share
    of shipped integers nearest to the trained weight (less than 1 for GPTQ). `unmatched`: packed tensors that
    a model lacks.
    """
    origins, uses = read_weight_map(parent), find_uses(read_graph(parent).graph)
    changes: dict[str, dict[tuple[str, int], Sums]] = {name: {} for name in references}
    unmatched: list[str] = []
    packed = list(packed_weights(bundle))
    for index, (name, stored, grid) in enumerate(packed):
        progress(index, len(packed), "what is left of the change")
        origin, models = origins.get(name), (trained, *references.values())
        if origin is None or any(p not in model for p in origin.parameters for model in models):
            unmatched.append(name)
            continue
        after, blocks = origin.weight(trained, uses[name][0].rows_first), unpack(stored, grid)
        for reference, tensors in references.items():
            before = origin.weight(tensors, uses[name][0].rows_first)
            changes[reference][name, grid.bits] = compare(after, before, blocks, grid)
    total = Sums.total(next(iter(changes.values()), {}).values())
    return {
        "nearest": total.nearest / total.weights if total.weights else None,
        "unmatched": unmatched,
        "references": {name: _summary(by_tensor) for name, by_tensor in changes.items()},
    }


def packed_weights(bundle: Path) -> Iterator[tuple[str, Packed, Grid]]:
    """Every weight that a bundle holds on the block grid: name, packed arrays, grid."""
    graph = read_graph(bundle).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    seen = set()
    for node in graph.node:
        name = node.input[2].removesuffix(".scales") if len(node.input) > 2 else ""
        if node.op_type not in QUANTIZED or name in seen:
            continue
        seen.add(name)  # a tied embedding has two readers
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        zero_points = tensors.get(f"{name}.zero_points")
        grid = Grid(options["bits"], options["block_size"], zero_points is None)
        scales = read_tensor(bundle, tensors[f"{name}.scales{FP16}"])
        data = read_tensor(bundle, tensors[f"{name}.q{grid.bits}"]).reshape(*scales.shape, -1)
        points = None if zero_points is None else read_tensor(bundle, zero_points)
        # A gather does not say how much of its last group is padding; the weight itself does.
        yield name, Packed(data, scales, points, options.get("K", scales.shape[1] * grid.group)), grid


def compare(trained: Tensor, reference: Tensor, blocks: Blocks, grid: Grid) -> Sums:
    """The change from `reference` to `trained`, both fp32 [out, in], under the steps of `blocks`."""
    parts, columns = [], trained.shape[1]
    size = max(1, COMPARED_VALUES // columns)
    for rows in (slice(start, start + size) for start in range(0, len(trained), size)):
        part = blocks.rows(rows)
        after, before = (in_groups(weight[rows], grid.group) for weight in (trained, reference))
        q, q_before = (
            round_to(values, part.scales, part.zero_points, grid, columns).q for values in (after, before)
        )
        d, integers, step = after - before, q.float() - q_before.float(), part.scales[..., None]
        dq, steps = integers * step, d * inverse(step)
        weights = trained[rows].numel()
        parts.append(
            Sums(
                weights=weights,
                beyond=int((d.abs() > step.abs() / 2).sum()),
                moved=int((integers != 0).sum()),
                nearest=int((q == part.q).sum()) - (after.numel() - weights),  # less the padding
                squared=_dot(d, d),
                squared_steps=_dot(steps, steps),
                squared_rounded=_dot(dq, dq),
                product=_dot(d, dq),
            )
        )
    return Sums.total(parts)


def _dot(left: Tensor, right: Tensor) -> float:
    return float(left.flatten() @ right.flatten())


def _summary(changes: Mapping[tuple[str, int], Sums]) -> dict[str, Any]:
    """The figures of all tensors (name, bits), and apart by bits, component and layer."""

    def figures_by(key: Callable[[str, int], Any]) -> dict[Any, dict[str, Any]]:
        groups: dict[Any, list[Sums]] = {}
        for tensor, change in changes.items():
            groups.setdefault(key(*tensor), []).append(change)
        return {name: Sums.total(parts).figures() for name, parts in groups.items() if name is not None}

    def layer(name: str, bits: int) -> int | None:
        number = re.search(r"\.(\d+)\.", name)
        return int(number[1]) if number else None

    return {
        "total": Sums.total(changes.values()).figures() if changes else None,
        "bits": dict(sorted(figures_by(lambda name, bits: str(bits)).items())),
        "components": figures_by(lambda name, bits: component(name)),
        "layers": [{"layer": key, **figures} for key, figures in sorted(figures_by(layer).items())],
    }
