"""What remains of a change on the grid that ships: against plain loops, and through whole bundles."""

from __future__ import annotations

from pathlib import Path

import graph_twins
import numpy as np
import pytest
import torch

from edgedisp.graph.export import export
from edgedisp.models import load_weights
from edgedisp.quantize.delta_survival import compare, figures, survival
from edgedisp.quantize.grid import Grid, quantize
from edgedisp.quantize.onnx_rewrite import quantize_bundle


def random_weight(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_loops(trained: torch.Tensor, reference: torch.Tensor, grid: Grid) -> dict[str, float]:
    """The figures, one value at a time, with scales and zero points of the trained weight."""
    blocks = quantize(trained, grid)
    beyond = moved = 0
    steps, d2, dq2, product = 0.0, 0.0, 0.0, 0.0
    for row in range(trained.shape[0]):
        for column in range(trained.shape[1]):
            group = column // grid.group
            step = float(blocks.scales[row, group])
            zero = grid.middle if blocks.zero_points is None else int(blocks.zero_points[row, group])

            def integer(value: float, step: float = step, zero: int = zero) -> int:
                return min(max(round(float(np.float32(value) / np.float32(step))) + zero, 0), grid.highest)

            after, before = float(trained[row, column]), float(reference[row, column])
            d, dq = after - before, (integer(after) - integer(before)) * step
            beyond += abs(d) > abs(step) / 2
            moved += dq != 0
            steps, d2, dq2, product = steps + (d / step) ** 2, d2 + d * d, dq2 + dq * dq, product + d * dq
    count, slope, cosine = trained.numel(), product / d2, product / (d2 * dq2) ** 0.5
    shares = {"beyond_half_step": beyond / count, "integers_moved": moved / count}
    return {"weights": count, "rms_steps": (steps / count) ** 0.5, "slope": slope, "cosine": cosine, **shares}


@pytest.mark.parametrize("grid", [Grid(8, 32, True), Grid(4, 16, False)])
def test_the_figures_are_those_of_plain_loops(grid: Grid) -> None:
    trained = random_weight(6, 80, seed=0)
    reference = trained + 0.04 * random_weight(6, 80, seed=1)
    expected = by_loops(trained, reference, grid)
    assert expected["integers_moved"] > 0
    sums = compare(trained, reference, quantize(trained, grid), grid)
    assert figures(sums) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", ["llama", graph_twins.UNTIED, "gpt2", "smollm3"])
def test_every_packed_tensor_is_compared_with_the_torch_models(form: str, tmp_path: Path) -> None:
    base, trained, fp32, int4 = (tmp_path / name for name in ("base", "trained", "fp32", "int4"))
    model = graph_twins.make(base, form)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter += 0.01 * random_weight(*parameter.shape, seed=seed)
    model.save_pretrained(trained)
    graph_twins.save_tokenizer(trained)
    for folder in (fp32, int4):
        folder.mkdir()
    export(trained, fp32, threads=1)
    rows = quantize_bundle(fp32, int4, bits=4, symmetric=False, method="k_quant")["by_tensor"]
    before, after = load_weights(base), load_weights(trained)
    result = survival(int4, fp32, rows, {"base": before, "trained": after, "itself": after})
    assert result["nearest"] == 1.0
    against_base = result["references"]["base"]
    matrices = sum(p.numel() for n, p in before.items() if p.ndim == 2 and "wpe" not in n)
    assert against_base["total"]["weights"] == matrices
    assert 0 < against_base["total"]["integers_moved"] < 0.5 and against_base["total"]["rms_steps"] > 0
    for parts in (against_base["components"], against_base["tensors"]):
        assert sum(part["weights"] for part in parts.values()) == matrices
    assert result["references"]["itself"]["total"]["rms_steps"] == 0.0
