"""The keys of `quantize`: type, bounds, default and meaning of each."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import Field

from edgedisp.recipe.kinds import (
    AccuracyLevel,
    Flag,
    Group,
    HeadBits,
    HeadBits8,
    Positive,
    Share,
    Size,
    Whole,
)
from edgedisp.recipe.section import Section

METHODS = (
    "rtn: round to nearest; clip, k_quant, hqq: ranges searched for each group by the weight alone; gptq: "
    "rounding errors made up for under calibration on the recipe's training text"
)


class QuantizeBits(Section):
    """One quantized bundle. Changing it never retrains."""

    group: Group = Field(default=32, description="weights that share one scale (and zero point)")
    symmetric: Flag = Field(
        default=True, description="no zero point; at 4 bits small models lose more that way"
    )
    accuracy_level: AccuracyLevel = Field(
        default=4,
        description="onnxruntime's arithmetic: 0 and 1 in fp32, 4 in int8, faster but coarser; auto: 4, but "
        "for the nodes whose rounding of activations changes too many tokens of the training text",
    )
    max_flips: Share = Field(
        default=0.05,
        description="accuracy_level auto: largest share of tokens whose best next token is another one than "
        "in fp32 arithmetic; near ties flip in any other",
        examples=["1%"],
    )
    head_bits: HeadBits = Field(
        default=8, description="bits of the output head (and of an embedding tied to it)"
    )
    head_group: Group | None = Field(
        default=None, description="weights of the head that share one scale; null: as group"
    )
    method: Literal["rtn", "clip", "k_quant", "hqq", "gptq", "nf4"] = Field(
        default="rtn",
        description=f"{METHODS}; nf4: bitsandbytes' 16 levels in blocks of `group` (there 64) for "
        "onnxruntime's MatMulBnb4, slow on CPUs and without an accuracy level; the head stays on the grid",
    )
    rescale: Flag = Field(
        default=False,
        description="before the method, AWQ's scaling: channels that are large on the training text get "
        "finer steps, folded into norms and neighbouring weights; clip (nearest to the paper's), k_quant and "
        "hqq then also weigh errors by their inputs",
    )
    calibration_tokens: Annotated[Whole, Ge(256)] = Field(
        default=16_384, description="training tokens that gptq and rescale calibrate on", examples=["16k"]
    )
    damping: Positive = Field(
        default=0.01, description="gptq: what is added to the diagonal, as a share of its mean"
    )
    act_order: Flag = Field(default=True, description="gptq: the most important columns first")
    correction: Share = Field(
        default=0.5,
        description="gptq, and other methods after rescale: the share of what rounding has changed so far "
        "that later weights make up for; 0: none",
    )

    @property
    def calibrated(self) -> bool:
        """Whether quantizing reads the model and the training text, not the fp32 bundle alone."""
        return self.rescale or self.method == "gptq"


class Int8(QuantizeBits):
    """The int8 bundle."""

    method: Literal["rtn", "clip", "k_quant", "hqq", "gptq"] = Field(default="rtn", description=METHODS)
    head_bits: HeadBits8 = Field(default=8, description="bits of the output head")


class Int4(QuantizeBits):
    """The int4 bundle."""

    symmetric: Flag = Field(default=False, description="no zero point; small models lose more that way")


class Quantize(Section):
    """How the quantized bundles are made."""

    int8: Int8 = Field(default_factory=Int8, description="the int8 bundle")
    int4: Int4 = Field(default_factory=Int4, description="the int4 bundle")
    budget: Size | None = Field(
        default=None,
        description="most bytes of the int4 bundle's graph and weights: bits, group and method of each "
        "weight are then searched for the least loss on the training text (of int4, group, symmetric and "
        "head_bits are not read, and method only if it is gptq)",
        examples=["100MB"],
    )
    max_perplexity_increase: Annotated[Positive, Le(1)] | None = Field(
        default=None,
        description="the other way round: the smallest int4 bundle whose perplexity on the training text is "
        "at most this share above the model's",
        examples=["3%"],
    )

    @property
    def searched(self) -> bool:
        """Whether the int4 bundle's weights are chosen one by one."""
        return self.budget is not None or self.max_perplexity_increase is not None
