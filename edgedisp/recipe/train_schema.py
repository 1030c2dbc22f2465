"""The keys of `train` and of an arm: type, bounds, default and meaning.

Defaults are the paper's where it has one (arXiv 2602.00217: AdamW betas .9/.95, weight decay .1, clip 1.0,
cosine, angular dispersion 0.1 over all layers at temperature 1, clamp .1), except that 64 tokens are drawn
and not 256: nearly the same gradient for a sixteenth of the products (benchmarks/dispersion_cost.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Le
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from edgedisp.recipe.values import (
    BITS,
    WHOLE,
    ArmName,
    Between0And1,
    Flag,
    Forgetting,
    Layers,
    Modules,
    NotNegative,
    Positive,
    Sample,
    Section,
    Seed,
    ShareBelow1,
    Steps,
    Tokens,
    Unique,
    accepts,
    choice,
)

TECHNIQUES: dict[str, float | Literal["auto"]] = {
    "neftune": 5.0,
    "active_forgetting": "auto",
    "embedding_dropout": 0.1,
}
"""The techniques beside dispersion, and the strength that the plain name stands for: the smallest alpha of
the NEFTune paper; one reset after two thirds of the run, as in the dispersion paper (1,000 of its 1,526
steps); the embedding dropout of GPT-2."""
PLAIN_ARMS = ("baseline", "dispersed", *TECHNIQUES)
"""Arms that need no more than their name."""
LATE_START = 0.85  # SmolLM2-135M, 80k tokens: what training gains over rounding afterwards is lost from 0.5


class Dispersion(Section):
    """The loss that pushes the token vectors of one sequence apart, of the arms that use it."""

    variant: Literal[
        "angular", "cosine", "l2_repel", "decorrelation", "orthogonalization", "spectral_entropy"
    ] = "angular"
    """what is spread: the angles between token vectors (orthogonalization: up to 90 degrees), their cosines,
    distances (l2_repel), features (decorrelation) or rank (spectral_entropy)"""
    weight: NotNegative = 0.1
    """factor before the dispersion loss; 0 is bit-identical to off"""
    layers: Layers = "all"
    """the layers whose output is dispersed (the embedding never is)"""
    temperature: Positive = 1.0
    """tau: a small one looks at the nearest pairs alone"""
    tokens: Sample = 64
    """tokens drawn from a sequence, anew for each layer (the paper: 256); all: every one"""
    clamp: ShareBelow1 = 0.1
    """cosines are kept in [clamp - 1, 1 - clamp], where arccos is smooth"""
    exclude_sink: Flag = False
    """leave attention sinks out: the first token, and any of 10 times the median norm"""
    seed: Seed | None = None
    """seed of the token draw; null takes the recipe's seed"""


class Adapter(Section):
    """Low-rank adapters instead of training all weights; merged before export."""

    kind: Literal["lora", "qlora"]
    """lora: over the fp32 base; qlora: over a quantized base"""
    rank: Annotated[int, Ge(1), Le(8192), WHOLE] = 16
    """rank of the update"""
    alpha: Annotated[int, Ge(1), Le(65536), WHOLE, accepts("a whole number >= 1 and <= 65536, or null")] = (
        Field(default=None, validate_default=True)
    )
    """the update is scaled by alpha / rank; null: twice the rank"""
    dropout: ShareBelow1 = 0.0
    """dropout before the adapter"""
    targets: Modules = "auto"
    """adapted modules; auto: every linear layer in the blocks"""
    base: Literal["nf4", "int8"] | None = Field(default=None, validate_default=True)
    """how qlora holds the base; null: nf4 for qlora"""
    merge: Literal["auto", "full", "dequantized"] = "auto"
    """what a qlora adapter is merged into: the full-precision base, the dequantized one, or (auto) the one
    that the baseline's merge audit finds better"""

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

    fsdp: Literal["full_shard", "shard_grad_op"]
    """FSDP: weights, gradients and optimizer states are divided; shard_grad_op gathers weights once a step
    instead of twice, for more memory"""
    wrap: Modules = "auto"
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
        if not isinstance(value, dict | QuantizationAware):
            raise ValueError("needs int8, int4, or a mapping with precision and start")
        return value


