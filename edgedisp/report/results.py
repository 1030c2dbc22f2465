"""The sections that hold results: condensation, training, quantization, latency, checks, sizes.

Each function takes the summary and the names of the plots that exist, and gives a `Section`; a section
with nothing in it is left out of the report.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from edgedisp.report.plot_inside import HEATMAP, LAYERS, TRAINING, layers
from edgedisp.report.plot_scores import DIFFERENCES, SCORES, TRADEOFF
from edgedisp.report.reading import BASELINE, DISPERSED, Summary, arms, at, branch, label, number, precisions
from edgedisp.report.section import Grid, Section
from edgedisp.report.table import latency_row, table
from edgedisp.report.verdict import comparisons, holm
from edgedisp.report.wording import (
    MISSING,
    count,
    decimals_for,
    figure,
    fixed,
    megabytes,
    percent,
    seconds,
    signed,
    small,
)

Rows = tuple[tuple[str, ...], ...]


def result_sections(summary: Summary, drawn: Collection[str]) -> list[Section]:
    """All result sections that have content, in reading order."""
    found = [
        scores(summary, drawn),
        condensation(summary, drawn),
        training(summary, drawn),
        latency(summary, drawn),
        verify(summary),
        sizes(summary),
    ]
    return [section for section in found if not section.empty]


def _existing(drawn: Collection[str], *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in drawn)


def scores(summary: Summary, drawn: Collection[str]) -> Section:
    """What quantization costs each arm, and every paired comparison with its corrected p."""
    grids = [grid for grid in (_comparison_grid(summary), _bits_grid(summary)) if grid.rows]
    lead = (
        "The same items scored on the torch model and on every bundle that ships, through the same scorer. "
        "Absolute "
        "scores have wide intervals because texts differ in difficulty; the paired difference takes that out."
    )
    return Section(
        "scores",
        "Scores and quantization",
        lead,
        plots=_existing(drawn, DIFFERENCES, SCORES),
        grids=tuple(grids),
    )


def _comparison_grid(summary: Summary) -> Grid:
    """Every comparison; p corrected over all of them, the headline included here (the stricter way)."""
    rows = []
    for one in holm(comparisons(summary)):
        scale, unit = (100.0, "points") if one.unit == "share" else (1.0, one.unit and "nats per token")
        decimals = decimals_for(one.half_width * scale, 3)
        value, low, high = (signed(scale * x, decimals) for x in (one.difference, one.low, one.high))
        way = {True: "better", False: "worse", None: MISSING}[one.gain] if one.excludes_zero else "not clear"
        sizes_ = count(one.n), count(one.documents)
        texts = (f"{one.task}, {label(one.precision)}", value, f"{low}, {high}", unit, *sizes_)
        rows.append((*texts, small(one.p), small(one.p_holm), way))
    head = (
        "comparison",
        "difference",
        "95 % interval",
        "unit",
        "items",
        "documents",
        "p",
        "p (Holm)",
        "dispersed is",
    )
    return Grid(head, tuple(rows), "All paired comparisons (dispersed - baseline)", (0, 3, 8))


def _bits_grid(summary: Summary) -> Grid:
    """Bits per byte: perplexity made comparable between tokenizers."""
    rows = []
    for arm in arms(summary):
        for precision in precisions(summary):
            for result in branch(summary, "accuracy", arm, precision).values():
                found = at(result, "extra", "bits_per_byte")
                value = number(found) if not isinstance(found, dict) else number(found.get("value"))
                if value is not None:
                    ends = [number(at(found, end)) for end in ("low", "high")]
                    interval = "" if None in ends else ", ".join(fixed(end, 4) for end in ends)
                    rows.append((f"{arm}, {label(precision)}", fixed(value, 4), interval or MISSING))
    return Grid(
        ("bundle", "bits per byte", "95 % interval"), tuple(rows), "Held-out bits per byte", folded=True
    )


def condensation(summary: Summary, drawn: Collection[str]) -> Section:
    """The paper's heatmap, the layer curves, and their numbers."""
    lead = (
        "Embedding condensation: layer by layer the token vectors of one sequence point into an ever "
        "narrower cone, "
        "more so in small models. Dispersion loss works against it. Measured in torch, in full precision."
    )
    measured = {arm: branch(summary, "condensation", arm) for arm in arms(summary)}
    notes = tuple(
        f"{arm}: {count(number(part.get('tokens')))} tokens in {count(number(part.get('sequences')))} "
        "sequences."
        for arm, part in measured.items()
        if number(part.get("tokens"))
    )
    grid = _layer_grid(summary)
    plots = _existing(drawn, HEATMAP, LAYERS)
    return Section(
        "condensation", "Condensation", lead, plots=plots, grids=(grid,) if grid.rows else (), notes=notes
    )


