"""From timed repetitions to one row for each bundle and one comparison for each pair of twins.

Timings on a busy machine have long tails in one direction, so nothing here assumes a normal distribution. The
interval of a median comes from order statistics: the k-th smallest and the k-th largest of n values enclose
the true median with a probability that depends on n and k alone (binomial with p = 1/2). Five values cannot
do better than smallest to largest, 93.75 %. Drift is Theil and Sen's, the median of all pairwise slopes,
which one bad value cannot move. Warnings are sentences for people; they change no figure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp.bench.graph_stats import find_graph, graph_hash, read_graph, weight_traffic
from edgedisp.bench.system import FAST_ON_ARM, FAST_ON_X86
from edgedisp.core.errors import BadInput
from edgedisp.core.results import BASELINE

FIGURES = ("ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s")
LEVEL = 0.95
LEAST_COVERAGE = 0.9  # below it (four values or fewer) no difference between bundles is called real
FEWEST_REPETITIONS = 5  # with fewer, no interval of the median reaches LEAST_COVERAGE
NOTABLE_DIFFERENCE = 0.03  # two bundles with the same graph: less than 3 % is not worth a warning
NOTABLE_DRIFT_PERCENT = 10.0  # a fanless laptop loses 20 % within four repetitions
NOTABLE_OTHER_CPUS = 0.25


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """{median, low, high, coverage} of one or more values.

    The narrowest pair of order statistics whose coverage reaches 95 %; smallest and largest where none does.
    `coverage` is exact: 1 - 2 P(fewer than k of n values lie below the median).
    """
    ordered, n, k = sorted(values), len(values), 1
    while k + 1 <= n // 2 and _coverage(n, k + 1) >= LEVEL:
        k += 1
    low, high = ordered[k - 1], ordered[n - k]
    return {"median": statistics.median(ordered), "low": low, "high": high, "coverage": _coverage(n, k)}


def _coverage(n: int, k: int) -> float:
    """Probability that the k-th smallest and k-th largest of n values enclose the true median."""
    outside: float = sum(math.comb(n, i) for i in range(k)) / 2**n
    return max(0.0, 1.0 - 2.0 * outside)


def drift_percent(values: Sequence[float]) -> float | None:
    """Change from the first to the last value along the Theil-Sen line, in % of the median; None below 3."""
    if len(values) < 3:
        return None
    slopes = [(values[j] - values[i]) / (j - i) for i, j in combinations(range(len(values)), 2)]
    middle = statistics.median(values)
    return 100.0 * statistics.median(slopes) * (len(values) - 1) / middle if middle else None


def clock_drop_percent(repetitions: Sequence[Mapping[str, Any]]) -> float | None:
    """By how much the clock after the last repetition is below the first's; None where it is not known."""
    first, last = repetitions[0].get("clock_mhz"), repetitions[-1].get("clock_mhz")
    return None if not first or last is None else 100.0 * (first - last) / first


