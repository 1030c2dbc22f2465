"""From timed repetitions to what a table shows: one row per bundle, one verdict per pair of arms.

A row holds medians over the repetitions; its `spread` has p10, p50, p90 and an interval for the median of
each figure. Warnings are sentences for people: drift, neighbours, fewer bits that are not faster. They change
no figure.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedisp.bench.causes import causes, clock_fell_percent
from edgedisp.bench.graph_facts import open_graph, same_graph, weight_traffic
from edgedisp.bench.spread import compare, drift_percent, percentile, spread
from edgedisp.core.errors import BadInput

FIGURES = ("ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s")
DRIFT_TOLD_PERCENT = 10.0  # a fanless laptop loses 20 % within four repetitions
NEIGHBOUR_TOLD_CPUS = 0.25
CLOCK_TOLD_PERCENT = 10.0
BASELINE = "baseline"


def row(
    label: str,
    bundle: Path,
    facts: Mapping[str, Any],
    timed: Sequence[dict[str, Any]],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """All about one bundle: medians, spreads, memory, traffic, and what to beware of."""
    own = [r for r in timed if r["label"] == label]
    spreads = {name: spread([r[name] for r in own]) for name in FIGURES}
    pooled = [t for r in own for t in r["token_ms"]]
    traffic = weight_traffic(open_graph(bundle))
    # The mean number of cached positions that a decoded token attends to.
    positions = facts["prompt"] + facts["generate"] / 2
    read = traffic["weight_bytes_per_token"] + int(facts["kv_cache_bytes_per_position"] * positions)
    decode = spreads["decode_tokens_per_s"]["median"]
    return {
        "label": label,
        "prompt": facts["prompt"],
        "generate": facts["generate"],
        "threads": facts["threads"],
        "repetitions": len(own),
        "load_s": facts["load_s"],
        "load_cold_s": facts.get("load_cold_s"),
        **{name: spreads[name]["median"] for name in FIGURES},
        "token_ms_p50": percentile(pooled, 0.5),
        "token_ms_p90": percentile(pooled, 0.9),
        "peak_memory_bytes": own[-1]["peak_memory_bytes"],
        "proportional_memory_bytes": own[-1]["proportional_memory_bytes"],
        "energy_j": _energy_j(own, alone=len(own) == len(timed)),
        "weights_bytes": facts["weights_bytes"],
        "shape": {name: facts[name] for name in ("layers", "vocab_size", "kv_cache_bytes_per_position")},
        "weight_bits": traffic["weight_bits"],
        "bytes_read_per_token": read,
        "implied_bandwidth_gb_per_s": read * decode / 1e9,
        "spread": spreads,
        "drift_percent": drift_percent([r["decode_tokens_per_s"] for r in own]),
        "clock_fell_percent": clock_fell_percent(own),
        "warnings": _warnings(own, facts["threads"], machine),
    }


def _energy_j(own: Sequence[dict[str, Any]], alone: bool) -> float | None:
    """Joules of one repetition: the processor's counter, else the battery's where nothing else was timed."""
    counted = [r["energy_j"] for r in own if r.get("energy_j") is not None]
    if len(counted) == len(own):
        return statistics.median(counted)
    left = [r["battery_j"] for r in own if r.get("battery_j") is not None]
    taken = left[0] - left[-1] if alone and len(left) == len(own) > 1 else 0.0
    return taken / (len(own) - 1) if taken > 0 else None


def _warnings(own: Sequence[dict[str, Any]], threads: int, machine: Mapping[str, Any]) -> list[str]:
    """What to beware of in one bundle's figures."""
    found = []
    cores = machine["physical_cores"]
    if threads > machine["logical_cpus"]:
        found.append(f"{threads} threads on {cores} cores: those that wait stop the others")
    fell = clock_fell_percent(own)
    if fell is not None and fell > CLOCK_TOLD_PERCENT:
        found.append(f"the clock fell by {fell:.0f} % from the first to the last repetition")
    drift = drift_percent([r["decode_tokens_per_s"] for r in own])
    if drift is not None and abs(drift) > DRIFT_TOLD_PERCENT:
        found.append(f"decode speed drifted by {drift:+.0f} % from the first to the last repetition")
    others = [r["other_cpus"] for r in own if r["other_cpus"] is not None]
    if others and statistics.median(others) > NEIGHBOUR_TOLD_CPUS:
        found.append(f"other processes kept {statistics.median(others):.1f} CPUs busy meanwhile")
    if any(r["tokens"] != own[0]["tokens"] for r in own):
        found.append("repetitions gave different tokens from the same prompt")
    return found


def warn_about_bits(rows: Sequence[dict[str, Any]], machine: Mapping[str, Any]) -> None:
    """Fewer bits per weight should not be slower; where they are, say so in the row, and why if it is known.

    Only rows of equal architecture are compared, and only intervals that do not touch count.
    """
    for mine in rows:
        for other in rows:
            if mine["shape"] != other["shape"] or mine["weight_bits"] >= other["weight_bits"]:
                continue
            slow, fast = mine["spread"]["decode_tokens_per_s"], other["spread"]["decode_tokens_per_s"]
            if slow["high"] < fast["low"]:
                mine["warnings"].append(
                    f"{mine['weight_bits']}-bit weights decode slower than the {other['weight_bits']}-bit "
                    f"ones of {other['label']} ({slow['median']:.1f} against {fast['median']:.1f} tokens/s): "
                    + causes(mine, machine)
                )


def labelled(folders: Sequence[Path]) -> dict[str, Path]:
    """Label -> folder: the shortest distinct endings of the paths, such as `baseline/int4`."""
    for depth in range(1, 12):
        labels = {"/".join(folder.resolve().parts[-depth:]): folder for folder in folders}
        if len(labels) == len(folders):
            return labels
    raise BadInput("the same bundle is named twice")


def arms_to_compare(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (`baseline/X`, `OTHER/X`) among labels that name arm and precision: they must have one graph."""
    twins = [(f"{BASELINE}/{label.partition('/')[2]}", label) for label in labels if "/" in label]
    return [(before, after) for before, after in twins if before in labels and before != after]


def pair(a: str, b: str, bundles: Mapping[str, Path], timed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Two bundles that ought to be one graph: are they, and do their speeds differ?"""
    graphs = same_graph(bundles[a], bundles[b])
    speeds = [[r["decode_tokens_per_s"] for r in timed if r["label"] == label] for label in (a, b)]
    decode = compare(*speeds)
    fault = None
    if not graphs["same"]:
        fault = "the two bundles have different graphs: " + "; ".join(graphs["differences"])
    elif decode["differs"]:
        fault = (
            f"same graph, but {b} decodes at {decode['ratio']:.2f} times the speed of {a}: a fault of the "
            f"measurement (heat, neighbours, memory placement), not a property of the model"
        )
    return {"baseline": a, "dispersed": b, "same_graph": graphs, "decode": decode, "fault": fault}
