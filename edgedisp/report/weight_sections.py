"""The sections about weights: what quantization leaves of training, bits by weight, merged adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from edgedisp.core.results import Estimate, Json
from edgedisp.core.run import Run
from edgedisp.report.formatting import (
    MISSING,
    change,
    count,
    fixed,
    format_estimate,
    label,
    megabytes,
    percent,
    small,
)
from edgedisp.report.layout import TERMS, Section, grid, section

SURVIVED = {
    "nothing": "nothing measurable to survive",
    "kept": "still there",
    "weaker": "there, but weaker",
    "stronger": "there, and stronger",
    "reversed": "reversed",
    "unclear": "no longer clear",
}


def survival_section(run: Run) -> Section:
    """What quantization leaves of training: in the loss, and in the weights."""
    names = [(arm, precision) for precision in run.precisions for arm in run.arms]
    losses = [
        (f"{task}, {label(precision)}, {arm}", one)
        for arm, precision in names
        for task, one in run.loss_survival.get(arm, {}).get(precision, {}).items()
    ]
    loss_columns = {
        "the difference is": lambda one: SURVIVED.get(one.verdict, MISSING),
        "full precision": lambda one: format_estimate(one.full, signs=True),
        "quantized": lambda one: format_estimate(one.quantized, signs=True),
        "change": lambda one: format_estimate(one.change, signs=True),
    }
    weight_columns: dict[str, Callable[[Json], str]] = {
        "change, rms in steps": lambda one: small(one.get("rms_steps")),
        "over half a step": lambda one: percent(one.get("beyond_half_step"), 2),
        "integers moved": lambda one: percent(one.get("integers_moved"), 2),
        "slope": lambda one: fixed(one.get("slope"), 3),
        "cosine": lambda one: fixed(one.get("cosine"), 3),
    }
    records = [
        (f"{label(precision)}, {arm}", run.delta_survival[arm][precision])
        for arm, precision in names
        if run.delta_survival.get(arm, {}).get(precision)
    ]
    weight_rows = {
        part: [
            (f"{name} - {reference}, {key}{' bits' * (part == 'bits')}", figures)
            for name, record in records
            for reference, against in record["references"].items()
            for key, figures in (against.get(part) or {}).items()
        ]
        for part in ("bits", "components")
    }
    return section(
        "survival",
        [
            grid("loss", losses, loss_columns, TERMS["loss_change"]),
            grid("change", weight_rows["bits"], weight_columns, TERMS["parameter_change"]),
            grid("change", weight_rows["components"], weight_columns, "The same by component", folded=True),
        ],
        plots=("survival",),
        notes=_survival_notes(run, records),
    )


def _survival_notes(run: Run, records: list[tuple[str, Json]]) -> Iterator[str]:
    for name, record in records:
        if unmatched := record.get("unmatched"):
            yield f"{name}: {len(unmatched)} packed tensors have no counterpart in torch: not counted."
        if record["references"].get("base", {"total": 1}).get("total") is None:
            yield f"{name}: no weight is stored on a block grid that the change could be compared on."
        if record.get("nearest") is not None and record["nearest"] < 0.9999:
            nearest = percent(record["nearest"])
            yield f"{name}: {nearest} of the integers are the nearest ones; all are counted as if they were."
    for arm, training in run.training.items():
        if (training.merge_audit or {}).get("chosen") == "dequantized":
            yield f"{arm}: merged into the dequantized base, so its change holds that rounding too."


# Bits by weight


def searches(run: Run) -> dict[str, Json]:
    """Arm -> the search for bits by weight; an arm may follow another's search (`decided_by`)."""
    bundles = {arm: run.bundles.get(arm, {}).get("int4") for arm in run.arms}
    return {arm: bundle.search for arm, bundle in bundles.items() if bundle and bundle.search}