def _layer_grid(summary: Summary) -> Grid:
    kinds = {
        "cosine_raw": "raw",
        "cosine_sink_excluded": "no first token",
        "cosine_mean_removed": "mean removed",
        "effective_rank": "effective rank",
    }
    by_arm = {
        arm: {str(layer.get("layer")): layer for layer in layers(summary, arm)} for arm in arms(summary)
    }
    by_arm = {arm: found for arm, found in by_arm.items() if found}
    names = list(dict.fromkeys(name for found in by_arm.values() for name in found))
    head = ["layer"] + [f"{title}, {arm}" for title in kinds.values() for arm in by_arm]
    rows = []
    for name in names:
        values = [number(at(found, name, key)) for key in kinds for found in by_arm.values()]
        rows.append((name, *(fixed(value, 3) for value in values)))
    return Grid(
        tuple(head), tuple(rows), "Mean pairwise cosine and effective rank of every layer", folded=True
    )


def training(summary: Summary, drawn: Collection[str]) -> Section:
    """The curves and, per arm, what training took."""
    rows = []
    for arm in arms(summary):
        part = branch(summary, "midtrain", arm)
        if not part:
            continue
        log = part.get("log")
        last = branch(log[-1]) if isinstance(log, list) and log else {}
        texts = [count(number(part.get(key))) for key in ("steps", "tokens")]
        texts += [seconds(number(part.get("seconds"))), figure(number(part.get("tokens_per_s")))]
        texts += [megabytes(number(part.get("peak_memory_bytes"))), fixed(number(last.get("loss")), 3)]
        rows.append((arm, *texts, fixed(number(last.get("dispersion")), 4)))
    head = ("arm", "steps", "tokens", "time", "tokens/s", "peak memory, MB", "last loss", "last dispersion")
    grids = (Grid(head, tuple(rows)),) if rows else ()
    return Section(
        "training", "Training", plots=_existing(drawn, TRAINING), grids=grids, notes=_overhead(summary)
    )


def _overhead(summary: Summary) -> tuple[str, ...]:
    """What the dispersion term costs in training time."""
    before, after = (number(at(summary, "midtrain", arm, "tokens_per_s")) for arm in (BASELINE, DISPERSED))
    if not before or not after:
        return ()
    return (f"The dispersed arm trained at {percent(after / before)} of the baseline's speed.",)


def latency(summary: Summary, drawn: Collection[str]) -> Section:
    """Every bundle's timing, the measurement's own noise, and quality against cost."""
    part = branch(summary, "latency")
    rows = []
    for precision in precisions(summary):
        for arm in arms(summary):
            row = latency_row(summary, arm, precision)
            if row:
                rows.append(_latency_texts(f"{label(precision)}, {arm}", row))
    head = ("bundle", "load, s", "first token, ms", "prefill, tokens/s", "decode, tokens/s", "p50, ms/token")
    head += ("p90, ms/token", "peak memory, MB", "weights, MB")
    threads = f" with {count(number(part['threads']))} threads" if number(part.get("threads")) else ""
    where = (
        f"Measured on {part.get('device') or 'local'}{threads}: batch 1, after a warm-up, arms interleaved. "
    )
    lead = where + "Decode speed is counted after the first token." if rows else ""
    warnings = part.get("warnings")
    notes = [*_timing_noise(summary), *(map(str, warnings) if isinstance(warnings, list) else ())]
    grids = (Grid(head, tuple(rows)),) if rows else ()
    plots = _existing(drawn, TRADEOFF)
    return Section("latency", "Latency and memory", lead, plots=plots, grids=grids, notes=tuple(notes))


