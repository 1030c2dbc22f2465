"""The section about divergence, token by token: of bundles from their fp32 parents, of arms from each other,
and of two scorings of one model (the noise floor)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from edgedisp.report.plot_divergence import DIVERGENCE
from edgedisp.report.reading import BASELINE, Summary, arms, at, bits, branch, label, number, precisions
from edgedisp.report.section import Grid, Section
from edgedisp.report.wording import MISSING, count, percent, small

FIGURES = {
    "mean_kl": "mean KL",
    "median_kl": "median",
    "p90_kl": "p90",
    "p99_kl": "p99",
    "max_kl": "largest",
}
WAYS = {"threads": "another number of threads", "attention": "another attention kernel"}
SHOWN = 10


def divergence(summary: Summary, drawn: Collection[str]) -> Section:
    """KL of bundles from their fp32 parents and of the arms from each other, worst tokens, noise floor."""
    grids = [
        _grid(summary, "parent", "Bundle against its fp32 parent"),
        _grid(summary, "baseline", "Arm against the baseline, at the same precision"),
        _noise_grid(summary),
        *_worst_grids(summary),
    ]
    lead = (
        "KL divergence of the next-token distributions on held-out text, in nats: what perplexity averages "
        "away. Quantization moves a model away from its parent; training moves the arms apart."
    )
    plots = tuple(name for name in (DIVERGENCE,) if name in drawn)
    found = tuple(grid for grid in grids if grid.rows)
    return Section("divergence", "Divergence, token by token", lead, plots=plots, grids=found)


def _grid(summary: Summary, reference: str, caption: str) -> Grid:
    rows = []
    for precision in precisions(summary):
        for arm in arms(summary):
            found = branch(summary, "divergence", arm, precision, reference)
            if not found:
                continue
            figures = [small(number(found.get(key))) for key in FIGURES]
            shares = [percent(number(found.get(key))) for key in ("top1_agreement", "top5_overlap")]
            rows.append((f"{label(precision)}, {arm}", *figures, *shares, count(number(found.get("tokens")))))
    head = ("model", *FIGURES.values(), "same top token", "top 5 in common", "tokens")
    return Grid(head, tuple(rows), f"{caption}, nats")


def _noise_grid(summary: Summary) -> Grid:
    rows = []
    for precision in precisions(summary):
        found = branch(summary, "noise", precision)
        variants = branch(found, "variants")
        if not variants:
            continue
        told = [_shift(branch(variants, name)) for name in WAYS]
        rows.append((label(precision), *told, small(number(found.get("floor")))))
    head = ("baseline at", *(f"{way}, nats" for way in WAYS.values()), "noise floor, nats")
    caption = "The same model scored in another way: a difference no larger than the floor is none"
    return Grid(head, tuple(rows), caption)


def _shift(told: dict[str, Any]) -> str:
    """`+1.2e-05 [-3e-06, 2.6e-05]`."""
    value, low, high = (number(told.get(key)) for key in ("difference", "low", "high"))
    if value is None:
        return MISSING
    return small(value) if low is None or high is None else f"{small(value)} [{small(low)}, {small(high)}]"


def _worst_grids(summary: Summary) -> list[Grid]:
    """For the smallest bundle of the baseline and of each other arm, the tokens that moved most."""
    shipped = min(precisions(summary), key=bits, default=None)
    if shipped is None:
        return []
    grids = []
    for arm in arms(summary):
        for reference, what in (("parent", "its fp32 parent"), ("baseline", "the baseline")):
            worst = at(summary, "divergence", arm, shipped, reference, "worst")
            rows = [_worst(branch(one)) for one in worst[:SHOWN]] if isinstance(worst, list) else []
            head = ("KL", "text before", "then came", what.removeprefix("its "), f"{arm}, {label(shipped)}")
            caption = f"{arm} at {label(shipped)}: the tokens furthest from {what}"
            if rows and (arm != BASELINE or reference == "parent"):
                grids.append(Grid(head, tuple(rows), caption, (1, 2, 3, 4), folded=True))
    return grids


def _worst(one: dict[str, Any]) -> tuple[str, ...]:
    sides = [
        f"{_shown(one.get(side))} ({percent(number(one.get(f'{side}_probability')), 0)})"
        for side in ("reference", "other")
    ]
    truth = one.get("truth")
    context = "…" + _visible(str(one.get("context") or ""))[-90:]
    return (small(number(one.get("kl"))), context, MISSING if truth is None else _shown(truth), *sides)


def _shown(text: Any) -> str:
    """A token between quotes, so that spaces are seen."""
    return f"“{_visible(str(text))}”"


def _visible(text: str) -> str:
    return "".join(char if char.isprintable() else "↵" if char == "\n" else "�" for char in text)
