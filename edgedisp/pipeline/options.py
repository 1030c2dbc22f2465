"""What the function of each stage sees of a recipe; with its inputs, all that its result depends on.

Paths are not among them: local files reach a stage as `inputs.files` and are hashed by content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgedisp.recipe import Adapter, ArmRun, Data, Evaluate, Latency, Model, QuantizeBits, Target, Train

ITEMS = "items.json"  # in the folders of the stages `items` and `measure`
TASKS_PATH = "evaluate.tasks_path"
"""Name of the folder of lm-evaluation-harness tasks among a stage's files."""


@dataclass(frozen=True)
class BundleRounding:
    """How a quantized bundle rounds its weights: bits of the layers, and the precision's section."""

    bits: int
    section: QuantizeBits


@dataclass(frozen=True)
class BaseOptions:
    """smoke_text, seed: of a smoke run alone, whose tiny model gets a tokenizer made from the text."""

    model: Model
    context: int
    smoke_text: Data | None = None
    seed: int = 0


@dataclass(frozen=True)
class CorpusOptions:
    """blocks: how many blocks of data.context tokens the longest training reads; None: as many as `epochs`
    take, in whole steps of `step` blocks."""

    data: Data
    seed: int
    blocks: int | None
    smoke: bool
    epochs: float | None = None
    step: int = 1


@dataclass(frozen=True)
class ItemsOptions:
    """answers: the fields of a row of evaluate.answers, by the keys of `data.train`."""

    evaluate: Evaluate
    context: int
    seed: int
    answers: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainOptions:
    """train: without the arms' techniques. steps None: as many as the corpus has blocks for. rounding: that
    of quantization_aware."""

    train: Train
    steps: int | None
    arm: ArmRun
    rounding: BundleRounding | None = None


@dataclass(frozen=True)
class MergeOptions:
    """How an adapter is audited and merged. int4: the rounding that bases are judged by; None: none, as lora
    has one base alone."""

    adapter: Adapter
    int4: QuantizeBits | None
    seed: int


@dataclass(frozen=True)
class QuantizeOptions:
    """is_trained: the model was trained under this very rounding."""

    rounding: BundleRounding
    is_trained: bool = False


@dataclass(frozen=True)
class SearchOptions:
    """A goal for the int4 bundle (bytes, or a share of perplexity), and how its weights are rounded."""

    int4: QuantizeBits
    budget: int | None
    max_perplexity_increase: float | None


@dataclass(frozen=True)
class ParityOptions:
    """tokens: held-out text compared. limits: figure -> its limit or None. trained_under: the rounding that
    training saw; the torch model is then rounded alike, and the graph computes in fp32."""

    tokens: int = 512
    limits: Mapping[str, float | None] = field(default_factory=dict)
    trained_under: BundleRounding | None = None


@dataclass(frozen=True)
class MeasureOptions:
    """hidden_states: also their condensation, and divergence from other bundles. noise: the noise floor."""

    items: ItemsOptions
    threads: int
    bootstrap: int = 2000
    divergence_tokens: int = 2048
    hidden_states: bool = True
    noise: bool = False
    parity: ParityOptions | None = None


@dataclass(frozen=True)
class LatencyOptions:
    latency: Latency
    seed: int
    threads: int


@dataclass(frozen=True)
class PackageOptions:
    """target: without words and how it would quantize. origin: where the bundle comes from."""

    target: Target
    threads: int
    origin: Mapping[str, Any] = field(default_factory=dict)