def compare_speeds(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Ratio b / a of figures timed in turns: {ratio, low, high, coverage, differs}.

    Values are paired by repetition, because what disturbs a repetition mostly disturbs its neighbour too.
    `differs` is None where too few repetitions were made to tell, and true only where the whole interval lies
    on one side of 1 and the median is off by more than 3 %.
    """
    ratio = median_interval([right / left for left, right in zip(a, b)])
    low, high, middle = ratio["low"], ratio["high"], ratio["median"]
    differs = None
    if ratio["coverage"] >= LEAST_COVERAGE:
        differs = not low <= 1.0 <= high and abs(middle - 1.0) > NOTABLE_DIFFERENCE
    return {"ratio": middle, "low": low, "high": high, "coverage": ratio["coverage"], "differs": differs}


def summarize_bundle(
    label: str,
    graph: Path,
    facts: Mapping[str, Any],
    timed: Sequence[dict[str, Any]],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """The row of one bundle: medians, their intervals (`spread`), memory, traffic and warnings.

    graph: the graph file that was timed. timed: the repetitions of all bundles, in the order of the turns.
    """
    repetitions = [r for r in timed if r["label"] == label]
    spread = {name: median_interval([r[name] for r in repetitions]) for name in FIGURES}
    token_ms = [t for r in repetitions for t in r["token_ms"]]
    traffic = weight_traffic(read_graph(graph))
    positions = facts["prompt"] + facts["generate"] / 2  # mean of cached positions that a token attends to
    read = traffic["weight_bytes_per_token"] + int(facts["kv_cache_bytes_per_position"] * positions)
    row = {
        "label": label,
        **{name: facts[name] for name in ("prompt", "generate", "threads", "load_s", "weights_bytes")},
        "repetitions": len(repetitions),
        **{name: spread[name]["median"] for name in FIGURES},
        "token_ms_p50": float(np.percentile(token_ms, 50)),
        "token_ms_p90": float(np.percentile(token_ms, 90)),
        "peak_memory_bytes": repetitions[-1]["peak_memory_bytes"],
        "shape": {name: facts[name] for name in ("layers", "vocab_size", "kv_cache_bytes_per_position")},
        "weight_bits": traffic["weight_bits"],
        "bytes_read_per_token": read,
        "implied_bandwidth_gb_per_s": read * spread["decode_tokens_per_s"]["median"] / 1e9,
        "spread": spread,
        "drift_percent": drift_percent([r["decode_tokens_per_s"] for r in repetitions]),
        "clock_fell_percent": clock_drop_percent(repetitions),
    }
    return {**row, "warnings": _warnings(row, repetitions, machine)}


def _warnings(
    row: Mapping[str, Any], repetitions: Sequence[dict[str, Any]], machine: Mapping[str, Any]
) -> list[str]:
    warnings = []
    if machine.get("logical_cpus") and row["threads"] > machine["logical_cpus"]:
        warnings.append(
            f"{row['threads']} threads on {machine['physical_cores']} cores: those that wait stop the others"
        )
    fell, drift = row["clock_fell_percent"], row["drift_percent"]
    if fell is not None and fell > NOTABLE_DRIFT_PERCENT:
        warnings.append(f"the clock fell by {fell:.0f} % from the first to the last repetition")
    if drift is not None and abs(drift) > NOTABLE_DRIFT_PERCENT:
        warnings.append(f"decode speed drifted by {drift:+.0f} % from the first to the last repetition")
    others = [r["other_cpus"] for r in repetitions if r.get("other_cpus") is not None]
    if others and statistics.median(others) > NOTABLE_OTHER_CPUS:
        warnings.append(f"other processes kept {statistics.median(others):.1f} CPUs busy meanwhile")
    if any(r["tokens"] != repetitions[0]["tokens"] for r in repetitions):
        warnings.append("repetitions gave different tokens from the same prompt")
    return warnings


def warn_about_bits(rows: Sequence[dict[str, Any]], machine: Mapping[str, Any]) -> None:
    """Fewer bits per weight should not be slower; where they are, say so in the row, and why if it is known.

    Only rows of equal architecture are compared, and only intervals that do not touch count.
    """
    for row in rows:
        for other in rows:
            if row["shape"] != other["shape"] or row["weight_bits"] >= other["weight_bits"]:
                continue
            slow, fast = row["spread"]["decode_tokens_per_s"], other["spread"]["decode_tokens_per_s"]
            if slow["high"] < fast["low"]:
                row["warnings"].append(
                    f"{row['weight_bits']}-bit weights decode slower than the {other['weight_bits']}-bit "
                    f"ones of {other['label']} ({slow['median']:.1f} against {fast['median']:.1f} tokens/s): "
                    + slow_causes(row, machine)
                )


def slow_causes(row: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """The known reasons why `row` may be slower than a bundle with more bits, as the end of a sentence."""
    causes = []
    features = set(machine.get("features") or ())
    if features and not features & (FAST_ON_X86 | FAST_ON_ARM):
        lacking = "dotprod nor i8mm" if "asimd" in features else "avx512_vnni nor avx_vnni (VNNI)"
        causes.append(f"kernel missing: this CPU has neither {lacking}, so 8-bit products take several steps")
    threads, cores = row.get("threads"), machine.get("physical_cores")
    if threads and cores and threads != cores:
        few = "too few threads" if threads < cores else "too many threads"
        causes.append(f"{few}: {threads} on {cores} cores (`--threads sweep` finds the best count)")
    fell, drift = row.get("clock_fell_percent"), row.get("drift_percent")
    if fell is not None and fell > NOTABLE_DRIFT_PERCENT:
        causes.append(f"throttling: the clock fell by {fell:.0f} %")
    elif drift is not None and drift < -NOTABLE_DRIFT_PERCENT:
        causes.append(f"throttling is likely: decode slowed down by {-drift:.0f} % over the repetitions")
    unknown = (
        "look for a missing kernel (`edgedisp doctor` lists CPU features), too few threads or throttling"
    )
    return "; ".join(causes) or unknown


def few_repetitions(repetitions: int) -> list[str]:
    """The warning of a measurement with too few repetitions."""
    if repetitions >= FEWEST_REPETITIONS:
        return []
    return [
        f"{repetitions} repetitions are too few to tell a difference from chance; "
        f"{FEWEST_REPETITIONS} or more can"
    ]


def label_bundles(folders: Sequence[Path]) -> dict[str, Path]:
    """Label -> folder: the shortest distinct endings of the paths, such as `baseline/int4`."""
    for depth in range(1, 12):
        labels = {"/".join(folder.resolve().parts[-depth:]): folder for folder in folders}
        if len(labels) == len(folders):
            return labels
    raise BadInput("the same bundle is named twice")


def twin_pairs(labels: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pairs (`baseline/X`, `OTHER/X`) among labels that name arm and precision: they must have one graph."""
    twins = [(f"{BASELINE}/{label.partition('/')[2]}", label) for label in labels if "/" in label]
    return tuple((before, after) for before, after in twins if before in labels and before != after)


def compare_twins(
    baseline: str, candidate: str, bundles: Mapping[str, Path], timed: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Two bundles that ought to be one graph: are they, and do their speeds differ?

    Training changes values, not the graph, so a difference in speed is a fault of the measurement.
    """
    same = graph_hash(find_graph(bundles[baseline])) == graph_hash(find_graph(bundles[candidate]))
    speeds = [
        [r["decode_tokens_per_s"] for r in timed if r["label"] == label] for label in (baseline, candidate)
    ]
    decode = compare_speeds(*speeds)
    fault = None
    if not same:
        fault = f"{baseline} and {candidate} have different graphs, so they are no twins"
    elif decode["differs"]:
        fault = (
            f"same graph, but {candidate} decodes at {decode['ratio']:.2f} times the speed of {baseline}: "
            "a fault of the measurement (heat, neighbours, memory placement), not a property of the model"
        )
    return {
        "baseline": baseline, "candidate": candidate, "same_graph": same, "decode": decode, "fault": fault,
    }  # fmt: skip
