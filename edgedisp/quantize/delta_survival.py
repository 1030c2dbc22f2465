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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgedisp.core.progress import Progress, silent
from edgedisp.graph.onnx_graph import GRAPH, read_graph
from edgedisp.quantize.grid import Blocks, Grid, Scales, in_groups, inverse, round_to
from edgedisp.quantize.onnx_weights import find_uses, read_blocks, read_weight_map

COMPARED_VALUES = 1 << 22  # values compared at a time

Sums = NDArray[np.float64]
"""Over weights: their number, |d| > step / 2, moved, nearest, d^2, (d / step)^2, dq^2, d dq."""


def survival(
    bundle: Path,
    parent: Path,
    by_tensor: Sequence[Mapping[str, Any]],
    models: Mapping[str, Mapping[str, Tensor]],
    progress: Progress = silent,
) -> dict[str, Any]:
    """What is left in quantized `bundle` of the change to the model `trained` from each other of `models`.

    parent, by_tensor: the fp32 bundle of `bundle`, and how its weights are stored (`quantize_assigned`).
    models: tensors of torch models of one shape, by name.

    Returns {nearest, references {name: {total, components {name: ...}, tensors {name: ...}}}} with `figures`
    in each. `nearest`: share of shipped integers nearest to the trained weight (less than 1 for GPTQ).
    """
    origins, uses = read_weight_map(parent), find_uses(read_graph(parent / GRAPH).graph)
    stored = read_graph(bundle / GRAPH).graph.initializers
    sums: dict[str, dict[str, Sums]] = {name: {} for name in models if name != "trained"}
    for index, row in enumerate(by_tensor):
        progress(index, len(by_tensor), "what is left of the change")
        name, grid = row["name"], Grid(row["bits"], row["group"], row["symmetric"])
        trained, *references = (
            origins[name].weight(models[model], uses[name][0].rows_first) for model in ("trained", *sums)
        )
        blocks = read_blocks(stored, name, grid, trained.shape[1])
        for reference, weight in zip(sums, references):
            sums[reference][name] = compare(trained, weight, blocks, grid)
    results = {}
    for reference, tensors in sums.items():
        components: dict[str, Sums] = {}
        for row in by_tensor:
            components[row["component"]] = components.get(row["component"], 0) + tensors[row["name"]]
        total = sum(tensors.values(), start=np.zeros(8))
        results[reference] = {"total": figures(total)}
        for kind, parts_of in (("components", components), ("tensors", tensors)):
            results[reference][kind] = {name: figures(change) for name, change in parts_of.items()}
    return {"nearest": float(total[3] / total[0]), "references": results}


def compare(trained: Tensor, reference: Tensor, blocks: Blocks, grid: Grid) -> Sums:
    """The sums for `figures` of the change from `reference` to `trained`, both fp32 [out, in]."""
    sums, columns = np.zeros(8), trained.shape[1]
    size = max(1, COMPARED_VALUES // columns)
    for rows in (slice(start, start + size) for start in range(0, len(trained), size)):
        part = blocks.rows(rows)
        after, before = (in_groups(weight[rows], grid.group) for weight in (trained, reference))
        scales, step = Scales(part.scales, part.zero_points), part.scales[..., None]
        q, q_before = (round_to(values, scales, grid, columns).q for values in (after, before))
        d, integers = after - before, q.float() - q_before.float()
        dq, steps = integers * step, d * inverse(step)
        weights = trained[rows].numel()
        nearest = int((q == part.q).sum()) - (after.numel() - weights)  # less the padding
        counts = [weights, int((d.abs() > step.abs() / 2).sum()), int((integers != 0).sum()), nearest]
        pairs = [(d, d), (steps, steps), (dq, dq), (d, dq)]
        sums += counts + [float(left.flatten() @ right.flatten()) for left, right in pairs]
    return sums


def figures(sums: Sums) -> dict[str, Any]:
    """The shares and ratios of `compare`'s sums; None where nothing changed."""
    weights, beyond, moved, _, squared, squared_steps, squared_rounded, product = sums.tolist()
    norms = (squared * squared_rounded) ** 0.5
    return {
        "weights": int(weights),
        "beyond_half_step": beyond / weights,
        "integers_moved": moved / weights,
        "rms_steps": (squared_steps / weights) ** 0.5,
        "slope": product / squared if squared else None,
        "cosine": product / norms if norms else None,
    }
