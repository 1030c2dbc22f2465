"""AWQ's scaling (Lin et al. 2023, arXiv 2306.00978): the same model in other weights, which round better.

Input channels differ in size by orders of magnitude, and a weight's rounding error costs the more the larger
its input is. Multiplying a column of the weight by s > 1 and dividing the channel by s leaves the product as
it was, but shrinks that column's error against its group's step. Here 1 / s is folded into whatever makes the
channel, so that nothing is left to compute at run time: into a norm's weight (and bias) before q, k and v or
gate and up, or into the rows of the map before (v before o, up before down). Rows cost nothing: each has
scales of its own.

    s = size^a, normalized to sqrt(min s * max s) = 1      a searched in [0, 1], 0 = as it was

`size` is a channel's root mean square over calibration tokens (the paper: its mean magnitude). Searched is
the a of the least error of the maps that read the channels, `e H e^T` summed over (up to 512) rows, with H
the mean of x x^T and e = Q(w s) / s - w under the rounding given.

Which folds leave a layer's function as it is depends on its family: Gemma's norms multiply by 1 + w, gated
products are linear in `up` alone, relu lets a scale through and gelu does not, grouped heads share channels
of v. None of this is listed. Every fold that the shapes allow is tried on the layer with random scales, and
used only where the output stays what it was.

Left out: the norm before the head (a tied head is the embedding, whose rows nobody can rescale back), and
the paper's search under the whole block's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.quantize.calibrate import (
    LayerCall,
    layer_calls,
    second_moment,
    states_before,
    waves_of,
)

Held = Callable[[Tensor], Tensor]
"""A weight fp32 [out, in] -> the weight as it is held once rounded, of the same shape."""

SEARCHED_ROWS = 512  # of each map: the error's sum over rows hardly differs from that over all of them
SMALLEST = 1e-4  # a channel counts as at least this share of the largest one


@dataclass(frozen=True)
class Fold:
    """`source` makes channels that only `readers` multiply with: input column j is its output `rows[j]`."""

    source: Any
    readers: tuple[Any, ...]
    rows: Tensor  # int64 [in of the readers]
    offset: float = 0.0  # a norm that multiplies by its weight and this

    def apply(self, scales: Tensor) -> None:
        """Divide the source's channels by `scales` [channels of the source], multiply the columns."""
        rows = _rows(self.source)
        turned = scales if rows.ndim == 1 else scales[:, None]
        rows.copy_((rows + self.offset) / turned - self.offset)
        if getattr(self.source, "bias", None) is not None:
            self.source.bias.div_(scales)
        for reader in self.readers:
            _rows(reader).mul_(scales[self.rows])

    def parameters(self) -> list[Tensor]:
        return [own for module in (self.source, *self.readers) for own in module.parameters(recurse=False)]

    def columns_of(self) -> Tensor:
        """How many input columns each of the source's channels is; 0: another map's, which stays as it is."""
        return torch.bincount(self.rows, minlength=len(_rows(self.source)))

    def scales(self, sizes: Tensor, exponent: float) -> Tensor:
        """size^a [channels of the source], the least and the largest around 1; 1 for channels not read."""
        read = self.columns_of() > 0
        scales = sizes.pow(exponent)
        least, most = torch.aminmax(scales[read])
        return torch.where(read, scales / (least * most).sqrt(), torch.ones_like(scales))

    def sizes(self, second: Tensor) -> Tensor:
        """Root mean square [channels of the source] under H [in, in], positive."""
        columns = self.columns_of()
        squares = torch.zeros(len(columns), dtype=second.dtype, device=second.device)
        squares.index_add_(0, self.rows, second.diagonal())
        found = (squares / columns.clamp(min=1)).sqrt()
        return found.clamp(min=SMALLEST * float(found.max().clamp(min=1e-30)))


