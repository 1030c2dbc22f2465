"""The keys of `train`: type, bounds, default and meaning.

Defaults are the paper's where it has one (arXiv 2602.00217: AdamW betas .9/.95, weight decay .1, clip 1.0,
cosine, angular dispersion 0.1 over all layers at temperature 1, clamp .1), except that 64 tokens are drawn
and not 256: nearly the same gradient for a sixteenth of the products (benchmarks/dispersion_cost.py).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le
from pydantic import Field, ValidationInfo, field_validator, model_validator

from edgedisp.recipe import values
from edgedisp.recipe.values import BITS, NUMBER, WHOLE, Flag, Section, ShareBelow1, Unique, choice

LATE_START = 0.85  # SmolLM2-135M, 80k tokens: what training gains over rounding afterwards is lost from 0.5


class Dispersion(Section):
    """The loss that pushes the token vectors of one sequence apart, of the arms that use it."""

    variant: values.Variant = "angular"
    """what is spread: the angles between token vectors (orthogonalization: up to 90 degrees), their cosines,
    distances (l2_repel), features (decorrelation) or rank (spectral_entropy)"""
    weight: values.NotNegative = 0.1
    """factor before the dispersion loss; 0 is bit-identical to off"""
    layers: values.Layers = "all"
    """the layers whose output is dispersed (the embedding never is)"""
    temperature: Annotated[float, Ge(0.05), Le(1e9), NUMBER] = 1.0
    """tau: a small one looks at the nearest pairs alone"""
    tokens: values.Sample = 64
    """tokens drawn from a sequence, anew for each layer (the paper: 256); all: every one"""
    clamp: ShareBelow1 = 0.1
    """cosines are kept in [clamp - 1, 1 - clamp], where arccos is smooth"""
    exclude_sink: Flag = False
    """leave attention sinks out: the first token, and any of 10 times the median norm"""
    seed: values.Seed | None = None
    """seed of the token draw; null takes the recipe's seed"""


class Adapter(Section):
    """Low-rank adapters instead of training all weights; merged before export."""

    kind: Literal["lora", "qlora"]
    """lora: over the fp32 base; qlora: over a quantized base"""
    rank: Annotated[int, Ge(1), Le(8192), WHOLE] = 16
    """rank of the update"""
    alpha: Annotated[int, Ge(1), Le(65536), WHOLE] = Field(
        default_factory=lambda data: 2 * data.get("rank", 16)
    )
    """the update is scaled by alpha / rank; the default is twice the rank"""
    dropout: ShareBelow1 = 0.0
    """dropout before the adapter"""
    targets: values.Modules = "auto"
    """adapted modules; auto: every linear layer in the blocks"""
    base: Literal["nf4", "int8"] | None = Field(default=None, validate_default=True)
    """how qlora holds the base; null: nf4 for qlora"""
    merge: Literal["auto", "full", "dequantized"] = "auto"
    """what a qlora adapter is merged into: the full-precision base, the dequantized one, or (auto) the one
    that the baseline's merge audit finds better"""

    @field_validator("base", "merge")
    @classmethod
    def _of_qlora_alone(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("kind") == "qlora":
            return value or "nf4"
        if value in ("nf4", "int8", "dequantized"):
            raise ValueError("kind lora keeps its base in fp32; take it out, or write kind: qlora")
        return value


class Distributed(Section):
    """How several processes (torchrun, accelerate launch) hold one model; one process alone ignores it."""

    fsdp: Literal["full_shard", "shard_grad_op"]
    """FSDP: weights, gradients and optimizer states are divided; shard_grad_op gathers weights once a step
    instead of twice, for more memory"""
    wrap: values.Modules = "auto"
    """classes of the modules gathered at a time; auto: the model's decoder layers"""
    cpu_offload: Flag = False
    """keep the parts in the host's memory: fits more, and is far slower"""


class QuantizationAware(Section):
    """Training under the rounding of a bundle; the plain name of a precision stands for it alone."""

    precision: Literal["int8", "int4"]
    """the bundle whose weights training sees, with grid and method of quantize.<precision>"""
    start: ShareBelow1 | None = None
    """share of the run before rounding begins; null: 0, with gptq 0.85, as longer training undoes what
    calibration found"""

    def begins(self, method: str) -> float:
        """`start`, or what null stands for under a bundle's method."""
        return (LATE_START if method == "gptq" else 0.0) if self.start is None else self.start

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        if isinstance(value, str):
            return {"precision": choice(value, tuple(BITS), "or a mapping with precision and start")}
        return value


class Train(Section):
    """How every arm is trained. The arms differ in what they add to it and in nothing else."""

    unhashed: ClassVar[set[str]] = {"watch_every", "report_to", "checkpoint_every"}
    """Keys that change no weight: with another value, a finished training stays valid."""

    tokens: values.Tokens
    """training tokens of one arm, rounded down to whole steps"""
    lr: values.Between0And1
    """peak learning rate of AdamW"""
    batch: Annotated[int, Ge(1), Le(65536), WHOLE] = 4
    """sequences in one micro-batch"""
    accumulate: Annotated[int, Ge(1), Le(65536), WHOLE] = 1
    """micro-batches in one optimizer step"""
    warmup: ShareBelow1 = 0.1
    """share of the steps over which the learning rate rises"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """learning rate after warm-up"""
    weight_decay: values.NotNegative = 0.1
    """AdamW's weight decay"""
    betas: values.Betas = (0.9, 0.95)
    """AdamW's betas"""
    clip: values.Positive = 1.0
    """largest norm of the gradient"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of the products: bf16 is autocast, the weights stay fp32; auto: bf16 where the GPU or the processor has
    it, else fp32"""
    gradient_checkpointing: Flag = False
    """less memory for about a third more time"""
    compile: Flag = False
    """run the layers through torch.compile: faster after a minute; needs a C++ compiler"""
    checkpoint_every: values.Count | None = None
    """steps between checkpoints; null: a fifth of the run, at least 10"""
    watch_every: Annotated[int, Ge(0), Le(10**9), WHOLE] | None = None
    """steps between looks at the condensation; null: about ten in a run, 0: none"""
    report_to: Annotated[tuple[Literal["tensorboard", "trackio", "mlflow", "wandb"], ...], Unique] = ()
    """who else gets the training log; TensorBoard files go to the arm's folder"""
    dispersion: Dispersion | None = Dispersion()
    """the dispersion loss; null: off, for builds without `dispersed`"""
    adapter: Adapter | None = None
    """null trains all weights"""
    quantization_aware: QuantizationAware | None = None
    """int8, int4 or a mapping: steps see the weights as that bundle rounds them; null: off"""
    distributed: Distributed | None = None
    """null: each of several processes holds the whole model (data parallel)"""
