"""The section about bits by weight: what a search chose, and the curve it chose from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from edgedisp.report.reading import Summary, arms, at, branch, number
from edgedisp.report.section import Grid, Section
from edgedisp.report.wording import MISSING, count, fixed, megabytes, percent, raised, small

PARETO = "pareto"
Search = dict[str, Any]


def mixed(summary: Summary, drawn: Collection[str]) -> Section:
    """Empty where no weight was searched for."""
    found = list(searches(summary))
    followed = [
        (f"int4, {arm}", _followed_words(search))
        for arm in arms(summary)
        if (search := branch(summary, "bundles", arm, "int4", "search")) and "decided_by" in search
    ]
    lead = (
        "Bits, group and method of each weight were chosen by a search: the least predicted KL divergence "
        "from the unrounded model within the budget. Sensitivities were measured on training text."
        if found
        else ""
    )
    grids = [grid for arm, search in found for grid in (_points(arm, search), _weights(summary, arm, search))]
    return Section(
        "mixed",
        "Bits by weight",
        lead,
        facts=(*((f"int4, {arm}", _words(search)) for arm, search in found), *followed),
        plots=tuple(name for name in (PARETO,) if name in drawn),
        grids=tuple(grids),
    )


def assignment_text(summary: Summary) -> str:
    """The choice of each arm as lines for a terminal; empty without a search."""
    lines = []
    for arm, search in searches(summary):
        lines += [f"int4, {arm}: {_words(search)}"]
        for row in _counted(summary, arm):
            lines.append(f"  {row[0]:10} {row[1]:>3} weights  {row[2]}")
    return "\n".join(lines)


def searches(summary: Summary) -> Iterator[tuple[str, Search]]:
    """Arms that searched; the others follow one of them."""
    for arm in arms(summary):
        search = branch(summary, "bundles", arm, "int4", "search")
        if search and "decided_by" not in search:
            yield arm, search


def rows_of(part: Any) -> list[dict[str, Any]]:
    return [branch(row) for row in part] if isinstance(part, list) else []


def _words(search: Search) -> str:
    goal = branch(search, "goal")
    budget, increase = number(goal.get("budget")), number(goal.get("max_perplexity_increase"))
    asked = f"at most {megabytes(budget)} MB" if budget is not None else f"perplexity + {percent(increase)}"
    parts = [
        f"{asked} asked; {megabytes(number(search.get('size_bytes')))} MB",
        f"KL {small(number(search.get('measured_kl')))} nats "
        f"(predicted {small(number(search.get('predicted_kl')))})",
        f"perplexity on {count(number(search.get('perplexity_tokens')))} tokens of training text "
        f"{raised(number(search.get('perplexity_increase')))}",
    ]
    after = branch(search, "gptq")
    if after:
        kl, change = (number(after.get(key)) for key in ("measured_kl", "perplexity_increase"))
        parts.append(f"after gptq KL {small(kl)}, perplexity {raised(change)}")
    return ", ".join(parts)


def _followed_words(search: Search) -> str:
    kl, increase = (number(search.get(key)) for key in ("measured_kl", "perplexity_increase"))
    return (
        f"stored as {search.get('decided_by')} is: KL {small(kl)} nats, perplexity on training text "
        f"{raised(increase)}"
    )


def _points(arm: str, search: Search) -> Grid:
    rows = [
        (
            str(row.get("name") or MISSING),
            megabytes(number(row.get("size_bytes"))),
            small(number(row.get("predicted_kl"))),
            small(number(row.get("measured_kl"))),
            fixed(number(row.get("decode_ratio")), 2),
        )
        for row in rows_of(search.get("points"))
    ]
    head = ("assignment", "MB", "KL, predicted", "KL, measured", "decode to uniform int4, predicted")
    return Grid(head, tuple(rows), f"{arm}: whole assignments (decode predicted from bytes read)")


def _counted(summary: Summary, arm: str) -> list[tuple[str, str, str]]:
    """(component, weights, what they are stored as)."""
    by_component: dict[str, Counter[str]] = {}
    for row in rows_of(at(summary, "bundles", arm, "int4", "by_tensor")):
        by_component.setdefault(str(row.get("component")), Counter())[_stored(row)] += 1
    return [
        (component, str(kinds.total()), ", ".join(f"{times} x {kind}" for kind, times in kinds.most_common()))
        for component, kinds in by_component.items()
    ]


def _stored(row: dict[str, Any]) -> str:
    zero = "symmetric" if row.get("symmetric") else "asymmetric"
    return f"{row.get('bits')} bits g{row.get('group')} {zero} {row.get('method')}"


def _weights(summary: Summary, arm: str, search: Search) -> Grid:
    alone = branch(search, "sensitivity")
    rows = [
        (
            str(row.get("name")),
            _stored(row),
            megabytes(number(row.get("size_bytes"))),
            small(number(alone.get(str(row.get("name"))))),
        )
        for row in rows_of(at(summary, "bundles", arm, "int4", "by_tensor"))
    ]
    head = ("weight", "stored as", "MB", "KL of it alone at 4 bits")
    return Grid(head, tuple(rows), f"{arm}: the assignment", (0, 1), folded=True)
