"""How many threads are best for a bundle on a host: tried in turns, from one to the cores of the process.

More threads share the work and wait for one another at every operator, so the best count depends on the
machine: its slow cores, its quota, its memory. Where the bundle says nothing, onnxruntime-genai takes half of
the hardware threads: one, on two. Each count has a worker of its own and the turns are those of any
measurement; the answer is kept short, since decoding speed alone decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedisp.bench.devices import Wanted
from edgedisp.bench.host import Host
from edgedisp.bench.timing import measure
from edgedisp.core.progress import Progress

PROMPT, GENERATE, REPETITIONS = 32, 32, 5
ALL_UP_TO = 8


def thread_counts(physical_cores: int, logical_cpus: int) -> list[int]:
    """1 .. cores; beyond 8 only doublings, the physical cores, and all CPUs where a core has two of them."""
    every = list(range(1, min(physical_cores, ALL_UP_TO) + 1))
    count = 2 * ALL_UP_TO
    while count < physical_cores:
        every.append(count)
        count *= 2
    return sorted({*every, physical_cores, max(physical_cores, logical_cpus)})


def sweep(
    bundles: Mapping[str, Path], host: Host, wanted: Wanted, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Label -> {best, rows [{threads, decode_tokens_per_s, low, high, prefill_tokens_per_s}]}.

    `best` has the highest median decoding speed; of equal ones the fewest threads.
    """
    machine = host.describe()
    cpus = machine["logical_cpus"]
    if machine["cpu_quota"] is not None:
        cpus = min(cpus, max(1, int(machine["cpu_quota"])))
    counts = thread_counts(machine["physical_cores"], cpus)
    found = {}
    for label, bundle in bundles.items():
        tried = {f"{label}, {count} threads": count for count in counts}
        timed = measure(
            dict.fromkeys(tried, bundle),
            host,
            prompt=min(PROMPT, wanted.prompt),
            generate=min(GENERATE, wanted.generate),
            repetitions=max(REPETITIONS, wanted.repetitions),
            threads=tried,
            seed=wanted.seed,
            pause_s=wanted.pause_s,
            cold=False,
            timeout_s=wanted.timeout_s,
            progress=progress,
        )
        rows = [_short(row) for row in timed["rows"]]
        best = max(rows, key=lambda row: (row["decode_tokens_per_s"], -row["threads"]))
        found[label] = {"best": best["threads"], "rows": rows}
    return found


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("threads", "decode_tokens_per_s", "prefill_tokens_per_s")
    interval = row["spread"]["decode_tokens_per_s"]
    return {**{name: row[name] for name in names}, "low": interval["low"], "high": interval["high"]}
