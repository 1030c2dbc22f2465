"""The figures of a run as small typed records.

Stage records, the report, `compare`, the benchmarks and every JSON file share these classes;
core/files.py reads and writes them.

An interval is a 95 % interval. A difference is always second - first (arm - baseline).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

REPORT_FORMAT = 3
"""Of report.json; raised when a key changes its meaning."""
BASELINE = "baseline"
"""The arm that all others are compared with."""
DISPERSED = "dispersed"
AS_GIVEN = "as given"
"""The precision of a model that was not built here, as `edgedisp compare` takes it."""
CHANGES_FORWARD = ("neftune", "embedding_dropout")
"""Techniques that change the input of the model, so an arm's first loss is not the baseline's."""
Z95 = 1.959963984540054
"""Half-width of a 95 % interval in standard errors."""
Z80 = 0.8416212335729143
PUBLISHED_POINTS = 0.7
"""The smallest published gain of dispersion, in points of a mean over ten tasks (GPT-2: 34.95 to 35.61;
arXiv 2602.00217)."""


def detectable(half_width: float) -> float:
    """The difference that a comparison with such a 95 % interval finds 4 times out of 5."""
    return half_width * (Z95 + Z80) / Z95


@dataclass(frozen=True)
class Seeds:
    """The spread of an estimate over training seeds; the interval of the estimate holds it already.

    item_low, item_high, item_se: the interval and the standard error over items alone.
    """

    values: tuple[float, ...]
    sd: float | None = None
    item_low: float | None = None
    item_high: float | None = None
    item_se: float | None = None


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; low and high are None where there is none, `reason` says why.

    p: two-sided, of the test that a difference is 0. n: items. documents: the clusters they come from.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    n: int | None = None
    documents: int | None = None
    reason: str | None = None
    seeds: Seeds | None = None

    @property
    def has_interval(self) -> bool:
        return self.value is not None and self.low is not None and self.high is not None

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def test_p(self) -> float | None:
        """`p`, or where no test was made the normal approximation of it from the interval."""
        if self.p is not None or self.value is None or self.half_width is None:
            return self.p
        if self.half_width <= 0:
            return 1.0 if self.value == 0 else 0.0
        return math.erfc(abs(self.value) * Z95 / self.half_width / math.sqrt(2))


@dataclass(frozen=True)
class Score:
    """One metric of one model on one task.

    is_share: a mean of parts between 0 and 1, such as an accuracy; means over tasks hold such metrics alone.
    """

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
class LossSurvival:
    """What quantization leaves of a difference in loss, nats: `change` = quantized - full, paired."""

    full: Estimate
    quantized: Estimate
    change: Estimate
    verdict: str


@dataclass(frozen=True)
class Parity:
    """A bundle against the torch model it was made from, and what its runtimes did with it.

    limits: figure -> the limit it had to keep. genai: what onnxruntime-genai did (opened, greedy_agrees ...).
    """

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
    """KL(reference || model) of next-token distributions over held-out tokens, in nats."""

    tokens: int
    mean_kl: float
    median_kl: float
    p90_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float
    top5_overlap: float


@dataclass(frozen=True)
class LayerProfile:
    """Geometry of the token vectors after one layer: figure -> estimate (cosine_raw, effective_rank ...).

    layer None: after the final norm. histogram: counts of pairwise cosines over [-1, 1].
    """

    layer: int | None
    figures: dict[str, Estimate]
    histogram: tuple[int, ...] = ()


@dataclass(frozen=True)
class Condensation:
    """The profile of a model over held-out sequences; correlations: of cosine with depth (spearman, kendall).

    `change`, where there is a reference (the baseline, or the arm's torch model), holds the same figures as
    paired differences from it.
    """

    layers: list[LayerProfile]
    final_norm: LayerProfile | None
    mean_cosine: Estimate
    correlations: dict[str, Estimate]
    sequences: int = 0
    tokens: int = 0
    change: Condensation | None = None


@dataclass(frozen=True)
class NoiseFloor:
    """How far two scorings of one model differ: variant -> other way - usual way, nats per token."""

    floor: float
    variants: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """Everything one pass finds out about one model (arm and precision).

    divergence: reference (`parent`: the fp32 bundle; `baseline`: the baseline's bundle) -> divergence.
    """

    scores: dict[str, TaskScore] = field(default_factory=dict)
    condensation: Condensation | None = None
    divergence: dict[str, Divergence] = field(default_factory=dict)
    parity: Parity | None = None
    noise: NoiseFloor | None = None


@dataclass(frozen=True)
class Training:
    """One finished training. log: rows {step, loss, dispersion, lr, grad_norm}. watched: looks at the
    condensation in between, rows {step, cosine_by_layer}."""

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
    skipped_sequences: int = 0
    chunked_cross_entropy: bool = False
    merged_into: str | None = None
    merge_audit: Json | None = None


@dataclass(frozen=True)
class Bundle:
    """What quantization wrote: `tensors` {name, component, shape, bits, group, symmetric, method, size_bytes,
    relative_error}; `search`: how the bits of each weight were chosen, where they were searched."""

    path: str
    size_bytes: int
    nodes: dict[str, int] = field(default_factory=dict)
    method: str | None = None
    bits: int | None = None
    group: int | None = None
    symmetric: bool | None = None
    accuracy_level: int | None = None
    tensors: list[Json] = field(default_factory=list)
    search: Json | None = None
    is_trained: bool = False


@dataclass(frozen=True)
class Timing:
    """One bundle timed on one device; tokens per second and milliseconds are medians with their intervals.

    A figure that a device does not give is None.
    """

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
    download_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    partial: bool = False


@dataclass(frozen=True)
class DeviceResult:
    """What one device measured.

    pairs: twins compared {baseline, dispersed, same_graph, decode, fault}. scores: records of
    evaluate/device_sample.py. threads: label -> {best, rows} of a thread sweep. clock_mhz, temperature_c:
    lowest and highest over the repetitions. lost: why the device was lost in the middle.
    """

    device: str
    machine: Json = field(default_factory=dict)
    rows: list[Timing] = field(default_factory=list)
    pairs: list[Json] = field(default_factory=list)
    scores: list[Json] = field(default_factory=list)
    threads: dict[str, Json] = field(default_factory=dict)
    load_average: Json = field(default_factory=dict)
    clock_mhz: tuple[float, float] | None = None
    temperature_c: tuple[float, float] | None = None
    measured: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    lost: str | None = None

    def timing(self, label: str) -> Timing | None:
        return next((row for row in self.rows if row.label == label), None)


@dataclass(frozen=True)
class Stage:
    """One stage that a build passed; cached: taken from an earlier build."""

    name: str
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Replica:
    """A training of an arm with another seed than the first."""

    arm: str
    seed: int
    training: Training
    measurements: dict[str, Measurement] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A finished build, or several joined: the input of the report and of `compare`.

    Outer keys are arms, then precisions (`torch` is the model before export), then tasks. `arms` begins with
    the baseline; `precisions` begins with the most bits. Scores and comparisons are over all seeds; all else
    under an arm's name is its first training's. `runs`: of joined runs what each was made from {title, base,
    weights_sha256, tokens_sha256, context, heldout_documents}. `unpaired`: what could not be paired, and why.
    """

    name: str
    arms: list[str]
    precisions: list[str]
    hash8: str = ""
    smoke: bool = False
    created: str = ""
    command: str = ""
    recipe_yaml: str = ""
    git_commit: str | None = None
    machine: Json = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    techniques: dict[str, Json] = field(default_factory=dict)
    model: Json = field(default_factory=dict)
    corpus: Json = field(default_factory=dict)
    training: dict[str, Training] = field(default_factory=dict)
    bundles: dict[str, dict[str, Bundle]] = field(default_factory=dict)
    measurements: dict[str, dict[str, Measurement]] = field(default_factory=dict)
    comparisons: dict[str, dict[str, dict[str, TaskDifference]]] = field(default_factory=dict)
    means: dict[str, dict[str, MeanDifference]] = field(default_factory=dict)
    loss_survival: dict[str, dict[str, dict[str, LossSurvival]]] = field(default_factory=dict)
    delta_survival: dict[str, dict[str, Json]] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    missing_tasks: dict[str, str] = field(default_factory=dict)
    latency: DeviceResult | None = None
    devices: list[DeviceResult] = field(default_factory=list)
    devices_outdated: list[str] = field(default_factory=list)
    packages: dict[str, list[str]] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    runs: list[Json] = field(default_factory=list)
    baseline_is: str | None = None
    unpaired: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """`name-hash8`, as the run folder is called."""
        return f"{self.name}-{self.hash8}" if self.hash8 else self.name

    @property
    def compared_arms(self) -> list[str]:
        """All arms but the baseline; none without a baseline."""
        return [arm for arm in self.arms if arm != BASELINE] if BASELINE in self.arms else []

    @property
    def main_arm(self) -> str | None:
        """The arm of the verdict: `dispersed`, else the first with dispersion, else the first other."""
        arms = self.compared_arms
        if DISPERSED in arms:
            return DISPERSED
        dispersed = [arm for arm in arms if self.techniques.get(arm, {}).get("dispersion")]
        return next(iter(dispersed or arms), None)

    def measured(self, arm: str, precision: str) -> Measurement:
        return self.measurements.get(arm, {}).get(precision, Measurement())

    def trainings(self, arm: str) -> dict[str, Training]:
        """Folder -> each training of an arm, that of the first seed first."""
        first = {arm: self.training[arm]} if arm in self.training else {}
        return first | {name: one.training for name, one in self.replicas.items() if one.arm == arm}

    def first_losses(self, arm: str) -> list[tuple[float, float]]:
        """Per seed the loss of (baseline, arm) before the first update: one model on one batch.

        Empty where it was not logged, and for an arm whose technique changes the model's input.
        """
        if any(self.techniques.get(arm, {}).get(name) is not None for name in CHANGES_FORWARD):
            return []
        pairs = zip(self.trainings(BASELINE).values(), self.trainings(arm).values())
        logs = [(first.log[:1], second.log[:1]) for first, second in pairs]
        if any(not rows or rows[0].get("step") != 1 for pair in logs for rows in pair):
            return []
        return [(first[0]["loss"], second[0]["loss"]) for first, second in logs]


def arms_in_order(names: list[str]) -> list[str]:
    """The baseline first, `dispersed` second, then the others as given."""
    return sorted(names, key=lambda arm: (arm != BASELINE, arm != DISPERSED))
