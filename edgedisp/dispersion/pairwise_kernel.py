"""Angular and cosine dispersion over every pair of tokens, without the tokens x tokens matrix.

Square blocks of the upper triangle of the cosine matrix each add to a sum of exponentials and are dropped;
the backward pass computes each again (the idea of FlashAttention, arXiv 2205.14135). Up to BLOCK tokens are a
single block, whose slopes the forward pass saves. With v a token vector, n its norm, c_ij = v_i v_j / (n_i
n_j), D the distance and s = -D / temperature, the loss of N tokens is `log sum_{i != j} exp(s_ij) - log N(N -
1)`. Its gradient, with G_ij = 2 P_ij s'(c_ij) and P the softmax of s over the pairs, is

    dL/dv_i = sum_j M_ij v_j,   M_ij = G_ij / (n_i n_j),   M_ii = -sum_j G_ij c_ij / n_i^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BLOCK = 256  # fits the second-level cache, and the matrix product runs at full speed
LEAST_TEMPERATURE = 0.05  # scores then spread over less than 60: a float32 sum needs no running maximum
SHORTEST = 1e-6  # shorter vectors are treated as this long: a zero vector has no direction
FORMS = ("angular", "cosine")


def precise(vectors: Tensor) -> Tensor:
    """In float32, or float64 if they are."""
    return vectors if vectors.dtype == torch.float64 else vectors.float()


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Let float32 matrix products on the CPU round their inputs to `bf16` and still add up in float32;
    `none` changes nothing. Compiled code cannot change the setting and computes in float32."""
    if precision == "none" or torch.compiler.is_compiling():
        yield
        return
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before


