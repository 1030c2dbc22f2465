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
    Size,
    Whole,
)
from edgedisp.recipe.section import Section

METHODS = (
    "rtn: round to nearest; k_quant: the scale of each group is searched by the weight alone; gptq: later "
    "columns make up for rounding errors, calibrated on the recipe's training text"
)


class QuantizeBits(Section):
    """One quantized bundle. Changing it never retrains."""

    group: Group = Field(default=32, description="weights that share one scale (and zero point)")
    symmetric: Flag = Field(
        default=True, description="no zero point; at 4 bits small models lose more that way"
    )
    accuracy_level: AccuracyLevel = Field(
        default=4,
        description="onnxruntime's arithmetic: 0 and 1 in fp32, 4 in int8, faster but coarser",
    )
    head_bits: HeadBits = Field(
        default=8, description="bits of the output head (and of an embedding tied to it)"
    )
    method: Literal["rtn", "k_quant", "gptq"] = Field(default="rtn", description=METHODS)
    calibration_tokens: Annotated[Whole, Ge(256)] = Field(
        default=16_384, description="training tokens that gptq calibrates on", examples=["16k"]
    )

    @property
    def calibrated(self) -> bool:
        """Whether quantizing reads the model and the training text, not the fp32 bundle alone."""
        return self.method == "gptq"


class Int8(QuantizeBits):
    """The int8 bundle."""

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
