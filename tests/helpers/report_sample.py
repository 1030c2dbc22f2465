"""A finished two-arm run as typed results, without a model: what the tests of the report draw and print."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from edgedisp.core.files import from_json, to_json
from edgedisp.core.results import (
    ANSWERS_TASK,
    Bundle,
    Condensation,
    DeviceResult,
    Difference,
    Divergence,
    Estimate,
    Json,
    LayerProfile,
    LossSurvival,
    MeanDifference,
    Measurement,
    NoiseFloor,
    Parity,
    Score,
    Seeds,
    TaskDifference,
    TaskScore,
    Timing,
    Training,
    WrongAnswer,
)
from edgedisp.core.run import Replica, Run, Stage

LOSS, CLOZE = "heldout_perplexity", "heldout_cloze"
PRECISIONS = ["torch", "fp32", "int8", "int4"]
PERPLEXITY = {"torch": 11.9, "fp32": 11.9, "int8": 11.95, "int4": 14.2}
SIZE = {"fp32": 540_000_000, "int8": 138_000_000, "int4": 98_400_000}
DISPERSION = {"variant": "angular", "weight": 0.1, "layers": "all"}


def around(value: float, half: float, **more: Any) -> Estimate:
    return Estimate(value, value - half, value + half, detectable=1.43 * half, **more)


def loss_difference(value: float, half: float, p: float, base: float = 12.0) -> TaskDifference:
    """A perplexity's difference: `value` +- `half` in nats per token."""
    after = base * math.exp(value)
    estimate = around(after - base, base * half, p=p, n=400, documents=60)
    nats = around(value, half)
    difference = Difference("perplexity", base, after, estimate, False, nats, "tokens", test="document_swap")
    return TaskDifference(LOSS, {"perplexity": difference})


def share_difference(
    value: float, half: float, p: float, task: str = CLOZE, first: float = 0.4
) -> TaskDifference:
    estimate = around(value, half, p=p, n=400, documents=60)
    difference = Difference("accuracy", first, first + value, estimate, True, None, None, 10, 14, "mcnemar")
    nll = Difference("word_nll", 2.0, 1.99, around(-0.01, 0.02, p=0.3), False)
    return TaskDifference(task, {"accuracy": difference, "word_nll": nll})


def condensation(shift: float, change: Condensation | None = None) -> Condensation:
    layers = []
    for index in range(6):
        cosine = 0.4 if index == 5 else 0.1 + 0.08 * index + shift
        figures = {"cosine_raw": around(cosine, 0.01), "cosine_sink_excluded": around(cosine + 0.02, 0.01)}
        figures |= {"effective_rank": around(60.0 - 4 * index, 3.0)}
        figures |= {"kurtosis": around(4.0, 0.2), "max_over_median": around(100.0, 9.0)}
        counts = [round(900 * math.exp(-(((-1 + place / 10) - cosine) ** 2) * 20)) for place in range(20)]
        layers.append(LayerProfile(index, figures, tuple(counts)))
    correlations = {"spearman": around(0.9, 0.05), "kendall": around(0.8, 0.05)}
    mean = around(0.26 + shift, 0.01)
    return Condensation(layers, mean, correlations, 16, 4096, change)


def divergence(mean: float) -> Divergence:
    return Divergence(2048, mean, mean / 2, 2 * mean, 8 * mean, 40 * mean, 0.95, 0.9)


def measurement(arm: str, precision: str) -> Measurement:
    perplexity = PERPLEXITY[precision] - (0.0 if arm == "baseline" else 0.01)
    losses = {
        "perplexity": Score("perplexity", around(perplexity, 0.8, n=400, documents=60), False),
        "bits_per_byte": Score("bits_per_byte", around(0.91, 0.02), False),
    }
    cloze = {"accuracy": Score("accuracy", around(0.4, 0.05, n=400, documents=60), True)}
    against = {"parent": divergence(0.01)} if precision in ("int8", "int4") else {}
    against |= {"baseline": divergence(0.004)} if arm != "baseline" and precision != "torch" else {}
    parity = Parity(512, 1e-4, 1e-9, 0.999, 1.0, {"mean_kl": 1e-3}, {"opened": True}, passed=True)
    has_change = precision != "torch" or arm != "baseline"
    variants = {"threads": around(0.0, 1e-7), "attention": around(1e-6, 2e-6)}
    if precision != "torch":
        variants = {"decoding": around(2e-4, 3e-3)}
    return Measurement(
        {LOSS: TaskScore(LOSS, losses), CLOZE: TaskScore(CLOZE, cloze, chance=0.01)},
        condensation(0.0, condensation(-0.1) if has_change else None),
        against,
        None if precision == "torch" else parity,
        NoiseFloor(1e-5, variants) if arm == "baseline" else None,
    )


