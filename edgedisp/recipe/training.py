"""The keys of `train`: type, bounds, default and meaning of each.

Defaults are the paper's where it has one (arXiv 2602.00217: AdamW betas .9/.95, weight decay .1, clip 1.0,
cosine, angular dispersion 0.1 over all layers at temperature 1, clamp .1), except that 64 tokens are drawn
and not 256: nearly the same gradient for a sixteenth of the products (benchmarks/dispersion_cost.py).
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import Field, ValidationInfo, field_validator, model_validator

from edgedisp.recipe.kinds import (
    Betas,
    Between0And1,
    Count,
    Flag,
    Layers,
    Modules,
    NotNegative,
    Positive,
    Sample,
    Seed,
    ShareBelow1,
    Unique,
    Whole,
)
from edgedisp.recipe.section import Section


class Dispersion(Section):
    """The loss that pushes the token vectors of one sequence apart, of the arms that use it (arms.py)."""

    variant: Literal[
        "angular", "cosine", "l2_repel", "decorrelation", "orthogonalization", "spectral_entropy"
    ] = Field(
        default="angular",
        description="what is spread: the angles between token vectors (orthogonalization: up to 90 degrees), "
        "their cosines, distances (l2_repel), features (decorrelation) or rank (spectral_entropy)",
    )
    weight: NotNegative = Field(
        default=0.1, description="factor before the dispersion loss; 0 is bit-identical to off"
    )
    layers: Layers = Field(
        default="all", description="the layers whose output is dispersed (the embedding never is)"
    )
    temperature: Positive = Field(
        default=1.0, description="tau: a small one looks at the nearest pairs alone"
    )
    tokens: Sample = Field(
        default=64,
        description="tokens drawn from a sequence, anew for each layer (the paper: 256); all: every one",
    )
    clamp: ShareBelow1 = Field(
        default=0.1, description="cosines are kept in [clamp - 1, 1 - clamp], where arccos is smooth"
    )
    exclude_sink: Flag = Field(
        default=False,
        description="leave attention sinks out: the first token, and any of 10 times the median norm",
    )
    seed: Seed | None = Field(
        default=None, description="seed of the token draw; null takes the recipe's seed"
    )


class Adapter(Section):
    """Low-rank adapters instead of training all weights; merged before export."""

    kind: Literal["lora", "qlora"] = Field(
        description="lora: over the fp32 base; qlora: over a quantized base"
    )
    rank: Count = Field(default=16, description="rank of the update")
    alpha: Count = Field(
        default=None,
        validate_default=True,
        description="the update is scaled by alpha / rank; null: twice the rank",
    )
    dropout: ShareBelow1 = Field(default=0.0, description="dropout before the adapter")
    targets: Modules = Field(
        default="auto", description="adapted modules; auto: every linear layer in the blocks"
    )
    base: Literal["nf4", "int8"] | None = Field(
        default=None, validate_default=True, description="how qlora holds the base; null: nf4 for qlora"
    )
    merge: Literal["auto", "full", "dequantized"] = Field(
        default="auto",
        description="what a qlora adapter is merged into: the full-precision base, the dequantized one, or "
        "(auto) the one that the baseline's merge audit finds better",
    )

    @field_validator("alpha", mode="before")
    @classmethod
    def _twice_the_rank(cls, value: object, info: ValidationInfo) -> object:
        return 2 * info.data.get("rank", 8) if value is None else value

    @field_validator("base", mode="before")
    @classmethod
    def _nf4_for_qlora(cls, value: object, info: ValidationInfo) -> object:
        return "nf4" if value is None and info.data.get("kind") == "qlora" else value


class Distributed(Section):
    """How several processes (torchrun, accelerate launch) hold one model; one process alone ignores it."""

    fsdp: Literal["full_shard", "shard_grad_op"] = Field(
        description="FSDP: weights, gradients and optimizer states are divided; shard_grad_op gathers "
        "weights once a step instead of twice, for more memory"
    )
    wrap: Modules = Field(
        default="auto",
        description="classes of the modules gathered at a time; auto: the model's decoder layers",
        examples=["[Qwen3DecoderLayer]"],
    )
    cpu_offload: Flag = Field(
        default=False, description="keep the parts in the host's memory: fits more, and is far slower"
    )


LATE_START = 0.85  # SmolLM2-135M, 80k tokens: what training gains over rounding afterwards is lost from 0.5


class QuantizationAware(Section):
    """Training under the rounding of a bundle; the plain name of a precision stands for it alone."""

    precision: Literal["int8", "int4"] = Field(
        description="the bundle whose weights training sees, with grid and method of quantize.<precision>"
    )
    start: ShareBelow1 | None = Field(
        default=None,
        description="share of the run before rounding begins; null: 0, with gptq 0.85, as longer training "
        "undoes what calibration found",
        examples=["0.5"],
    )

    def begins(self, method: str) -> float:
        """`start`, or what stands for null under a bundle's method."""
        return (LATE_START if method == "gptq" else 0.0) if self.start is None else self.start

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return {"precision": value} if isinstance(value, str) else value


class Train(Section):
    """How every arm is trained. The arms differ in what they add to it (arms.py) and in nothing else."""

    tokens: Count = Field(
        description="training tokens of one arm, rounded down to whole steps", examples=["40k", "200M"]
    )
    lr: Between0And1 = Field(description="peak learning rate of AdamW", examples=["5e-5"])
    batch: Count = Field(default=4, description="sequences in one micro-batch")
    accumulate: Count = Field(default=1, description="micro-batches in one optimizer step")
    warmup: ShareBelow1 = Field(
        default=0.1, description="share of the steps over which the learning rate rises"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="learning rate after warm-up"
    )
    weight_decay: NotNegative = Field(default=0.1, description="AdamW's weight decay")
    betas: Betas = Field(default=(0.9, 0.95), description="AdamW's betas", examples=["[0.9, 0.95]"])
    clip: Positive = Field(default=1.0, description="largest norm of the gradient")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto",
        description="of the products: bf16 is autocast, the weights stay fp32; auto: bf16 where the GPU or "
        "the processor has it, else fp32",
    )
    gradient_checkpointing: Flag = Field(default=False, description="less memory for about a third more time")
    compile: Flag = Field(
        default=False,
        description="run the layers through torch.compile: faster after a minute; needs a C++ compiler",
    )
    checkpoint_every: Count | None = Field(
        default=None, description="steps between checkpoints; null: a fifth of the run, at least 10"
    )
    watch_every: Annotated[Whole, Ge(0)] | None = Field(
        default=None,
        description="steps between looks at the condensation; null: about ten in a run, 0: none",
    )
    report_to: Annotated[tuple[Literal["tensorboard", "trackio", "mlflow", "wandb"], ...], Unique] = Field(
        default=(),
        description="who else gets the training log; TensorBoard files go to the arm's folder",
        examples=["[tensorboard]"],
    )
    dispersion: Dispersion | None = Field(
        default_factory=Dispersion,
        description="the dispersion loss; null: off, for builds without `dispersed`",
    )
    adapter: Adapter | None = Field(default=None, description="null trains all weights")
    quantization_aware: QuantizationAware | None = Field(
        default=None,
        description="int8, int4 or a mapping: steps see the weights as that bundle rounds them; null: off",
    )
    distributed: Distributed | None = Field(
        default=None, description="null: each of several processes holds the whole model (data parallel)"
    )