def mixed_section(run: Run) -> Section:
    """What a search for bits by weight chose, and the assignments it chose from."""
    grids = []
    for arm, search in searches(run).items():
        if "decided_by" in search:
            continue
        alone = search.get("sensitivity") or {}
        points: dict[str, Callable[[Json], str]] = {
            "MB": lambda row: megabytes(row.get("size_bytes")),
            "KL, predicted": lambda row: small(row.get("predicted_kl")),
            "KL, measured": lambda row: small(row.get("measured_kl")),
            "decode to uniform int4, predicted": lambda row: fixed(row.get("decode_ratio"), 2),
        }
        weights: dict[str, Callable[[Json], str]] = {
            "stored as": _stored,
            "MB": lambda row: megabytes(row.get("size_bytes")),
            "KL of it alone at 4 bits": lambda row, alone=alone: small(alone.get(row["name"])),  # type: ignore[misc]
        }
        rows = [(str(row["name"]), row) for row in run.bundles[arm]["int4"].tensors]
        named = [(str(row.get("name")), row) for row in search.get("points", [])]
        grids.append(grid("assignment", named, points, f"{arm}: whole assignments"))
        grids.append(grid("weight", rows, weights, f"{arm}: the assignment", folded=True))
    facts = [(f"int4, {arm}", _search_text(search)) for arm, search in searches(run).items()]
    return section("mixed", grids, facts=facts, plots=("pareto",))


def search_text(run: Run) -> str:
    """The choice of each search as lines for a terminal; empty without a search."""
    lines = []
    for arm, search in searches(run).items():
        if "decided_by" in search:
            continue
        lines.append(f"int4, {arm}: {_search_text(search)}")
        by_component: dict[str, Counter[str]] = {}
        for row in run.bundles[arm]["int4"].tensors:
            by_component.setdefault(str(row.get("component")), Counter())[_stored(row)] += 1
        for component, kinds in by_component.items():
            stored = ", ".join(f"{times} x {kind}" for kind, times in kinds.most_common())
            lines.append(f"  {component:10} {kinds.total():>3} weights  {stored}")
    return "\n".join(lines)


def _stored(row: Json) -> str:
    zero = "symmetric" if row.get("symmetric") else "asymmetric"
    return f"{row.get('bits')} bits g{row.get('group')} {zero} {row.get('method')}"


def _search_text(search: Json) -> str:
    measured_kl = f"KL {small(search.get('measured_kl'))} nats"
    perplexity = f"perplexity on training text {change(search.get('perplexity_increase'))}"
    if "decided_by" in search:
        return f"stored as {search['decided_by']} is: {measured_kl}, {perplexity}"
    goal = search.get("goal") or {}
    limit = f"perplexity + {percent(goal.get('max_perplexity_increase'))}"
    if goal.get("budget") is not None:
        limit = f"at most {megabytes(goal['budget'])} MB"
    text = f"{limit} asked; {megabytes(search.get('size_bytes'))} MB, {measured_kl} "
    text += f"(predicted {small(search.get('predicted_kl'))}), {perplexity}"
    if after := search.get("gptq"):
        increase = change(after.get("perplexity_increase"))
        text += f", after gptq KL {small(after.get('measured_kl'))}, perplexity {increase}"
    return text


# Adapters


def merge_section(run: Run) -> Section:
    """Held-out loss with the adapter on, merged and quantized. Empty without adapters."""
    audits = {arm: one.merge_audit for arm, one in run.training.items() if one.merge_audit}
    rows: dict[str, dict[str, Json]] = {}
    columns, facts, notes = {}, [], dict[str, None]()
    for arm, audit in audits.items():
        for row in audit["rows"]:
            rows.setdefault(row["name"], {})[arm] = row
        columns[f"{arm}, loss"] = lambda row, arm=arm: fixed(row.get(arm, {}).get("loss"), 4)
        columns[f"{arm}, from adapter on [95 %]"] = lambda row, arm=arm: _audit_text(row.get(arm))
        facts.append((arm, f"merged into {run.training[arm].merged_into}, because {audit.get('why')}"))
        gains = [_audit_text(audit["gains"].get(key)) for key in ("fp32", "int4")]
        worth = f"{gains[0]} nats per token from the base to the merged model, {gains[1]} from int4 to int4"
        facts.append((f"{arm}, worth of the adapter", worth))
        size, step = count(audit.get("tokens")), audit.get("grid") or {}
        kind = "symmetric" if step.get("symmetric") else "asymmetric"
        notes |= dict.fromkeys([f"{arm}: {audit['warning']}."] if audit.get("warning") else [])
        notes[
            f"Measured in torch on {size} held-out tokens. int4: weights alone, nearest in {kind} groups of "
            f"{step.get('group')}, embedding and head at {step.get('head_bits')} bits."
        ] = None
    table = grid("model", rows.items(), columns)
    return section("merge_audit", [table], facts=facts, notes=notes)


def _audit_text(record: Json | None) -> str:
    record = record or {}
    if record.get("name") == "adapter on":
        return MISSING
    return format_estimate(
        Estimate(record.get("difference"), record.get("low"), record.get("high")), signs=True
    )
