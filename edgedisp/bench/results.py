"""From timed repetitions to a device's result: a row for each bundle, a comparison for each pair of twins.

Timings on a busy machine have long tails, so nothing here assumes a normal distribution. The interval of a
median comes from order statistics: the k-th smallest and k-th largest of n values enclose the true median
with a probability that depends on n and k alone; for five values at most 93.75 %. Drift is Theil and Sen's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp.bench.bundles import graph_hash, weight_traffic
from edgedisp.bench.devices import BenchOptions
from edgedisp.core.errors import BadInput
from edgedisp.core.results import BASELINE, DeviceResult, Estimate, Json, Timing

LEVEL = 0.95
LEAST_COVERAGE = 0.9  # below it (four values or fewer) no difference between bundles is called real
FEWEST_REPETITIONS = 5  # with fewer, no interval of the median reaches LEAST_COVERAGE
NOTABLE_DIFFERENCE = 0.03  # two bundles with the same graph: less than 3 % is not worth a warning
NOTABLE_DRIFT_PERCENT = 10.0  # a fanless laptop loses 20 % within four repetitions
NOTABLE_OTHER_CPUS = 0.25


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of one or more values.

    low and high are the narrowest pair of order statistics with 95 % coverage; smallest and largest where no
    pair reaches it.
    """
    ordered, k = sorted(values), _rank(len(values))
    return statistics.median(ordered), ordered[k - 1], ordered[-k]


def coverage(n: int, k: int | None = None) -> float:
    """Probability that the k-th smallest and k-th largest of n values enclose the true median.

    Exact: 1 - 2 P(fewer than k of n values lie below the median). k None: as in `median_interval`.
    """
    outside: float = sum(math.comb(n, i) for i in range(k or _rank(n))) / 2**n
    return max(0.0, 1.0 - 2.0 * outside)


