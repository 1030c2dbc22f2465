"""The sections about what ships: latency and memory, the check of every bundle, sizes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from edgedisp.report.before_after import latency_row, table
from edgedisp.report.plot_scores import TRADEOFF
from edgedisp.report.reading import Summary, arms, at, branch, label, number, precisions, seeds
from edgedisp.report.section import Grid, Section
from edgedisp.report.wording import MISSING, count, figure, megabytes, percent, small

RATES = {
    "load_s": "load, s",
    "ttft_ms": "first token, ms",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "decode_tokens_per_s": "decode, tokens/s",
    "token_ms_p50": "p50, ms/token",
    "token_ms_p90": "p90, ms/token",
}
MEMORY = {"peak_memory_bytes": "peak memory, MB", "weights_bytes": "weights, MB"}
CHECKS = ("max abs difference", "mean KL", "p99 KL", "same top token", "same greedy text", "tokens")


def latency(summary: Summary, drawn: Collection[str]) -> Section:
    """Every bundle's timing, the measurement's own noise, and quality against cost."""
    part = branch(summary, "latency")
    rows = []
    for precision in precisions(summary):
        for arm in arms(summary):
            row = latency_row(summary, arm, precision)
            if row:
                rows.append(_latency_texts(f"{label(precision)}, {arm}", row))
    device = str(part.get("device") or "local")
    where = f"Measured on {'the machine that built it' if device == 'local' else device}"
    timed = [number(part.get("threads")), *(number(at(row, "threads")) for row in _rows(part))]
    threads = next((f" with {count(known)} threads" for known in timed if known), "")
    where = f"{where}{threads}: batch 1, after a warm-up, arms interleaved."
    lead = f"{where} Decode speed is counted after the first token." if rows else ""
    notes = [*_timing_noise(summary), *_warnings(part)]
    grids = (Grid(("bundle", *RATES.values(), *MEMORY.values()), tuple(rows)),) if rows else ()
    plots = tuple(name for name in (TRADEOFF,) if name in drawn)
    return Section("latency", "Latency and memory", lead, plots=plots, grids=grids, notes=tuple(notes))


def _rows(part: dict[str, Any]) -> list[dict[str, Any]]:
    found = part.get("rows")
    return [branch(row) for row in found] if isinstance(found, list) else []


def _warnings(part: dict[str, Any]) -> list[str]:
    """What the measurement itself warns of: in general, between the arms, and for one bundle."""
    general, pairs = part.get("warnings"), part.get("pairs")
    said = [str(text) for text in general] if isinstance(general, list) else []
    said += [str(at(pair, "fault")) for pair in pairs if at(pair, "fault")] if isinstance(pairs, list) else []
    for row in _rows(part):
        own = row.get("warnings")
        name = f"{label(str(row.get('precision')))}, {row.get('arm')}"
        said += [f"{name}: {text}" for text in own] if isinstance(own, list) else []
    return said


def _latency_texts(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    rates = [_with_interval(row, key) for key in RATES]
    return (name, *rates, *(megabytes(number(row.get(key))) for key in MEMORY))


def _with_interval(row: dict[str, Any], key: str) -> str:
    """`150.0 [148.0, 152.0]` where the row's spread has an interval for the figure."""
    low, high = (number(at(row, "spread", key, end)) for end in ("low", "high"))
    shown = figure(number(row.get(key)))
    return shown if low is None or high is None else f"{shown} [{figure(low)}, {figure(high)}]"


def _timing_noise(summary: Summary) -> Iterable[str]:
    """Training leaves the graph as it is, so the gap between the arms measures the measurement."""
    gaps = []
    for row in table(summary).rows:
        speeds = [row.cell("decode_tokens_per_s", arm).value for arm in arms(summary)]
        known = [speed for speed in speeds if speed]
        if len(known) > 1:
            gaps.append(max(known) / min(known) - 1)
    if gaps:
        yield (
            "How a model was trained does not change its graph, so the arms should be equally fast: the "
            f"largest gap in decode speed, {percent(max(gaps))}, is the noise of this measurement."
        )
    if seeds(summary) > 1:
        yield "Timed: the first seed of each arm."


def verify(summary: Summary) -> Section:
    """How far each bundle is from its torch model, and whether the device runtime opens it."""
    rows = []
    for precision in precisions(summary):
        for arm in arms(summary):
            entry = branch(summary, "verify", arm, precision)
            if entry:
                rows.append(_verify_texts(f"{label(precision)}, {arm}", entry))
    if not rows:
        return Section("verify", "Check of what ships")
    lead = "Every bundle's logits against the torch model's on the same text. KL in nats per token."
    head = ("bundle", *CHECKS, "onnxruntime-genai", "limits", "passed")
    grids = (Grid(head, tuple(rows), "", (0, 7, 8, 9)),)
    return Section("verify", "Check of what ships", lead, grids=grids)


def _verify_texts(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    genai = branch(entry, "genai")
    reason = f"no: {genai.get('reason')}" if genai.get("reason") else "no"
    opened = "opened" if genai.get("opened") else reason if genai else MISSING
    known = {key: number(value) for key, value in branch(entry, "limits").items()}
    limits = ", ".join(f"{key} {small(value)}" for key, value in known.items() if value is not None)
    verdicts = [text for value, text in ((True, "yes"), (False, "NO")) if entry.get("passed") is value]
    divergence = [small(number(entry.get(key))) for key in ("max_abs_difference", "mean_kl", "p99_kl")]
    agreement = [percent(number(entry.get(key))) for key in ("top1_agreement", "greedy_agreement")]
    tokens = count(number(entry.get("tokens")))
    return (name, *divergence, *agreement, tokens, opened, limits or MISSING, (*verdicts, MISSING)[0])


def sizes(summary: Summary) -> Section:
    """Where the parameters are, and how large each bundle is."""
    parts = branch(summary, "model", "parameters")
    total = number(parts.get("total"))
    rows, bars = [], []
    for name in ("embedding", "attention", "mlp", "norm", "head", "total"):
        value = number(parts.get(name))
        if value is None or not total:
            continue
        if name == "head" and parts.get("tied"):
            rows.append((name, "tied to the embedding", MISSING))
            bars.append(0.0)
        else:
            rows.append((name, count(value), percent(value / total)))
            bars.append(value / total)
    grids = [Grid(("component", "parameters", "share"), tuple(rows), "Parameters", bars=tuple(bars))]
    return Section(
        "sizes", "Sizes", grids=tuple(grid for grid in (*grids, _bundle_grid(summary)) if grid.rows)
    )


def _bundle_grid(summary: Summary) -> Grid:
    found = {
        (precision, arm): size
        for precision in precisions(summary)
        for arm in arms(summary)
        if (size := number(at(summary, "bundles", arm, precision, "size_bytes"))) is not None
    }
    most = max(found.values(), default=0.0) or 1.0
    rows = []
    for (precision, arm), size in found.items():
        nodes = branch(summary, "bundles", arm, precision, "nodes")
        top = sorted(nodes.items(), key=lambda item: -(number(item[1]) or 0.0))[:4]
        words = ", ".join(f"{name} {count(number(value))}" for name, value in top)
        rows.append((f"{label(precision)}, {arm}", megabytes(size), words or MISSING))
    bars = tuple(size / most for size in found.values())
    return Grid(("bundle", "MB", "most frequent nodes"), tuple(rows), "Bundles", (0, 2), bars)