@torch.no_grad()
def rescale(
    model: nn.Module,
    layers: nn.ModuleList,
    tokens: NDArray[Any],
    held: Held,
    *,
    steps: int = 10,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Rescale the weights of `layers` in place; the model computes what it computed, up to rounding in fp32.

    tokens: unsigned integers [blocks, context], all real text. `held` rounds a weight as the bundle will.
    `steps` exponents are tried beside 0. Returns a row for each fold: {source, readers (names), exponent,
    error_ratio: what is left of the error with exponent 0}. BadInput without calibration text.
    """
    if not len(tokens):
        raise BadInput("no calibration text: at least one block of tokens is needed")
    model.eval()
    blocks = torch.from_numpy(np.asarray(tokens, np.int64))
    names = {module: name for name, module in model.named_modules()}
    calls = layer_calls(model, layers, blocks[0])
    states = [states_before(model, layers[0], block) for block in blocks]
    rows: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        progress(index, len(layers), "rescaling layer by layer")
        for fold in find_folds(call, states[0], _head_dim(model.config)):
            second = second_moment(call, fold.readers[0], states)
            exponent, ratio, scales = _search(fold, second, held, steps)
            fold.apply(scales)
            readers = [names[reader] for reader in fold.readers]
            rows.append(
                {
                    "source": names[fold.source],
                    "readers": readers,
                    "exponent": exponent,
                    "error_ratio": ratio,
                }
            )
        states = [call(state) for state in states]
    progress(len(layers), len(layers), "rescaling layer by layer")
    return rows


def _search(fold: Fold, second: Tensor, held: Held, steps: int) -> tuple[float, float, Tensor]:
    """The best exponent, its error against that of exponent 0, and its scales."""
    sizes = fold.sizes(second)
    weights = [_rows(reader) for reader in fold.readers]
    weights = [weight[:: -(-len(weight) // SEARCHED_ROWS)] for weight in weights]
    best = (torch.inf, 0.0, torch.ones_like(sizes))
    plain = 0.0
    for exponent in (step / steps for step in range(steps + 1)):
        scales = fold.scales(sizes, exponent)
        columns = scales[fold.rows]
        error = 0.0
        for weight in weights:
            difference = held(weight * columns) / columns - weight
            error += float(((difference @ second) * difference).sum())
        plain = error if exponent == 0 else plain
        if error < best[0]:
            best = (error, exponent, scales)
    return best[1], best[0] / plain if plain > 0 else 1.0, best[2]


# ---------------------------------------------------------------- what can be folded


def find_folds(call: LayerCall, state: Tensor, head_dim: int | None) -> list[Fold]:
    """The folds of a layer that leave its output on `state` [1, tokens, features] as it is."""
    waves = waves_of(call, state)
    norms = _norms_of(call, state, waves)
    before = call(state)
    found: list[Fold] = []
    for index, wave in enumerate(waves):
        candidates = [*_after_norm(norms.get(index), wave)]
        if len(wave) == 1:
            earlier = [module for wave in reversed(waves[:index]) for module in reversed(wave)]
            candidates += [fold for source in earlier for fold in _after_map(source, wave[0], head_dim)]
        fold = next((fold for fold in candidates if _holds(fold, call, state, before)), None)
        if fold is not None:
            found.append(fold)
    return found


def _norms_of(call: LayerCall, state: Tensor, waves: list[list[nn.Module]]) -> dict[int, nn.Module]:
    """Wave index -> the module whose output it reads as it is, if that has one weight for each channel."""
    made: list[tuple[nn.Module, Tensor]] = []  # outputs are kept, as an address could be used twice
    read: dict[nn.Module, Tensor] = {}
    firsts = {wave[0]: index for index, wave in enumerate(waves)}
    handles = [first.register_forward_pre_hook(lambda m, args: read.update({m: args[0]})) for first in firsts]
    for module in call.layer.modules():
        if getattr(getattr(module, "weight", None), "ndim", 0) == 1:
            handles.append(module.register_forward_hook(lambda m, args, out: made.append((m, out))))
    try:
        call(state)
    finally:
        for handle in handles:
            handle.remove()
    return {firsts[m]: norm for m, x in read.items() for norm, output in made if output is x}


def _after_norm(norm: nn.Module | None, wave: list[nn.Module]) -> Iterator[Fold]:
    if norm is not None:
        channels = torch.arange(len(_rows(norm)))
        for offset in (0.0, 1.0):
            yield Fold(norm, tuple(wave), channels, offset)


def _after_map(source: nn.Module, reader: nn.Module, head_dim: int | None) -> Iterator[Fold]:
    """Ways in which the last outputs of `source` can be the inputs of `reader`: one each; each head of v
    for several heads of the attention; or v as the last third of each head (GPT-NeoX)."""
    outputs, inputs = len(_rows(source)), _rows(reader).shape[1]
    columns = torch.arange(inputs)
    if outputs >= inputs:
        yield Fold(source, (reader,), columns + outputs - inputs)
    if head_dim is None or inputs % head_dim:
        return
    heads = inputs // head_dim
    head, within = columns // head_dim, columns % head_dim
    for shared in (n for n in range(2, heads + 1) if heads % n == 0):  # query heads for a head of v
        width = inputs // shared
        if outputs in (width, inputs + 2 * width):
            yield Fold(source, (reader,), outputs - width + head // shared * head_dim + within)
    if outputs == 3 * inputs:
        yield Fold(source, (reader,), (3 * head + 2) * head_dim + within)


def _holds(fold: Fold, call: LayerCall, state: Tensor, before: Tensor) -> bool:
    """Whether the layer's output stays the same under random scales; everything is put back."""
    generator = torch.Generator().manual_seed(0)
    drawn = fold.scales(torch.rand(len(_rows(fold.source)), generator=generator).add(0.5), 1.0)
    own = fold.parameters()
    kept = [parameter.clone() for parameter in own]
    fold.apply(drawn)
    after = call(state)
    for parameter, values in zip(own, kept):
        parameter.copy_(values)
    # For each token against what the layer adds to it; the first token of some models is 100 times larger.
    allowed = 1e-3 * (before - state).norm(dim=-1) + 1e-5 * before.norm(dim=-1)
    return bool(((after - before).norm(dim=-1) <= allowed).all())


def _rows(module: Any) -> Tensor:
    """The weight as [out, in] (a view), or [channels] of a norm."""
    weight: Tensor = module.weight.data
    return weight.T if isinstance(module, Conv1D) else weight


def _head_dim(config: Any) -> int | None:
    heads = getattr(config, "num_attention_heads", None)
    found = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    return int(found) if found else None