def _rank(n: int) -> int:
    """The largest k whose coverage reaches LEVEL; 1 where none does."""
    return next((k for k in range(n // 2, 1, -1) if coverage(n, k) >= LEVEL), 1)


def drift_percent(values: Sequence[float]) -> float | None:
    """Change from the first to the last value along the Theil-Sen line, in % of the median; None below 3."""
    if len(values) < 3:
        return None
    slopes = [(values[j] - values[i]) / (j - i) for i, j in combinations(range(len(values)), 2)]
    middle = statistics.median(values)
    return 100.0 * statistics.median(slopes) * (len(values) - 1) / middle if middle else None


def compare_speeds(a: Sequence[float], b: Sequence[float]) -> Json:
    """Ratio b / a of figures timed in turns: {ratio, low, high, coverage, differs}.

    Values are paired by repetition, because what disturbs a repetition mostly disturbs its neighbour too.
    `differs` is None where too few repetitions were made to tell, and true only where the whole interval lies
    on one side of 1 and the median is off by more than 3 %.
    """
    ratios = [right / left for left, right in zip(a, b)]
    ratio, low, high = median_interval(ratios)
    share, differs = coverage(len(ratios)), None
    if share >= LEAST_COVERAGE:
        differs = not low <= 1.0 <= high and abs(ratio - 1.0) > NOTABLE_DIFFERENCE
    return {"ratio": ratio, "low": low, "high": high, "coverage": share, "differs": differs}


def device_result(
    device: str,
    machine: Json,
    turns: Sequence[Json],
    bundles: Mapping[str, tuple[Path, Json]],
    options: BenchOptions,
) -> DeviceResult:
    """The result of a device from its timed repetitions, `turns`, in the order of timing.

    bundles: label -> (graph file that was timed, facts as the runner gives them). A bundle without a turn has
    no row. Labels `baseline/X` and `OTHER/X` are compared as twins, where both were timed.
    """
    by_label = {label: [turn for turn in turns if turn["label"] == label] for label in bundles}
    timed = {label: repetitions for label, repetitions in by_label.items() if repetitions}
    rows = [_timing(label, *bundles[label], repetitions, machine) for label, repetitions in timed.items()]
    few = f"{options.repetitions} repetitions are too few to tell a difference from chance; "
    graphs = {label: graph for label, (graph, _) in bundles.items()}
    return DeviceResult(
        device,
        machine,
        rows,
        [compare_twins(pair, graphs, timed) for pair in twin_pairs([*timed])],
        load_average={
            "before": machine.get("load_average_1m"),
            "after": turns[-1].get("load_average_1m") if turns else None,
        },
        clock_mhz=_range(turn.get("clock_mhz") for turn in turns),
        temperature_c=_range(turn.get("temperature_c") for turn in turns),
        warnings=(f"{few}{FEWEST_REPETITIONS} or more can",) * (options.repetitions < FEWEST_REPETITIONS),
        options={name: getattr(options, name) for name in ("seed", "warmup", "pause_s")},
        repetitions=list(turns),
    )


def _range(values: Iterable[float | None]) -> tuple[float, float] | None:
    numbers = [value for value in values if value is not None]
    return (min(numbers), max(numbers)) if numbers else None


def _timing(label: str, graph: Path, facts: Json, repetitions: Sequence[Json], machine: Json) -> Timing:
    """One bundle's medians with their intervals, memory, traffic and warnings."""
    figures: dict[str, Any] = {
        name: Estimate(*median_interval([repetition[name] for repetition in repetitions]))
        for name in ("ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s")
    }
    token_ms = [time for repetition in repetitions for time in repetition["token_ms"]]
    positions = facts["prompt"] + facts["generate"] / 2  # mean of cached positions that a token attends to
    read = weight_traffic(graph) + int(facts["kv_cache_bytes_per_position"] * positions)
    decode = [repetition["decode_tokens_per_s"] for repetition in repetitions]
    drift, bandwidth = drift_percent(decode), read * statistics.median(decode) / 1e9
    most = machine.get("memory_gb_per_s")
    return Timing(
        label,
        **{name: facts[name] for name in ("threads", "prompt", "generate", "load_s", "weights_bytes")},
        **figures,
        repetitions=len(repetitions),
        token_ms_p50=float(np.percentile(token_ms, 50)),
        token_ms_p90=float(np.percentile(token_ms, 90)),
        peak_memory_bytes=repetitions[-1]["peak_memory_bytes"],
        bytes_read_per_token=read,
        bandwidth_gb_per_s=bandwidth,
        bandwidth_share=bandwidth / most if most else None,
        drift_percent=drift,
        warnings=tuple(_warnings(facts["threads"], drift, repetitions, machine)),
    )


def _warnings(threads: int, drift: float | None, repetitions: Sequence[Json], machine: Json) -> Iterator[str]:
    if machine.get("logical_cpus") and threads > machine["logical_cpus"]:
        yield f"{threads} threads on {machine['physical_cores']} cores: those that wait stop the others"
    first, last = (repetitions[index].get("clock_mhz") for index in (0, -1))
    drop = 100.0 * (first - last) / first if first and last else 0.0
    if drop > NOTABLE_DRIFT_PERCENT:
        yield f"the clock fell by {drop:.0f} % from the first to the last repetition"
    if drift is not None and abs(drift) > NOTABLE_DRIFT_PERCENT:
        yield f"decode speed drifted by {drift:+.0f} % from the first to the last repetition"
    busy = [r["other_cpus"] for r in repetitions if r.get("other_cpus") is not None]
    if busy and statistics.median(busy) > NOTABLE_OTHER_CPUS:
        yield f"other processes kept {statistics.median(busy):.1f} CPUs busy meanwhile"
    if any(r["tokens"] != repetitions[0]["tokens"] for r in repetitions):
        yield "repetitions gave different tokens from the same prompt"


def label_bundles(folders: Sequence[Path], reserved: Collection[str] = ()) -> dict[str, Path]:
    """Label -> folder: the shortest distinct endings of the paths that are not `reserved`."""
    for depth in range(1, 12):
        labels = {"/".join(folder.resolve().parts[-depth:]): folder for folder in folders}
        if len(labels) == len(folders) and labels.keys().isdisjoint(reserved):
            return labels
    raise BadInput(f"{folders[0]}: the same folder is named twice")


def twin_pairs(labels: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs (`baseline/X`, `OTHER/X`) among labels that name arm and precision: they must have one graph."""
    twins = [(f"{BASELINE}/{label.partition('/')[2]}", label) for label in labels if "/" in label]
    return tuple((before, after) for before, after in twins if before in labels and before != after)


def compare_twins(
    pair: tuple[str, str], graphs: Mapping[str, Path], turns: Mapping[str, Sequence[Json]]
) -> Json:
    """Two bundles that ought to be one graph: are they, and do their speeds differ?

    Training changes values, not the graph, so a difference in speed is a fault of the measurement.
    """
    baseline, candidate = pair
    same = graph_hash(graphs[baseline]) == graph_hash(graphs[candidate])
    decode = compare_speeds(*([turn["decode_tokens_per_s"] for turn in turns[label]] for label in pair))
    fault = None
    if not same:
        fault = f"{baseline} and {candidate} have different graphs, so they are no twins"
    elif decode["differs"]:
        fault = (
            f"same graph, but {candidate} decodes at {decode['ratio']:.2f} times the speed of {baseline}: "
            "a fault of the measurement (heat, neighbours, memory placement), not a property of the model"
        )
    sides = {"baseline": baseline, "candidate": candidate}
    return {**sides, "same_graph": same, "decode": decode, "fault": fault}