def training(arm: str, seed: int = 0) -> Training:
    is_baseline = arm == "baseline"
    log: list[Json] = [
        {"step": step, "loss": 2.5 - step / 400, "dispersion": None if is_baseline else -0.4, "lr": 1e-4}
        for step in range(1, 41)
    ]
    settings: Json = {"lr": 1e-4, "seed": seed, "schedule": "cosine"}
    settings |= {} if is_baseline else {"dispersion": DISPERSION}
    sha = f"{'a' if is_baseline else 'b'}{seed}" * 32
    return Training(40, 40_960, 150.0, sha, 270.0, 3_400_000_000, settings=settings, log=log)


def timing(label: str, speed: float) -> Timing:
    rates = {"decode_tokens_per_s": around(speed, 2.0), "ttft_ms": around(160.0, 5.0)}
    return Timing(label, 2, 128, 128, 5, **rates, prefill_tokens_per_s=around(780.0, 9.0), load_s=0.4)


def device(name: str, speed: float) -> DeviceResult:
    """What a phone measured: one bundle, and one task on which it is worse than here."""
    speeds = {"decode_tokens_per_s": around(speed, 2), "ttft_ms": Estimate(90.0)}
    row = Timing("dispersed/int4", 4, 128, 64, 5, **speeds, warnings=("drifted",))
    machine = {"cpu": "Cortex", "memory_bytes": 1 << 33, "phone": {"model": "<b>Pixel</b>"}}
    worse = Estimate(-0.1, -0.15, -0.05, p=0.01)
    difference = to_json(Difference("accuracy", 0.5, 0.4, worse, higher_is_better=True))
    value = {"value": 0.4, "low": 0.35, "high": 0.45}
    score = {
        "label": "dispersed/int4", "task": CLOZE, "metric": "accuracy", "higher_is_better": True,
        "is_share": True, "drawn": 100, "answered": 90, "truncated": 1,
        "device": value, "here": value, "difference": difference,
        "agreement": {"share": 0.9, "low": 0.8, "high": 0.95}, "logprob": {"mean": 0.1, "max": 2.0},
    }  # fmt: skip
    times = ("2026-11-27T15:44:12",)
    return DeviceResult(name, machine, [row], scores=[score], clock_mhz=(1800.0, 2400.0), measured=times)


def sample(value: float = -0.0008, half: float = 0.0031, p: float = 0.4, cloze: float = 0.5) -> Run:
    """A finished run; value, half, p: the headline's difference in nats. cloze: p of int8's +0.05."""
    arms = ["baseline", "dispersed"]
    same = {LOSS: loss_difference(-0.001, 0.002, 0.4), CLOZE: share_difference(0.0, 0.03, 1.0)}
    clear = share_difference(0.05, 0.03 if cloze <= 0.05 else 0.08, cloze)
    compared = {name: {**same} for name in PRECISIONS}
    compared["int8"][CLOZE], compared["int4"][LOSS] = clear, loss_difference(value, half, p)
    survival = LossSurvival(around(-0.001, 0.002), around(value, half), around(0.0, 0.004), "nothing")
    shares = dict.fromkeys(("rms_steps", "beyond_half_step", "integers_moved", "slope", "cosine"), 0.1)
    weights = {"nearest": 0.9, "references": {"base": {"total": shares, "components": {"mlp": shares}}}}
    return Run(
        name="wikipedia",
        arms=arms,
        precisions=PRECISIONS,
        hash8="3fa9c1d2",
        created="2026-02-03T14:05:11+00:00",
        command="edgedisp build wikipedia",
        recipe_yaml="name: wikipedia\n",
        machine={"cpu": "x86-64", "memory_bytes": 16_000_000_000},
        versions={"torch": "2.13.0"},
        seeds=[0],
        techniques={"baseline": {}, "dispersed": {"dispersion": DISPERSION}},
        model={
            "base": "HuggingFaceTB/SmolLM2-135M",
            "architecture": "llama",
            "weights_sha256": "c4" * 32,
            "parameters": {"embedding": 28_000_000, "mlp": 79_000_000, "total": 107_000_000, "tied": True},
        },
        corpus={
            "tokens_sha256": "7e" * 32,
            "context": 256,
            "heldout_documents": 60,
            "sources": ["text.jsonl"],
        },
        training={arm: training(arm) for arm in arms},
        bundles={
            arm: {name: Bundle(f"{arm}/{name}", size, {"MatMulNBits": 210}) for name, size in SIZE.items()}
            for arm in arms
        },
        measurements={arm: {name: measurement(arm, name) for name in PRECISIONS} for arm in arms},
        comparisons={"dispersed": compared},
        means={"dispersed": {"int4": MeanDifference(0.4, 0.41, around(0.01, 0.02, n=800), (CLOZE, "other"))}},
        loss_survival={"dispersed": {"int4": {LOSS: survival}}},
        delta_survival={arm: {"int4": weights} for arm in arms},
        latency=DeviceResult("local", rows=[timing(f"{arm}/{name}", 150.0) for arm in arms for name in SIZE]),
        stages=[Stage("corpus", 6.1, True), Stage("dispersed/model", 150.0, False)],
    )


