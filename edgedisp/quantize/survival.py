"""What training changed in each weight, and what is left of it on the grid that ships.

A weight moves by a fraction of a step in a short training. Rounded, it may land on the same integer as
before, and the change is gone; or, having been near an edge, it moves by a whole step. So a few figures are
told of the change d of a weight (trained - reference) under the steps of the shipped bundle:

- `beyond_half_step`: share of weights with |d| > step / 2: more likely than not on another integer.
- `integers_moved`: share whose integer differs between trained and reference, both rounded to nearest with
  the scales and zero points that ship. For weights spread evenly over a step it is the mean of |d| / step.
- `slope`: of the rounded change dq upon d, <dq, d> / <d, d>. 1: what is lost here is gained there, and the
  change is all there on average. 0: nothing of it.
- `cosine`: between dq and d. What it lacks of 1 is rounding noise.
- `rms_steps`: root mean square of d / step.

`nearest` is the share of shipped integers that are the nearest ones to the trained weight: 1 for methods that
choose scales alone, less for GPTQ, which makes up for errors elsewhere. What stays in fp32
(norms, biases, positions) keeps every change and is not counted.

One tensor is in memory at a time, and worked on in slices of rows.
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
from edgedisp.quantize.components import component
from edgedisp.quantize.grid import Blocks, Grid, Packed, in_groups, inverse, round_to, unpack
from edgedisp.quantize.operators import HALF
from edgedisp.quantize.origin import Origins, gather
from edgedisp.quantize.rewrite import SLICE_VALUES
from edgedisp.quantize.store import GRAPH, read
from edgedisp.quantize.uses import find_uses

PACKED = ("MatMulNBits", "GatherBlockQuantized")


@dataclass
class Change:
    """Sums over weights from which the figures are made; sums of two are the sum of both."""

    weights: int = 0
    changed: int = 0
    beyond: int = 0
    moved: int = 0
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


def survival(
    bundle: Path,
    parent: Path,
    trained: Mapping[str, Tensor],
    references: Mapping[str, Mapping[str, Tensor]],
    progress: Progress = silent,
) -> dict[str, Any]:
    """What is left in quantized `bundle` of the change from each of `references` to `trained`.

    parent: the fp32 bundle that `bundle` was made from. trained: the torch model's tensors by name, of which
    `parent` was made. references: name -> the tensors of a model of the same shapes.

    Returns {nearest, unmatched [tensor], references {name: {total, bits {bits: ...}, components,
    layers [{layer, ...}], tensors [{name, component, layer, bits, group, ...}]}}}; the figures
    (`Change.figures`) stand in each, `total` is None without a tensor. `unmatched`: packed tensors that are
    no weight of `trained`, or that a reference does not have. ValueError for a reference of other shapes.
    """
    origins = Origins(trained)
    graph = onnx.load(parent / GRAPH, load_external_data=False).graph
    sources = {tensor.name: tensor for tensor in graph.initializer}
    rows_first = {name: users[0].rows_first for name, users in find_uses(graph).items()}
    rows: dict[str, list[_Row]] = {name: [] for name in references}
    unmatched: list[str] = []
    nearest = weights = 0
    packed = list(shipped(bundle))
    for done, (name, held, grid) in enumerate(packed):
        progress(done, len(packed), "what is left of the change")
        stored = torch.from_numpy(read(parent, sources[name])) if name in rows_first else torch.empty(0, 0)
        weight = stored if rows_first.get(name, True) else stored.T
        runs = origins.find(weight) if len(weight) else None
        if runs is None or not all(run.name in one for run in runs for one in references.values()):
            unmatched.append(name)
            continue
        blocks = unpack(held, grid)
        nearest, weights = nearest + count_nearest(weight, blocks, grid), weights + weight.numel()
        for reference, before in references.items():
            change = compare(weight, gather(before, runs), blocks, grid)
            rows[reference].append(_Row(name, grid, change))
    return {
        "nearest": nearest / weights if weights else None,
        "unmatched": unmatched,
        "references": {name: _summed(found) for name, found in rows.items()},
    }


def shipped(bundle: Path) -> Iterator[tuple[str, Packed, Grid]]:
    """Every weight that a bundle holds on the block grid: name, packed arrays, grid."""
    graph = onnx.load(bundle / GRAPH, load_external_data=False).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    seen = set()
    for node in graph.node:
        if node.op_type not in PACKED or node.input[2] in seen:
            continue
        seen.add(node.input[2])  # a tied embedding has two readers
        yield _packed(bundle, node, stored)


def _packed(bundle: Path, node: NodeProto, stored: Mapping[str, TensorProto]) -> tuple[str, Packed, Grid]:
    options = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    name = node.input[2].removesuffix(".scales")
    zero_points = stored.get(f"{name}.zero_points")
    grid = Grid(options["bits"], options["block_size"], zero_points is None)
    scales = read(bundle, stored[f"{name}.scales{HALF}"])
    rows, groups = scales.shape
    data = read(bundle, stored[f"{name}.q{grid.bits}"]).reshape(rows, groups, -1)
    zeros = None if zero_points is None else read(bundle, zero_points)
    # A gather does not say how much of its last group is padding; the weight itself does.
    return name, Packed(data, scales, zeros, options.get("K", groups * grid.group)), grid


def compare(trained: Tensor, reference: Tensor, blocks: Blocks, grid: Grid) -> Change:
    """The change from `reference` to `trained`, both fp32 [out, in], under the steps of `blocks`."""
    if reference.shape != trained.shape:
        raise ValueError(
            f"a weight {tuple(trained.shape)} cannot be compared with one {tuple(reference.shape)}"
        )
    total = Change(weights=trained.numel())
    for rows in _slices(trained):
        scales = blocks.scales[rows]
        zero_points = None if blocks.zero_points is None else blocks.zero_points[rows]
        after, before = (in_groups(one[rows], grid.group) for one in (trained, reference))
        q_after, q_before = (
            round_to(one, scales, zero_points, grid, trained.shape[1]).q.float() for one in (after, before)
        )
        d, integers, step = after - before, q_after - q_before, scales[..., None]
        dq, steps = integers * step, d * inverse(step)
        total.add(
            Change(
                changed=int((d != 0).sum()),
                beyond=int((d.abs() > step.abs() / 2).sum()),
                moved=int((integers != 0).sum()),
                squared=_product(d, d),
                squared_steps=_product(steps, steps),
                squared_rounded=_product(dq, dq),
                product=_product(d, dq),
            )
        )
    return total


def count_nearest(weight: Tensor, blocks: Blocks, grid: Grid) -> int:
    """How many of the stored integers are the nearest to `weight` [out, in], given the stored scales."""
    equal = 0
    for rows in _slices(weight):
        zero_points = None if blocks.zero_points is None else blocks.zero_points[rows]
        values = in_groups(weight[rows], grid.group)
        plain = round_to(values, blocks.scales[rows], zero_points, grid, values[0].numel())
        padding = values.numel() - weight[rows].numel()
        equal += int((plain.q == blocks.q[rows]).sum()) - padding
    return equal


def _slices(weight: Tensor) -> list[slice]:
    step = max(1, SLICE_VALUES // weight.shape[1])
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def _product(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))


@dataclass(frozen=True)
class _Row:
    name: str
    grid: Grid
    change: Change

    @property
    def component(self) -> str:
        return component(self.name)

    @property
    def layer(self) -> int | None:
        number = re.search(r"\.(\d+)\.", self.name)
        return int(number[1]) if number else None


def _summed(rows: list[_Row]) -> dict[str, Any]:
    def of(chosen: list[_Row]) -> dict[str, Any] | None:
        total = Change()
        for row in chosen:
            total.add(row.change)
        return total.figures() if chosen else None

    layers = sorted({row.layer for row in rows if row.layer is not None})
    return {
        "total": of(rows),
        "bits": {
            str(bits): of([row for row in rows if row.grid.bits == bits])
            for bits in sorted({row.grid.bits for row in rows})
        },
        "components": {
            part: of([row for row in rows if row.component == part])
            for part in dict.fromkeys(row.component for row in rows)
        },
        "layers": [
            {"layer": layer, **(of([row for row in rows if row.layer == layer]) or {})} for layer in layers
        ],
        "tensors": [
            {
                "name": row.name,
                "component": row.component,
                "layer": row.layer,
                "bits": row.grid.bits,
                "group": row.grid.group,
                **row.change.figures(),
            }
            for row in rows
        ],
    }
