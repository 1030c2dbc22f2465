"""Typed results, shared by stage records, the report, `compare` and the benchmarks; JSON by core/files.py.

Intervals are 95 % intervals. A difference is always second - first (arm - baseline).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

REPORT_FORMAT = 3  # of report.json; raised when a key changes its meaning
BASELINE, DISPERSED = "baseline", "dispersed"  # the arm that others are compared with, and the main other
BASE = "base"  # the untouched model, beside the arms in tables
ANSWERS_TASK = "heldout_answers"  # whose exact answers the verdict is about where they were asked for
LOSS_TASK = "heldout_perplexity"  # whose loss the verdict, the noise floor and the pilot are about
AS_GIVEN = "as given"  # the precision of a model that `edgedisp compare` scored as it is
Z95 = 1.959963984540054  # the normal quantile of a 95 % interval
PUBLISHED_POINTS = 0.7  # smallest published gain, mean of ten tasks (GPT-2: 34.95 to 35.61, arXiv 2602.00217)


@dataclass(frozen=True)
class Seeds:
    """Spread over training seeds, included in the estimate's interval. item_*: over items alone."""

    values: tuple[float, ...]
    sd: float | None = None
    item_low: float | None = None
    item_high: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; without one, low and high are None and `reason` says why.
    p: two-sided, of the test that a difference is 0. n: items. documents: the clusters they come from.
    detectable: the difference that a comparison like this one finds with 80 % power."""

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    n: int | None = None
    documents: int | None = None
    reason: str | None = None
    seeds: Seeds | None = None
    detectable: float | None = None

    @property
    def has_interval(self) -> bool:
        return self.value is not None and self.low is not None and self.high is not None

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def over_items(self) -> Estimate | None:
        """The interval over items alone; None for one training seed."""
        seeds = self.seeds
        return None if seeds is None else Estimate(self.value, seeds.item_low, seeds.item_high)

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def test_p(self) -> float | None:
        """`p`; without a test its normal approximation from the interval."""
        if self.p is not None or self.value is None or self.half_width is None:
            return self.p
        if self.half_width <= 0:
            return float(self.value == 0)
        return math.erfc(abs(self.value) * Z95 / self.half_width / math.sqrt(2))


@dataclass(frozen=True)
class Score:
    """One metric of a task. is_share: a mean of values in [0, 1], as means over tasks take."""

    metric: str
    estimate: Estimate
    higher_is_better: bool
    is_share: bool = False


@dataclass(frozen=True)
class TaskScore:
    """All metrics of one model on one task; the first is the task's main one.

    chance: the main metric of a model that guesses. truncated: items whose context was cut to fit the model.
    items_sha256: two scores can be paired only where it is equal.
    """

    task: str
    metrics: dict[str, Score]
    chance: float | None = None
    truncated: int = 0
    items_sha256: str = ""

    @property
    def main(self) -> Score:
        return next(iter(self.metrics.values()))

    @property
    def is_at_chance(self) -> bool:
        """Whether the interval of the main metric reaches down to what guessing gives."""
        low = self.main.estimate.low
        return self.chance is not None and low is not None and low <= self.chance


@dataclass(frozen=True)
class Difference:
    """second - first of one metric over the same items, paired.

    nats: for perplexities the same of the mean loss, per `per` (tokens, words, items).
    only_first, only_second: items that one model alone got right. test: which test gave the estimate's p.
    """

    metric: str
    first: float | None
    second: float | None
    estimate: Estimate
    higher_is_better: bool
    nats: Estimate | None = None
    per: str | None = None
    only_first: int | None = None
    only_second: int | None = None
    test: str | None = None


@dataclass(frozen=True)
class TaskDifference:
    """All paired metrics of one task; the first is the task's main one."""

    task: str
    metrics: dict[str, Difference]

    @property
    def main(self) -> Difference:
        return next(iter(self.metrics.values()))


@dataclass(frozen=True)
class MeanDifference:
    """The difference of the mean over tasks; left_out: task -> why it is not among them."""

    first: float
    second: float
    estimate: Estimate
    tasks: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WrongAnswer:
    """An item that the main arm got wrong at the fewest bits. prompt: the user's last words. answers: what
    each model wrote, by `dispersed/int4`."""

    prompt: str
    reference: str
    answers: dict[str, str]


@dataclass(frozen=True)
class LossSurvival:
    """A difference in loss before and after quantization, nats: `change` = quantized - full, paired."""

    full: Estimate
    quantized: Estimate
    change: Estimate
    verdict: str