def _latency_texts(name: str, row: dict[str, Any]) -> tuple[str, ...]:
    keys = (
        "load_s",
        "ttft_ms",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "token_ms_p50",
        "token_ms_p90",
    )
    rates = [_with_interval(row, key) for key in keys]
    return (
        name,
        *rates,
        *(megabytes(number(row.get(key))) for key in ("peak_memory_bytes", "weights_bytes")),
    )


def _with_interval(row: dict[str, Any], key: str) -> str:
    """`150.0 [148.0, 152.0]` where the row carries `<key>_low` and `<key>_high`, or a nested low/high dict."""
    low = number(row.get(f"{key}_low", at(row, "low", key)))
    high = number(row.get(f"{key}_high", at(row, "high", key)))
    shown = figure(number(row.get(key)))
    return shown if low is None or high is None else f"{shown} [{figure(low)}, {figure(high)}]"


def _timing_noise(summary: Summary) -> Iterable[str]:
    """Dispersion leaves the graph as it is, so the gap between the arms measures the measurement."""
    gaps = []
    for row in table(summary).rows:
        before, after = (row.cell("decode_tokens_per_s", arm).value for arm in (BASELINE, DISPERSED))
        if before and after:
            gaps.append(abs(after / before - 1))
    if gaps:
        yield (
            "Dispersion does not change the graph, so the arms should be equally fast: the largest gap in "
            "decode speed, "
            f"{percent(max(gaps))}, is the noise of this measurement."
        )


def verify(summary: Summary) -> Section:
    """How far each bundle is from its torch model, and whether the device runtime opens it."""
    rows = []
    for precision in precisions(summary):
        for arm in arms(summary):
            entry = branch(summary, "verify", arm, precision)
            if entry:
                rows.append(_verify_texts(f"{label(precision)}, {arm}", entry))
    head = (
        "bundle",
        "max abs difference",
        "mean KL",
        "p99 KL",
        "same top token",
        "same greedy text",
        "tokens",
    )
    head += ("onnxruntime-genai", "limits", "passed")
    lead = (
        "Every bundle's logits against the torch model's on the same text. KL in nats per token."
        if rows
        else ""
    )
    grids = (Grid(head, tuple(rows), "", (0, 7, 8, 9)),) if rows else ()
    return Section("verify", "Check of what ships", lead, grids=grids)


def _verify_texts(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
    genai = branch(entry, "genai")
    reason = f"no: {genai.get('reason')}" if genai.get("reason") else "no"
    opened = "opened" if genai.get("opened") else reason if genai else MISSING
    limits = ", ".join(f"{key} {small(number(value))}" for key, value in branch(entry, "limits").items())
    passed = {True: "yes", False: "NO"}.get(entry.get("passed"), MISSING)  # type: ignore[arg-type]
    divergence = [small(number(entry.get(key))) for key in ("max_abs_difference", "mean_kl", "p99_kl")]
    agreement = [percent(number(entry.get(key))) for key in ("top1_agreement", "greedy_agreement")]
    return (
        name,
        *divergence,
        *agreement,
        count(number(entry.get("tokens"))),
        opened,
        limits or MISSING,
        passed,
    )


def sizes(summary: Summary) -> Section:
    """Where the parameters are, and how large each bundle is."""
    parts = branch(summary, "model", "parameters")
    total = number(parts.get("total"))
    rows, bars = [], []
    for name in ("embedding", "attention", "mlp", "norm", "head"):
        value = number(parts.get(name))
        if value is not None and total:
            tied = name == "head" and bool(parts.get("tied"))
            share = 0.0 if tied else value / total
            rows.append(
                (name, "tied to the embedding" if tied else count(value), MISSING if tied else percent(share))
            )
            bars.append(share)
    if total and rows:
        rows.append(("total", count(total), "100.0 %"))
        bars.append(0.0)
    grids = (
        [Grid(("component", "parameters", "share"), tuple(rows), "Parameters", bars=tuple(bars))]
        if rows
        else []
    )
    built = _bundle_grid(summary)
    return Section("sizes", "Sizes", grids=(*grids, *([built] if built.rows else [])))


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
