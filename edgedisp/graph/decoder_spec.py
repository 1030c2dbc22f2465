"""The neutral description of a decoder that lies between a torch model and its graph.

Weights are views of the torch model, not copies: a `Linear` lists the matrices that are stored one above the
other, and only the writer joins them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of the rotary angles, each [context, head_dim / 2]."""


@dataclass(frozen=True)
class Linear:
    """`y = x W^T + b`. `weights` [out_i, in] are stored as one [sum(out_i), in]; `biases` alike, if any.

    `rows` int64 [sum(out_i)]: the order in which rows (and biases) are stored; None: as they are.
    """

    name: str
    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...] = ()
    rows: torch.Tensor | None = None

    def joined(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """`weights` or `biases` as one tensor, rows in stored order."""
        whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return whole if self.rows is None else whole[self.rows]


@dataclass(frozen=True)
class Norm:
    """`weight` [n] as it multiplies (Gemma's 1 + w already added). LayerNorm with a bias, RMSNorm without."""

    name: str
    weight: torch.Tensor
    epsilon: float
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One block: x + attention(norm(x)), then x + mlp(norm(x)). Gemma also norms what is added; a parallel
    block is x + attention(norm(x)) + mlp(other_norm(x)). A gated MLP has gate and up as one product in `up`.
    """

    attention_norm: Norm
    qkv: Linear
    attention_output: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    scale: float
    window: int | None = None
    rope: str | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    attention_output_norm: Norm | None = None
    mlp_output_norm: Norm | None = None
    is_gated: bool = False
    is_parallel: bool = False

    def linears(self) -> tuple[Linear, ...]:
        """Every linear map of the block."""
        return self.qkv, self.attention_output, self.up, self.down


@dataclass(frozen=True)
class Decoder:
    """What a decoder-only model computes. `embedding` [vocab, hidden]; `head` None means tied to it."""

    architecture: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    activation: str
    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: torch.Tensor | None = None
    embedding_scale: float = 1.0
    positions: torch.Tensor | None = None  # learned positions [context, hidden]
    ropes: dict[str, Rope] = field(default_factory=dict)
    logit_softcap: float = 0.0
