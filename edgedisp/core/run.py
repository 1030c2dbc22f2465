"""A finished build as one record: the input of the report and of `edgedisp compare`."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgedisp.core.results import (
    BASE,
    BASELINE,
    DISPERSED,
    Bundle,
    DeviceResult,
    Json,
    LossSurvival,
    MeanDifference,
    Measurement,
    TaskDifference,
    Training,
    WrongAnswer,
)

CHANGES_FORWARD = ("neftune", "embedding_dropout")


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

    Outer keys are arms, then precisions (`torch`: before export), then tasks. `arms` begins with the
    baseline, `precisions` with the most bits. Scores and comparisons are over all seeds; all else under an
    arm's name is its first training's. `bundles` and `measurements` may hold `base`, the untouched model,
    which is no arm; gains: arm - base. answers: examples of wrong ones; prompt: one to try. runs: the origin
    of joined runs {title, base, weights_sha256, tokens_sha256, context, heldout_documents}. unpaired: what
    could not be paired, and why.
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
    gains: dict[str, dict[str, dict[str, TaskDifference]]] = field(default_factory=dict)
    answers: list[WrongAnswer] = field(default_factory=list)
    prompt: str | None = None
    means: dict[str, dict[str, MeanDifference]] = field(default_factory=dict)
    loss_survival: dict[str, dict[str, dict[str, LossSurvival]]] = field(default_factory=dict)
    delta_survival: dict[str, dict[str, Json]] = field(default_factory=dict)
    replicas: dict[str, Replica] = field(default_factory=dict)
    missing_tasks: dict[str, str] = field(default_factory=dict)
    latency: DeviceResult | None = None
    devices: list[DeviceResult] = field(default_factory=list)
    devices_outdated: list[str] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    runs: list[Json] = field(default_factory=list)
    baseline_is: str | None = None
    unpaired: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """`name-hash8`, as the run folder is called."""
        return f"{self.name}-{self.hash8}" if self.hash8 else self.name

    @property
    def has_base(self) -> bool:
        """Whether the untouched base was measured beside the arms."""
        return BASE in self.measurements

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
        return first | {name: other.training for name, other in self.replicas.items() if other.arm == arm}

    def changes_forward(self, arm: str) -> bool:
        """Whether a technique changes the model's input, and so the first loss."""
        return any(self.techniques.get(arm, {}).get(name) is not None for name in CHANGES_FORWARD)

    def first_losses(self, arm: str) -> list[tuple[float, float]]:
        """Per seed the loss of (baseline, arm) before the first update: one model on one batch.

        Empty where it was not logged, and for an arm whose technique changes the model's input.
        """
        pairs = zip(self.trainings(BASELINE).values(), self.trainings(arm).values())
        losses = [(first.first_loss, second.first_loss) for first, second in pairs]
        if self.changes_forward(arm):
            return []
        return [(first, second) for first, second in losses if first is not None and second is not None]
