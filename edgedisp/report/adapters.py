"""The section about adapters: what merging and int4 leave of them, and which base they were merged into."""

from __future__ import annotations

from typing import Any

from edgedisp.report.reading import Summary, arms, at, branch, number
from edgedisp.report.section import Grid, Section
from edgedisp.report.wording import MISSING, count, decimals_for, fixed, plural, signed

NATS = "nats per token"


def merge_audit(summary: Summary) -> Section:
    """Held-out loss with the adapter on, merged and quantized: rows x arms. Empty without adapters."""
    audits = {arm: branch(summary, "midtrain", arm, "merge_audit") for arm in arms(summary)}
    audits = {arm: audit for arm, audit in audits.items() if _rows(audit)}
    title = "Merge audit"
    if not audits:
        return Section("merge_audit", title)
    facts = [(arm, _merged_into(summary, arm, audit)) for arm, audit in audits.items()]
    facts += [(f"{arm}, worth of the adapter", _worth(audit)) for arm, audit in audits.items()]
    warnings = [f"{arm}: {audit['warning']}." for arm, audit in audits.items() if audit.get("warning")]
    lead = (
        f"Held-out loss in {NATS} with the adapter on, merged into each base it can be merged into, and on "
        "the int4 grid: lower is better. Differences are from the same arm's adapter on, paired by block."
    )
    return Section(
        "merge_audit",
        title,
        lead,
        facts=tuple(facts),
        grids=(_grid(audits),),
        notes=(*warnings, *dict.fromkeys(_measured(audit) for audit in audits.values())),
    )


def _rows(audit: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Row name -> row."""
    found = audit.get("rows")
    rows = [branch(row) for row in found] if isinstance(found, list) else []
    return {str(row.get("name")): row for row in rows}


def _merged_into(summary: Summary, arm: str, audit: dict[str, Any]) -> str:
    into = at(summary, "midtrain", arm, "merged_into") or MISSING
    return f"merged into {into}, because {audit.get('why') or 'no reason was recorded'}"


def _worth(audit: dict[str, Any]) -> str:
    """What the merged adapter takes off the loss, before and after int4: whether the training survived."""
    before, after = (_difference(branch(audit, "gains", key)) for key in ("fp32", "int4"))
    return f"{before} {NATS} from the base to the merged model, {after} from int4 to int4"


def _difference(found: dict[str, Any]) -> str:
    """`+0.0123 [+0.0100, +0.0150]`."""
    value, low, high = (number(found.get(key)) for key in ("difference", "low", "high"))
    if low is None or high is None:
        return signed(value, 4)
    decimals = min(4, decimals_for((high - low) / 2, 4))
    return f"{signed(value, decimals)} [{signed(low, decimals)}, {signed(high, decimals)}]"


def _grid(audits: dict[str, dict[str, Any]]) -> Grid:
    by_arm = {arm: _rows(audit) for arm, audit in audits.items()}
    names = list(dict.fromkeys(name for rows in by_arm.values() for name in rows))
    head = ["model"]
    for arm in by_arm:
        head += [f"{arm}, loss", f"{arm}, from adapter on [95 %]"]
    texts = []
    for name in names:
        cells = [name]
        for rows in by_arm.values():
            row = rows.get(name, {})
            shown = MISSING if name == "adapter on" else _difference(row)
            cells += [fixed(number(row.get("loss")), 4), shown]
        texts.append(tuple(cells))
    return Grid(tuple(head), tuple(texts))


def _measured(audit: dict[str, Any]) -> str:
    grid = branch(audit, "grid")
    tokens, blocks = (number(audit.get(key)) or 0 for key in ("tokens", "blocks"))
    group, head_bits = (count(number(grid.get(key))) for key in ("group", "head_bits"))
    kind = "symmetric" if grid.get("symmetric") else "asymmetric"
    where = f"{count(tokens)} tokens of {plural(round(blocks), 'held-out block')}"
    return (
        f"Measured in torch on {where}. int4 rows: weights alone, rounded to nearest in {kind} groups of "
        f"{group}, embedding and head at {head_bits} bits. Rounding of activations shows in the bundles' "
        "scores alone."
    )
