"""What training changed in each weight, and how much of it survives on the grid that ships.

A weight moves by a fraction of a step in a short training. Rounded, it may land on the same integer as
before, and the change is gone; near an edge it moves by a whole step. For the change d = trained - reference,
and the change dq of the rounded weights, under the scales and zero points of the shipped bundle:

    beyond_half_step  share of weights with |d| > step / 2
    integers_moved    share whose integer differs
    slope             <dq, d> / <d, d>: 1, the change survives on average; 0, nothing of it does
    cosine            between dq and d; what it lacks of 1 is rounding noise
    rms_steps         root mean square of d / step

`nearest` is the share of shipped integers nearest to the trained weight (less than 1 for GPTQ, which makes up
for errors elsewhere). What stays in fp32 keeps every change and is not counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from edgedisp.core.progress import Progress, silent
from edgedisp.graph.onnx_graph import GRAPH
from edgedisp.quantize.grid import Blocks, Grid, Packed, in_groups, inverse, round_to, unpack
from edgedisp.quantize.onnx_rewrite import COMPARED_VALUES, FP16
from edgedisp.quantize.onnx_weights import component, find_uses, read_tensor
from edgedisp.quantize.weight_map import read_weight_map

PACKED = ("MatMulNBits", "GatherBlockQuantized")


@dataclass
class Change:
    """Sums over weights from which the figures are made; sums of two are the sum of both."""

    weights: int = 0
    changed: int = 0
    beyond: int = 0
    moved: int = 0
    nearest: int = 0
    squared: float = 0.0  # of d
    squared_steps: float = 0.0  # of d / step
    squared_rounded: float = 0.0  # of dq
    product: float = 0.0  # of d and dq

    def add(self, other: Change) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def figures(self) -> dict[str, Any]:
        """The shares and ratios; None where nothing changed."""
        moved = self.squared * self.squared_rounded
        return {
            "weights": self.weights,
            "changed": self.changed / self.weights,
            "beyond_half_step": self.beyond / self.weights,
            "integers_moved": self.moved / self.weights,
            "rms_steps": (self.squared_steps / self.weights) ** 0.5,
            "slope": self.product / self.squared if self.squared else None,
            "cosine": self.product / moved**0.5 if moved else None,
        }


@dataclass(frozen=True)
class _Row:
    name: str
    grid: Grid
    change: Change

    @property
    def layer(self) -> int | None:
        number = re.search(r"\.(\d+)\.", self.name)
        return int(number[1]) if number else None


def survival(
    bundle: Path,
    parent: Path,
    trained: Mapping[str, Tensor],
    references: Mapping[str, Mapping[str, Tensor]],
    progress: Progress = silent,
) -> dict[str, Any]:
    """What is left in quantized `bundle` of the change from each of `references` to `trained`.

    parent: the fp32 bundle of `bundle`. trained, references: tensors of torch models of one shape, by name.

    Returns {nearest, unmatched [tensor], references {name: {total, bits {bits: ...}, components, layers
    [{layer, ...}], tensors [{name, component, layer, bits, group, ...}]}}}; the figures (`Change.figures`)
    stand in each, `total` is None without a tensor. `unmatched`: packed tensors that a model lacks.
    ValueError for other shapes.
    """
    origins = read_weight_map(parent)
    uses = find_uses(onnx.load(parent / GRAPH, load_external_data=False).graph)
    rows: dict[str, list[_Row]] = {name: [] for name in references}
    unmatched: list[str] = []
    packed = list(shipped(bundle))
    for done, (name, stored, grid) in enumerate(packed):
        progress(done, len(packed), "what is left of the change")
        origin, blocks = origins.get(name), unpack(stored, grid)
        if origin is None or any(
            p not in one for p in origin.parameters for one in (trained, *references.values())
        ):
            unmatched.append(name)
            continue
        rows_first = uses[name][0].rows_first
        after = origin.weight(trained, rows_first)
        for reference, tensors in references.items():
            change = compare(after, origin.weight(tensors, rows_first), blocks, grid)
            rows[reference].append(_Row(name, grid, change))
    every = next(iter(rows.values()), [])
    weights = sum(row.change.weights for row in every)
    return {
        "nearest": sum(row.change.nearest for row in every) / weights if weights else None,
        "unmatched": unmatched,
        "references": {name: _summary(found) for name, found in rows.items()},
    }


def shipped(bundle: Path) -> Iterator[tuple[str, Packed, Grid]]:
    """Every weight that a bundle holds on the block grid: name, packed arrays, grid."""
    graph = onnx.load(bundle / GRAPH, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    seen = set()
    for node in graph.node:
        if node.op_type in PACKED and node.input[2] not in seen:
            seen.add(node.input[2])  # a tied embedding has two readers
            yield _packed(bundle, node, stored)


def _packed(bundle: Path, node: NodeProto, stored: Mapping[str, TensorProto]) -> tuple[str, Packed, Grid]:
    options = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    name = node.input[2].removesuffix(".scales")
    zero_points = stored.get(f"{name}.zero_points")
    grid = Grid(options["bits"], options["block_size"], zero_points is None)
    scales = read_tensor(bundle, stored[f"{name}.scales{FP16}"])
    rows, groups = scales.shape
    data = read_tensor(bundle, stored[f"{name}.q{grid.bits}"]).reshape(rows, groups, -1)
    zeros = None if zero_points is None else read_tensor(bundle, zero_points)
    # A gather does not say how much of its last group is padding; the weight itself does.
    return name, Packed(data, scales, zeros, options.get("K", groups * grid.group)), grid


def compare(trained: Tensor, reference: Tensor, blocks: Blocks, grid: Grid) -> Change:
    """The change from `reference` to `trained`, both fp32 [out, in], under the steps of `blocks`."""
    if reference.shape != trained.shape:
        raise ValueError(
            f"a weight {tuple(trained.shape)} cannot be compared with one {tuple(reference.shape)}"
        )
    total = Change(weights=trained.numel())
    size = max(1, COMPARED_VALUES // trained.shape[1])
    for rows in (slice(start, start + size) for start in range(0, len(trained), size)):
        scales = blocks.scales[rows]
        zero_points = None if blocks.zero_points is None else blocks.zero_points[rows]
        after, before = (in_groups(one[rows], grid.group) for one in (trained, reference))
        q, q_before = (
            round_to(one, scales, zero_points, grid, trained.shape[1]).q for one in (after, before)
        )
        d, integers, step = after - before, q.float() - q_before.float(), scales[..., None]
        dq, steps = integers * step, d * inverse(step)
        padding = after.numel() - trained[rows].numel()
        total.add(
            Change(
                changed=int((d != 0).sum()),
                beyond=int((d.abs() > step.abs() / 2).sum()),
                moved=int((integers != 0).sum()),
                nearest=int((q == blocks.q[rows]).sum()) - padding,
                squared=_product(d, d),
                squared_steps=_product(steps, steps),
                squared_rounded=_product(dq, dq),
                product=_product(d, dq),
            )
        )
    return total


def _product(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))


def _summary(rows: list[_Row]) -> dict[str, Any]:
    def of(some: list[_Row]) -> dict[str, Any] | None:
        total = Change()
        for row in some:
            total.add(row.change)
        return total.figures() if some else None

    layers = sorted({row.layer for row in rows if row.layer is not None})
    bits = sorted({row.grid.bits for row in rows})
    parts = dict.fromkeys(component(row.name) for row in rows)
    return {
        "total": of(rows),
        "bits": {str(width): of([row for row in rows if row.grid.bits == width]) for width in bits},
        "components": {part: of([row for row in rows if component(row.name) == part]) for part in parts},
        "layers": [{"layer": n, **(of([row for row in rows if row.layer == n]) or {})} for n in layers],
        "tensors": [
            {
                "name": row.name,
                "component": component(row.name),
                "layer": row.layer,
                "bits": row.grid.bits,
                "group": row.grid.group,
                **row.change.figures(),
            }
            for row in rows
        ],
    }
