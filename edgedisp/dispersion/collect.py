"""Gather token vectors layer by layer in a model's forward pass, and turn them into one loss.

Hooks on the decoder layers keep a reference to each layer's output: the next layer needs that tensor for
its backward pass anyway, so nothing is kept alive that would have been freed. The loss itself is computed
once, after the forward pass, for all layers together. Gradient checkpointing recomputes only the inside
of a layer (transformers 5), where these hooks do not stand, so no layer is counted twice.

Random numbers: which tokens are sampled depends on (seed, step) alone, through a generator of the
collector's own. The model's dropout and data order therefore never notice whether dispersion is on, and
a resumed run draws what the uninterrupted run would have drawn, with no state to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgedisp.dispersion.loss import VARIANTS


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a causal language model, bare or wrapped by peft.

    They are the module list that is as long as `config.num_hidden_layers`.
    Raises ValueError for a model without such a list.
    """
    config = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {depth} transformer layers to watch")


def select_layers(choice: str | Sequence[int], depth: int) -> list[int]:
    """Indices (from 0) of the layers named by `all`, `first_half`, `last_half`, `last`, or a list.

    Raises ValueError for another word or an index outside the model: a misspelt choice must not mean `all`.
    """
    named = {
        "all": range(depth),
        "first_half": range(depth // 2),
        "last_half": range(depth // 2, depth),
        "last": range(depth - 1, depth),
    }
    if isinstance(choice, str):
        if choice not in named:
            raise ValueError(f"layers {choice!r} is not one of {', '.join(named)} or a list of indices")
        return list(named[choice])
    outside = [index for index in choice if not 0 <= index < depth]
    if outside:
        raise ValueError(f"layers {outside} are outside the model, which has layers 0 to {depth - 1}")
    return sorted(set(choice))


def _stream(*numbers: int) -> int:
    """A seed for each combination of numbers; neighbouring steps and layers get unrelated streams."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest())


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def hidden_states(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of `layers` (before any final norm) of each forward pass inside the block.

    Yields a dict, layer index -> `(batch, tokens, features)`; clear it between passes.
    Index -1 stands for the input of the first layer (the embedding output).
    """
    blocks = decoder_layers(model)
    seen: dict[int, Tensor] = {}

    def keep(index: int) -> nn.Module:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[index] = _tensor(output)

        return blocks[index].register_forward_hook(hook)  # type: ignore[return-value]

    def keep_embedding(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen[-1] = args[0] if args else kwargs["hidden_states"]

    handles = [keep(index) for index in layers if index >= 0]
    if -1 in layers:
        handles.append(blocks[0].register_forward_pre_hook(keep_embedding, with_kwargs=True))  # type: ignore[arg-type]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[operator]
        seen.clear()


class Dispersion:
    """The dispersion term of a training loss, averaged over sequences and watched layers.

    Args:
        variant: a name in `loss.VARIANTS`.
        weight: lambda in `CE + lambda * L`. The collector only carries it; the caller multiplies.
        layers: `all`, `first_half`, `last_half`, `last` or indices from 0.
        temperature: tau of the loss.
        tokens: how many tokens of each sequence are sampled, anew for each layer; None means all.
        clamp: see `loss.angular`.
        exclude_sink: leave out the first token of each sequence, whose norm is up to 100 times the others'.
        seed: of the collector's own random stream.

    Raises ValueError for an unknown variant or layer choice.
    """

    def __init__(
        self,
        *,
        variant: str = "angular",
        weight: float = 0.1,
        layers: str | Sequence[int] = "all",
        temperature: float = 1.0,
        tokens: int | None = 256,
        clamp: float = 0.1,
        exclude_sink: bool = False,
        seed: int = 0,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
        self.variant, self.weight, self.layers = variant, weight, layers
        self.temperature, self.tokens, self.clamp = temperature, tokens, clamp
        self.exclude_sink, self.seed = exclude_sink, seed
        self._seen: dict[int, Tensor] = {}

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Dispersion]:
        """Keep the outputs of the chosen layers of every forward pass inside the block."""
        chosen = select_layers(self.layers, len(decoder_layers(model)))
        with hidden_states(model, chosen) as self._seen:
            yield self
        self._seen = {}

    def loss(self, mask: Tensor | None = None, *, step: int = 0) -> Tensor:
        """The mean over layers and sequences of the forward pass just made; scalar, float32 or better.

        Args:
            mask: `(batch, tokens)`, true or 1 for a real token; None means that there is no padding.
            step: number of this pass; with the seed it decides which tokens are sampled.
        Raises ValueError if no forward pass was seen.
        """
        if not self._seen:
            raise ValueError("no forward pass to compute the dispersion of: run the model inside watch()")
        states = [self._seen[index] for index in sorted(self._seen)]
        self._seen.clear()  # a second loss of the same pass would be a mistake, and the tensors are large
        batch, tokens, _ = states[0].shape
        device = states[0].device
        real = torch.ones(batch, tokens, dtype=torch.bool, device=device) if mask is None else mask.bool()
        if self.exclude_sink:
            # The first REAL token is the sink, also under left padding.
            real = real & (real.cumsum(dim=1) > 1)
        picked = [self._sample(state, real, layer, step) for layer, state in enumerate(states)]
        vectors = torch.stack([vectors for vectors, _ in picked])
        masks = torch.stack([kept for _, kept in picked])
        with torch.autocast(device_type=device.type, enabled=False):
            values = VARIANTS[self.variant](
                vectors, masks, temperature=self.temperature, clamp=self.clamp
            )  # (layers, batch)
        # Sequences without a pair have value 0 and do not count in the mean.
        counted = (masks.sum(dim=-1) > 1).sum().clamp_min(1)
        return values.sum() / counted

    def _sample(self, state: Tensor, real: Tensor, layer: int, step: int) -> tuple[Tensor, Tensor]:
        """A random subset of the real tokens of each sequence: `(batch, n, features)`, `(batch, n)`."""
        tokens = state.shape[1]
        if self.tokens is None or self.tokens >= tokens:
            return state, real
        # Drawn on the CPU so that CPU and GPU runs pick the same tokens.
        generator = torch.Generator().manual_seed(_stream(self.seed, step, layer))
        keys = torch.rand(real.shape, generator=generator).to(real.device)
        index = keys.masked_fill(~real, -1.0).topk(self.tokens, dim=1).indices.sort(dim=1).values
        vectors = state.gather(1, index.unsqueeze(-1).expand(-1, -1, state.shape[-1]))
        return vectors, real.gather(1, index)