@dataclass(frozen=True)
class Parity:
    """A bundle against its torch model. limits: figure -> limit. genai: what its runtime did with it."""

    tokens: int
    max_abs_difference: float
    mean_kl: float
    top1_agreement: float
    greedy_agreement: float
    limits: dict[str, float | None] = field(default_factory=dict)
    genai: Json = field(default_factory=dict)
    graph: Json = field(default_factory=dict)
    as_trained: Json | None = None
    passed: bool = False


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) of next-token distributions over held-out tokens, in nats; largest difference of
    a logit."""

    tokens: int
    mean_kl: float
    median_kl: float
    p90_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float
    top5_overlap: float
    max_abs_difference: float = 0.0


@dataclass(frozen=True)
class LayerProfile:
    """Geometry of token vectors after a layer (0: the embedding): figure -> estimate (cosine_raw ...).
    histogram: counts of pairwise cosines over [-1, 1]."""

    layer: int
    figures: dict[str, Estimate]
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True)
class Condensation:
    """Profile of a model over held-out sequences; layers: transformers' hidden states; mean_cosine: over all
    but the embedding; correlations: of cosine with depth (spearman, kendall). change: the same as paired
    differences from a reference (the baseline, or the arm's torch model)."""

    layers: list[LayerProfile]
    mean_cosine: Estimate
    correlations: dict[str, Estimate]
    sequences: int = 0
    tokens: int = 0
    change: Condensation | None = None


@dataclass(frozen=True)
class NoiseFloor:
    """How far two scorings of one model differ: variant -> its loss - the usual one, nats per token."""

    floor: float
    variants: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """One model. divergence: from `parent` (its fp32 bundle) and `baseline` (the baseline's bundle)."""

    scores: dict[str, TaskScore] = field(default_factory=dict)
    condensation: Condensation | None = None
    divergence: dict[str, Divergence] = field(default_factory=dict)
    parity: Parity | None = None
    noise: NoiseFloor | None = None


@dataclass(frozen=True)
class Training:
    """log: rows {step, loss, dispersion, lr, grad_norm}; watched: rows {step, cosine_by_layer}."""

    steps: int
    tokens: int
    seconds: float
    weights_sha256: str
    tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
    processes: int = 1
    resumed_from: int = 0
    settings: Json = field(default_factory=dict)
    log: list[Json] = field(default_factory=list)
    watched: list[Json] = field(default_factory=list)
    watch_seconds: float = 0.0
    chunked_cross_entropy: bool = False
    merge_audit: Json | None = None

    @property
    def first_loss(self) -> float | None:
        """The loss before the first update; None where it was not logged."""
        return self.log[0]["loss"] if self.log and self.log[0].get("step") == 1 else None


@dataclass(frozen=True)
class Bundle:
    """by_tensor: {name, component, bits, group, symmetric, method, size_bytes}.
    search: how the bits of each weight were searched, if they were."""

    path: str
    size_bytes: int
    nodes: dict[str, int] = field(default_factory=dict)
    method: str | None = None
    bits: int | None = None
    group: int | None = None
    symmetric: bool | None = None
    accuracy_level: int | None = None
    by_tensor: list[Json] = field(default_factory=list)
    search: Json | None = None
    is_trained: bool = False


@dataclass(frozen=True)
class Timing:
    """One bundle timed on one device: medians with intervals; None for what a device does not give.
    bandwidth_share: of the machine's memory_gb_per_s. drift_percent: of the decode speed, first to last."""

    label: str
    threads: int | None
    prompt: int
    generate: int
    repetitions: int
    decode_tokens_per_s: Estimate | None = None
    prefill_tokens_per_s: Estimate | None = None
    ttft_ms: Estimate | None = None
    token_ms_p50: float | None = None
    token_ms_p90: float | None = None
    load_s: float | None = None
    peak_memory_bytes: int | None = None
    weights_bytes: int | None = None
    bytes_read_per_token: int | None = None
    bandwidth_gb_per_s: float | None = None
    bandwidth_share: float | None = None
    download_bytes: int | None = None
    drift_percent: float | None = None
    warnings: tuple[str, ...] = ()
    partial: bool = False


@dataclass(frozen=True)
class DeviceResult:
    """What one device measured.

    pairs: twins compared {baseline, candidate, same_graph, decode, fault}. scores: records of
    pipeline/device_scores.py. sweeps: label -> its timings with several thread counts. clock_mhz,
    temperature_c: lowest and highest over the repetitions. lost: why the device was lost in the middle.
    options: {seed, warmup, pause_s, groups of labels that were open together}. repetitions: in the order of
    timing, each as the runner gives it, with `label`, `repetition` and `turn`. answers: label -> scored
    items, each a list of (sum of log-probabilities, all greedy), until `scores` are made of them.
    """

    device: str
    machine: Json = field(default_factory=dict)
    rows: list[Timing] = field(default_factory=list)
    pairs: list[Json] = field(default_factory=list)
    scores: list[Json] = field(default_factory=list)
    sweeps: dict[str, list[Timing]] = field(default_factory=dict)
    load_average: Json = field(default_factory=dict)
    clock_mhz: tuple[float, float] | None = None
    temperature_c: tuple[float, float] | None = None
    measured: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    lost: str | None = None
    options: Json = field(default_factory=dict)
    repetitions: list[Json] = field(default_factory=list)
    answers: dict[str, list[Any]] = field(default_factory=dict)

    def timing(self, label: str) -> Timing | None:
        return next((row for row in self.rows if row.label == label), None)