def searched() -> Run:
    """The same with bits by weight in the int4 bundle of the dispersed arm."""
    sizes = {"size_bytes": 9e7, "predicted_kl": 0.01, "measured_kl": 0.02, "perplexity_increase": 0.03}
    points = [{"name": name, **sizes} for name in ("chosen", "int4")]
    goal = {"budget": 100_000_000}
    search = {"goal": goal, **sizes, "points": points, "curve": points, "sensitivity": {"lm_head": 0.004}}
    grid = {"bits": 8, "group": 32, "symmetric": True, "method": "rtn"}
    run = sample()
    bundle = run.bundles["dispersed"]["int4"]
    bundle = replace(bundle, search=search, by_tensor=[{"name": "lm_head", "component": "head", **grid}])
    return replace(run, bundles={"dispersed": {"int4": bundle}})


def several_arms(seeds: int = 1) -> Run:
    """The same with an arm more, a copy of the dispersed one, and with several seeds."""
    run = from_json(Run, to_json(sample()))
    arms = [*run.arms, "neftune"]
    for part in (run.measurements, run.bundles, run.comparisons):
        part["neftune"] = part["dispersed"]  # type: ignore[assignment]
    run.training["neftune"], run.techniques["neftune"] = training("neftune"), {"neftune": 5.0}
    replicas = {}
    if seeds > 1:
        main = run.comparisons["dispersed"]["int4"][LOSS].main
        spread = Seeds((-0.0013, -0.0003), 0.0007, -0.004, 0.002)
        nats = replace(main.nats or Estimate(0.0), seeds=spread)
        main = replace(main, nats=nats)
        run.comparisons["dispersed"]["int4"][LOSS] = TaskDifference(LOSS, {"perplexity": main})
        replicas = {f"{arm}-seed1": Replica(arm, 1, training(arm, 1)) for arm in arms}
    return replace(run, arms=arms, seeds=list(range(seeds)), replicas=replicas)


def chat_sample(dispersed: tuple[float, ...] = (0.72, 0.71, 0.647)) -> Run:
    """A run scored by its answers to 300 questions, with the base; dispersed: shares of exact ones."""
    shares = {"base": (0.02, 0.02, 0.0), "baseline": (0.71, 0.707, 0.64), "dispersed": dispersed}

    def measured(share: float) -> Measurement:
        exact = Score("exact", Estimate(share, max(0.0, share - 0.05), share + 0.05, n=300), True, True)
        return Measurement({ANSWERS_TASK: TaskScore(ANSWERS_TASK, {"exact": exact})})

    def compared(first: str, second: str) -> dict[str, dict[str, TaskDifference]]:
        changes = {}
        for at, before, after in zip(SIZE, shares[first], shares[second]):
            form = 0.041, float(abs(after - before) < 0.05), ANSWERS_TASK, before
            changes[at] = {ANSWERS_TASK: share_difference(after - before, *form)}
        return changes

    run, call = sample(), '{"name": "turn_off", "arguments": {"area": "cellar", "device": "lights"}}'
    answers = {"base/int4": "Sure!", "baseline/int4": call, "dispersed/int4": call.replace("cellar", "hall")}
    return replace(
        run,
        precisions=[*SIZE],
        bundles=run.bundles | {"base": run.bundles["baseline"]},
        measurements={arm: dict(zip(SIZE, map(measured, shares[arm]))) for arm in shares},
        comparisons={"dispersed": compared("baseline", "dispersed")},
        gains={arm: compared("base", arm) for arm in run.arms},
        answers=[WrongAnswer("Lights off in the <cellar>", call, answers)],
    )
