"""What each method minimizes is not above what rounding to nearest leaves; GPTQ against its paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_grids import grids
from torch import Tensor

from edgedisp.pipeline.options import BundleRounding
from edgedisp.pipeline.rounding import SCALES, trained_roundings, write_scales
from edgedisp.quantize.gptq import gptq, refit
from edgedisp.quantize.grid import (
    METHODS,
    Blocks,
    Grid,
    Scales,
    dequantize,
    in_groups,
    quantize,
    round_to,
)
from edgedisp.recipe import QuantizeBits


def drawn(seed: int, *shape: int) -> Tensor:
    """Heavy-tailed, as weights are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.rand(*shape, generator=generator).exp()


def second_moment(seed: int, columns: int, tokens: int) -> Tensor:
    """Of correlated inputs with columns of unequal size."""
    mixing = torch.eye(columns) + 0.5 * drawn(seed + 1, columns, columns) / columns**0.5
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    x = drawn(seed, tokens, columns) @ mixing * torch.logspace(-1, 1, columns)[order]
    return x.T @ x / tokens


def layer_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    difference = (weight - rounded).double()
    return float(((difference @ hessian.double()) * difference).sum())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), grid=grids, rows=st.integers(1, 5), columns=st.integers(1, 150))
def test_k_quant_is_no_worse_than_rounding(seed: int, grid: Grid, rows: int, columns: int) -> None:
    weight, importance = drawn(seed, rows, columns), drawn(seed + 1, columns).square() + 1e-3
    k_quant, rtn = (
        ((dequantize(blocks, grid) - weight).double().square() * importance).sum()
        for blocks in (METHODS["k_quant"](weight, grid, importance), quantize(weight, grid))
    )
    assert k_quant <= rtn * (1 + 1e-5)


@pytest.mark.parametrize(
    ("grid", "measured", "by_size"),
    [
        (Grid(4, 32, False), 0.762, 0.882),
        (Grid(4, 32, True), 0.722, 0.899),
        (Grid(4, 64, False), 0.803, 0.923),
    ],
)
def test_k_quant_leaves_so_much_of_the_error_of_rounding(grid: Grid, measured: float, by_size: float) -> None:
    weight, importance = drawn(3, 64, 256), drawn(4, 256).square() + 1e-3
    values = in_groups(weight, grid.group)
    larger = (values.abs() + values.square().mean(-1, keepdim=True).sqrt()).flatten(1)  # llama.cpp's
    for given_importance, cost, share in ((importance, importance, measured), (None, larger, by_size)):
        k_quant, rtn = (
            ((dequantize(blocks, grid) - weight).square() * cost).sum()
            for blocks in (METHODS["k_quant"](weight, grid, given_importance), quantize(weight, grid))
        )
        assert float(k_quant / rtn) == pytest.approx(share, abs=0.001)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), grid=grids, columns=st.integers(1, 150))
@pytest.mark.parametrize("name", METHODS)
def test_zeros_stay_and_powers_of_two_pass_through(name: str, seed: int, grid: Grid, columns: int) -> None:
    weight = drawn(seed, 3, columns)
    weight[1] = 0
    blocks, larger = (METHODS[name](values, grid, None) for values in (weight, weight * 8))
    rounded = dequantize(blocks, grid)
    assert not rounded[1].any() and torch.isfinite(rounded).all()
    scales = blocks.scales.abs().repeat_interleave(grid.group, dim=1)[:, :columns]
    exact = scales >= 2.0**-14  # below, fp16 has fewer digits
    assert torch.equal(dequantize(larger, grid)[exact], rounded[exact] * 8)


def by_the_paper(weight: Tensor, start: Blocks, hessian: Tensor, grid: Grid, order: list[int]) -> Tensor:
    """Optimal brain quantization, one weight after the other in float64: after each, what remains of the row
    moves by -(w - q) H^-1_{j,:} / H^-1_jj, and the row and column j of H^-1 are eliminated."""
    w = weight.double().numpy().copy()
    inverted = np.linalg.inv(hessian.double().numpy())
    scales = start.scales.double().numpy()
    zeros = np.full(scales.shape, grid.middle) if start.zero_points is None else start.zero_points.numpy()
    rounded = np.zeros_like(w)
    for j in order:
        s, z = scales[:, j // grid.group], zeros[:, j // grid.group].astype(float)
        steps = np.divide(w[:, j], s, out=np.zeros_like(s), where=s != 0)
        rounded[:, j] = (np.clip(np.rint(steps + z), 0, grid.highest) - z) * s
        error = (w[:, j] - rounded[:, j]) / inverted[j, j]
        w -= error[:, None] * inverted[j]
        inverted -= np.outer(inverted[:, j], inverted[j]) / inverted[j, j]
    return torch.from_numpy(rounded).float()


@pytest.mark.parametrize(
    "grid", [Grid(4, 32, False), Grid(4, 16, True), Grid(8, 32, False), Grid(4, 64, True)]
)
def test_gptqs_integers_are_optimal_brain_quantization_and_refitting_lowers_the_error(grid: Grid) -> None:
    columns = 150  # more than one block of columns, and a ragged group
    weight, hessian = drawn(5, 12, columns), second_moment(6, columns, 400)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)  # the paper's 1 %
    start = METHODS["k_quant"](weight, grid, damped.diagonal())
    order = torch.argsort(damped.diagonal(), descending=True, stable=True).tolist()
    expected = by_the_paper(weight, start, damped, grid, order)
    blocks = gptq(weight, grid, hessian)[0]
    result = dequantize(Blocks(blocks.q, start.scales, start.zero_points, columns), grid)
    # A value that falls on the middle between two steps may go either way, and the rest of its row after it.
    same = torch.isclose(result, expected, rtol=1e-4, atol=1e-6).all(dim=1)
    assert same.float().mean() >= 0.75
    error = layer_error(weight, expected, damped)
    assert layer_error(weight, result, damped) == pytest.approx(error, rel=0.02)
    rounded, unfitted, refitted = (
        layer_error(weight, values, hessian)
        for values in (dequantize(quantize(weight, grid), grid), result, dequantize(blocks, grid))
    )
    assert unfitted < 0.6 * rounded and refitted < unfitted