class Train(Section):
    """How every arm is trained. The arms differ in what they add to it and in nothing else."""

    tokens: Tokens
    """training tokens of one arm, rounded down to whole steps"""
    lr: Between0And1
    """peak learning rate of AdamW"""
    batch: Annotated[int, Ge(1), Le(65536), WHOLE] = 4
    """sequences in one micro-batch"""
    accumulate: Annotated[int, Ge(1), Le(65536), WHOLE] = 1
    """micro-batches in one optimizer step"""
    warmup: ShareBelow1 = 0.1
    """share of the steps over which the learning rate rises"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """learning rate after warm-up"""
    weight_decay: NotNegative = 0.1
    """AdamW's weight decay"""
    betas: Annotated[tuple[ShareBelow1, ShareBelow1], accepts("a list of two numbers >= 0 and < 1")] = (
        0.9,
        0.95,
    )
    """AdamW's betas"""
    clip: Positive = 1.0
    """largest norm of the gradient"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """of the products: bf16 is autocast, the weights stay fp32; auto: bf16 where the GPU or the processor has
    it, else fp32"""
    gradient_checkpointing: Flag = False
    """less memory for about a third more time"""
    compile: Flag = False
    """run the layers through torch.compile: faster after a minute; needs a C++ compiler"""
    checkpoint_every: Steps | None = None
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


class Arm(Section):
    """One arm: a plain name, or a name with at least one technique."""

    name: ArmName
    """names the arm and its folder"""
    dispersion: Annotated[
        Dispersion | None, accepts("a mapping with any keys of train.dispersion, or null")
    ] = None
    """the dispersion loss, these keys laid over train.dispersion; null: off"""
    neftune: Positive | None = None
    """alpha of the noise on the embedding's output (NEFTune)"""
    active_forgetting: Forgetting | None = None
    """steps between two fresh draws of the token embedding; auto: one, after two thirds"""
    embedding_dropout: Between0And1 | None = None
    """rate of the dropout on the embedding's output"""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        """A plain name, alone or as a mapping's only key, stands for its technique at the usual strength."""
        if isinstance(value, str):
            also = "or a mapping such as {name: strong, dispersion: {weight: 1.0}}"
            return _plain(choice(value, PLAIN_ARMS, also))
        if not isinstance(value, dict | Arm):
            raise ValueError(f"needs one of {', '.join(PLAIN_ARMS)}, or a mapping")
        if isinstance(value, dict) and list(value) == ["name"] and value["name"] in PLAIN_ARMS:
            return _plain(str(value["name"]))
        return value

    @model_validator(mode="after")
    def _does_what_its_name_says(self) -> Self:
        added = [key for key in ("dispersion", *TECHNIQUES) if getattr(self, key) is not None]
        if self.name == "baseline" and added:
            raise ValueError(f"a baseline adds nothing; give the arm with {added[0]} another name")
        if self.name != "baseline" and not added:
            raise ValueError(f"it names no technique; add one of dispersion, {', '.join(TECHNIQUES)}")
        promised = "dispersion" if self.name == "dispersed" else self.name
        if promised in ("dispersion", *TECHNIQUES) and added != [promised]:
            raise ValueError(f"an arm called '{self.name}' adds {promised} alone; give this one another name")
        return self

    @model_serializer(mode="wrap")
    def _short(self, serialize: SerializerFunctionWrapHandler) -> Any:
        """The plain name, or the keys that are set."""
        full = serialize(self)
        if self.dispersion is not None:
            full["dispersion"] = {key: full["dispersion"][key] for key in self.overrides}
        short = {key: value for key, value in full.items() if value is not None}
        return self.name if self.name in PLAIN_ARMS and short == _plain(self.name) else short

    def __str__(self) -> str:
        return self.name

    @property
    def overrides(self) -> tuple[str, ...]:
        """Keys of train.dispersion that this arm was given another value for, in the order of the section."""
        given = set() if self.dispersion is None else self.dispersion.model_fields_set
        return tuple(key for key in Dispersion.model_fields if key in given)


def _plain(name: str) -> dict[str, Any]:
    if name == "dispersed":
        return {"name": name, "dispersion": {}}
    return {"name": name} | ({name: TECHNIQUES[name]} if name in TECHNIQUES else {})