class _Pairs:
    """Blocks of the cosines of token vectors `(batch, n, features)`, and their scores s(c).

    A cosine is clamped for the score and its slope s'(c), as in `losses.angular_distance`.
    """

    def __init__(
        self, form: str, vectors: Tensor, mask: Tensor | None, temperature: float, clamp: float
    ) -> None:
        vectors = precise(vectors)
        # Padding may hold anything, NaN too.
        self.vectors = vectors if mask is None else torch.where(mask.unsqueeze(-1), vectors, 0.0)
        self.form, self.mask = form, mask
        self.inverse = torch.linalg.vector_norm(self.vectors, dim=-1).clamp_min_(SHORTEST).reciprocal_()
        self.edge = 1 - max(clamp, torch.finfo(vectors.dtype).eps)
        self.factor = 1 / (math.pi * temperature) if form == "angular" else 1 / temperature

    def blocks(self) -> list[tuple[slice, slice]]:
        """Of the upper triangle, diagonal blocks included."""
        tokens = self.vectors.shape[1]
        edges = [slice(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]
        return [(row, column) for index, row in enumerate(edges) for column in edges[index:]]

    def block(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines, clamped cosines, and scores: minus infinity for a token with itself or padding."""
        cosines = torch.bmm(self.vectors[:, rows], self.vectors[:, columns].mT)
        cosines.mul_(self.inverse[:, rows, None]).mul_(self.inverse[:, None, columns])
        clamped = cosines.clamp(-self.edge, self.edge)
        if self.form == "angular":
            scores = torch.arccos(clamped).mul_(-self.factor)
        else:
            scores = (clamped - 1).mul_(self.factor)
        if rows == columns:
            scores.diagonal(dim1=-2, dim2=-1).fill_(-math.inf)
        if self.mask is not None:
            scores.masked_fill_(~(self.mask[:, rows, None] & self.mask[:, None, columns]), -math.inf)
        return cosines, clamped, scores

    def times_slope(self, weights: Tensor, clamped: Tensor, share: Tensor | float = 1.0) -> Tensor:
        """`weights * s'(c) * share`, the first two used up."""
        if self.form == "angular":
            weights.mul_(torch.addcmul(clamped.new_ones(()), clamped, clamped, value=-1).rsqrt_())
        return weights.mul_(share * self.factor)

    def log_total(self) -> Tensor:
        """Log of the sum of exp(score) over ordered pairs, `(batch,)`; -inf without a pair."""
        total = self.inverse.new_zeros(len(self.vectors))
        for rows, columns in self.blocks():
            *_, scores = self.block(rows, columns)
            total += scores.exp_().sum(dim=(-2, -1)) * (1 if rows == columns else 2)
        return total.log()

    def gradient(self, log_total: Tensor) -> Tensor:
        """dL/dv by blocks, each computed anew; `(batch, n, features)`."""
        gradient = torch.zeros_like(self.vectors)
        radial = torch.zeros_like(self.inverse)
        for rows, columns in self.blocks():
            cosines, clamped, scores = self.block(rows, columns)
            slopes = self.times_slope(scores.sub_(log_total[:, None, None]).exp_(), clamped)
            along = cosines.mul_(slopes)
            radial[:, rows] += along.sum(dim=-1)
            slopes.mul_(self.inverse[:, rows, None]).mul_(self.inverse[:, None, columns])
            gradient[:, rows] += torch.bmm(slopes, self.vectors[:, columns])
            if rows != columns:
                radial[:, columns] += along.sum(dim=-2)
                gradient[:, columns] += torch.bmm(slopes.mT, self.vectors[:, rows])
        gradient.addcmul_(self.vectors, (radial * self.inverse.square()).unsqueeze(-1), value=-1)
        return gradient.mul_(2)

    def in_one_block(self) -> tuple[Tensor, Tensor]:
        """`log_total`, and the matrix M of the module docstring."""
        everything = slice(0, self.vectors.shape[1])
        cosines, clamped, scores = self.block(everything, everything)
        weights = scores.exp_()
        total = weights.sum(dim=(-2, -1))
        # Without a pair all weights are 0, and so is M.
        slopes = self.times_slope(weights, clamped, (2 / total.clamp_min(1e-30))[:, None, None])
        radial = cosines.mul_(slopes).sum(dim=-1)
        matrix = slopes.mul_(self.inverse[:, :, None]).mul_(self.inverse[:, None, :])
        matrix.diagonal(dim1=-2, dim2=-1).copy_(radial.mul_(self.inverse).mul_(self.inverse).neg_())
        return total.log(), matrix


class _LogSumExpOverPairs(torch.autograd.Function):
    """`log sum_{i != j} exp(s_ij)` of each sequence, `(batch,)`."""

    @staticmethod
    def forward(
        ctx: Any, vectors: Tensor, mask: Tensor | None, options: tuple[str, float, float], precision: str
    ) -> Tensor:
        form, *numbers = options
        matrix = None
        with matmul_precision(precision):
            pairs = _Pairs(form, vectors, mask, *numbers)
            if vectors.shape[1] <= BLOCK and ctx.needs_input_grad[0]:
                log_total, matrix = pairs.in_one_block()
            else:
                log_total = pairs.log_total()
        ctx.options, ctx.precision = options, precision
        ctx.save_for_backward(vectors, mask, log_total, matrix)
        return log_total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Autograd would take the slopes of the forward pass for constants. `once_differentiable` refuses only
        # where `upstream` depends on the vectors, and not a term that is just added to others.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the dispersion loss has no second derivative (create_graph=True)")
        vectors, mask, log_total, matrix = ctx.saved_tensors
        form, *numbers = ctx.options
        pairs, upstream = _Pairs(form, vectors, mask, *numbers), upstream[:, None, None]
        with matmul_precision(ctx.precision):
            if matrix is not None:
                gradient = torch.bmm(matrix * upstream, pairs.vectors)
            else:
                # Without a pair the sum is 0 and the softmax must come out as zeros.
                no_nan = log_total.masked_fill(log_total == -math.inf, math.inf)
                gradient = pairs.gradient(no_nan).mul_(upstream)
        return gradient.to(vectors.dtype), None, None, None


def pairwise_loss(
    form: str,
    vectors: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    clamp: float = 0.1,
    precision: str = "none",
) -> Tensor:
    """`log mean exp(-D / temperature)` over pairs: `(batch,)`, float32, or float64 for float64 vectors.

    `angular`, the paper's: D is the angle of a pair over pi. With the defaults -0.144 for equal vectors,
    -0.856 for opposite ones. `cosine`: D = 1 - cosine; Diffuse and Disperse has D = -cosine.

    vectors: `(batch, tokens, features)`, any float dtype. mask: `(batch, tokens)` bool; None when all are
    real. precision: `bf16` lets matrix products round their inputs. `create_graph` raises RuntimeError.
    """
    tokens = vectors.shape[1]
    with torch.autocast(vectors.device.type, enabled=False):
        log_total = _LogSumExpOverPairs.apply(vectors, mask, (form, temperature, clamp), precision)
    if mask is None and tokens > 1:
        return log_total - math.log(tokens * (tokens - 1))
    count = log_total.new_full(log_total.shape, tokens) if mask is None else mask.sum(dim=1)
    pairs = (count * (count - 1)).clamp_min(1).to(log_total.dtype)
    return torch.where(count > 1, log_total - pairs.log(), 0.0)