def test_refitted_scales_solve_the_least_squares_problem() -> None:
    grid, columns = Grid(4, 16, False), 40
    weight, hessian = drawn(11, 5, columns), second_moment(12, columns, 100)
    blocks = quantize(weight, grid)
    result = refit(blocks, weight, grid, hessian)
    root = torch.linalg.cholesky(hessian.double()).T  # H = root^T root
    for row in range(len(weight)):
        centered = blocks.q[row].double() - blocks.zero_points[row, :, None].double()  # type: ignore[index]
        design = torch.zeros(columns, 3, dtype=torch.float64)
        for g in range(3):
            stop = min(columns, (g + 1) * 16)
            design[g * 16 : stop, g] = centered[g, : stop - g * 16]
        solved = torch.linalg.lstsq(root @ design, root @ weight[row].double()).solution
        torch.testing.assert_close(result.scales[row].double(), solved, rtol=1e-3, atol=1e-5)
    # The unit of the activations does not matter, and a group of zeros keeps its scale.
    torch.testing.assert_close(refit(blocks, weight, grid, hessian * 1e-9).scales, result.scales)
    grid = Grid(4, 16, True)
    q = torch.full((1, 2, 16), 8, dtype=torch.uint8)
    q[0, 1] = 9
    blocks = Blocks(q, torch.tensor([[0.5, 0.5]]), None, 32)
    weight = torch.cat([torch.zeros(1, 16), torch.ones(1, 16)], dim=1)
    assert refit(blocks, weight, grid, torch.eye(32)).scales.tolist() == [[0.5, 1.0]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), grid=grids, rows=st.integers(1, 5), columns=st.integers(2, 150))
def test_the_latent_weight_rounds_to_gptqs_integers(seed: int, grid: Grid, rows: int, columns: int) -> None:
    weight, hessian = drawn(seed, rows, columns), second_moment(seed + 1, columns, 3 * columns)
    blocks, latent = gptq(weight, grid, hessian)
    scales = Scales(blocks.scales, blocks.zero_points)
    again = round_to(in_groups(latent, grid.group), scales, grid, columns)
    flat = [part.q.reshape(rows, -1)[:, :columns] for part in (again, blocks)]
    assert torch.equal(*flat)
    half_steps = 0.5 * blocks.scales.abs().repeat_interleave(grid.group, 1)[:, :columns]
    assert ((latent - dequantize(blocks, grid)).abs() <= half_steps).all()  # a clipped value too


@pytest.mark.parametrize("grid", [Grid(4, 32, False), Grid(4, 32, True)])
def test_without_correlation_nothing_is_corrected_and_the_latent_weight_is_the_weight(grid: Grid) -> None:
    weight = drawn(3, 64, 256)
    blocks, latent = gptq(weight, grid, torch.eye(256))
    steps = (latent - weight).abs() / blocks.scales.abs().repeat_interleave(grid.group, 1)
    assert (steps < 0.05).float().mean() > 0.95  # the others were clipped, or rounded across a half


def test_a_model_trained_under_gptq_is_rounded_on_its_scales_or_not_at_all(tmp_path: Path) -> None:
    section = QuantizeBits(method="gptq", group=16, symmetric=False)
    grid, weight = Grid(4, 16, False), drawn(3, 6, 40)
    start = quantize(weight, grid)
    scales = Scales(start.scales * 0.5, start.zero_points)
    write_scales({"up.weight": scales}, tmp_path)
    layers, _ = trained_roundings(BundleRounding(4, section), tmp_path)
    expected = dequantize(round_to(in_groups(weight, 16), scales, grid, 40), grid)
    assert torch.equal(layers("up.weight", weight), expected)
    with pytest.raises(KeyError, match=r"down\.weight"):
        layers("down.weight", weight)
    (tmp_path / SCALES).unlink()
    with pytest.raises(FileNotFoundError, match=r"scales\.safetensors"):
        trained_roundings(BundleRounding(4, section), tmp_path)
