"""All arms against the baseline: what each adds, its differences, and how much of them is luck.

The verdict is about one arm (`reading.focus`). A build with more arms, or with several seeds, gets this
section on top, and the command line a small table of it. p values are corrected over all that is listed:
the more arms, the more chance findings.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from edgedisp.report.comparisons import Comparison, comparisons, headline, holm
from edgedisp.report.reading import (
    BASELINE,
    Summary,
    arms,
    at,
    bits,
    branch,
    changes_forward,
    focus,
    label,
    number,
    precisions,
    seeds,
    tasks,
)
from edgedisp.report.section import Grid, Section
from edgedisp.report.wording import MISSING, count, decimals_for, p_value, plural, signed, small

TITLE = "All arms against the baseline"
LUCK = (
    "The spread between seeds is the luck of training: initial adapter, dropout, order of the text and "
    "random draws. The interval with seeds holds both (half-widths add as squares; the seeds' part is "
    "Student's t times their standard deviation over the root of their number)."
)
FIRST_SEED = "Geometry, timing, sizes and what is packed are those of the first seed's training."


def wanted(summary: Summary) -> bool:
    """Whether there is more to tell than the before/after table does."""
    return focus(summary) is not None and (len(arms(summary)) > 2 or seeds(summary) > 1)


def every_arm(summary: Summary, plots: tuple[str, ...]) -> Section:
    """The section, with the pictures that belong into it; empty for two arms and one seed."""
    if not wanted(summary):
        return Section("arms", TITLE)
    found = {arm: comparisons(summary, arm) for arm in others(summary)}
    several = seeds(summary) > 1
    lead = (
        "Every arm started from the same weights, and read the same tokens in the same order with the same "
        "settings as the baseline"
        + (" of its seed" if several else "")
        + ". What it adds is told beside its name."
    )
    if at(summary, "runs"):
        lead = (
            "Arms of several runs, each trained as its recipe says, against the baseline of the first on the "
            "items that both were asked."
        )
    lead += f" Each was trained with {seeds(summary)} seeds." if several else ""
    grids = [*_task_grids(summary, found), *([_luck_grid(found)] if several else []), _all_grid(found)]
    notes = [*_exempt(summary), *([LUCK, FIRST_SEED] if several else [])]
    return Section(
        "arms", TITLE, lead, plots=plots, grids=tuple(grid for grid in grids if grid.rows), notes=tuple(notes)
    )


def others(summary: Summary) -> list[str]:
    """All arms but the baseline."""
    return [arm for arm in arms(summary) if arm != BASELINE]


def added(summary: Summary, arm: str) -> str:
    """What an arm's training adds to plain cross-entropy, in words."""
    adds = branch(summary, "techniques", arm)
    words = []
    if at(adds, "dispersion"):
        words.append(_dispersion_words(summary, branch(adds, "dispersion")))
    said = {
        "neftune": "NEFTune noise, alpha {}",
        "active_forgetting": "embedding drawn anew every {} steps",
        "embedding_dropout": "embedding dropout {}",
    }
    words += [text.format(small(number(adds[key]))) for key, text in said.items() if key in adds]
    return "; ".join(words) or ("nothing" if arm == BASELINE else MISSING)


def _dispersion_words(summary: Summary, settings: Mapping[str, Any]) -> str:
    """`angular dispersion, weight 0.1, layers all`, and what else the arms of this build differ in."""
    layers = settings.get("layers")
    where = ", ".join(map(str, layers)) if isinstance(layers, list | tuple) else str(layers)
    weight = small(number(settings.get("weight")))
    words = [f"{settings.get('variant')} dispersion", f"weight {weight}", f"layers {where}"]
    every = [branch(summary, "techniques", arm, "dispersion") for arm in arms(summary)]
    for key in settings:
        values = {str(one.get(key)) for one in every if one}
        if len(values) > 1 and key not in ("variant", "weight", "layers"):
            words.append(f"{key} {settings[key]}")
    return ", ".join(words)


def _task_grids(summary: Summary, found: Mapping[str, Sequence[Comparison]]) -> list[Grid]:
    """For each task a table, arms down and precisions across; the first one open."""
    grids: list[Grid] = []
    for task in tasks(summary):
        names = [name for name in precisions(summary) if _of(found, task, name)]
        rows = [
            (arm, added(summary, arm), *(_short(_one(ones, task, name), half=True) for name in names))
            for arm, ones in found.items()
        ]
        if names:
            unit = _unit(next(one for ones in found.values() for one in ones if one.task == task))
            what = f"{task}{', ' + unit if unit else ''}"
            caption = f"{what}: arm - baseline ± half of its 95 % interval (*: leaves out 0)"
            head = ("arm", "adds", *map(label, names))
            grids.append(Grid(head, tuple(rows), caption, (0, 1), folded=bool(grids)))
    return grids


def _of(found: Mapping[str, Sequence[Comparison]], task: str, precision: str) -> bool:
    return any(_one(ones, task, precision) for ones in found.values())


def _one(ones: Sequence[Comparison], task: str, precision: str) -> Comparison | None:
    return next((one for one in ones if (one.task, one.precision) == (task, precision)), None)


def _scaled(one: Comparison) -> tuple[float, int]:
    """Factor for display (shares as points), and decimals."""
    scale = 100.0 if one.unit == "share" else 1.0
    return scale, decimals_for(one.half_width * scale, 3)


def _unit(one: Comparison) -> str:
    return {"share": "points", "nats": "nats per token"}.get(one.unit, "")


def _short(one: Comparison | None, half: bool = False) -> str:
    """`-0.0012 [-0.0040, +0.0016]`, or with `half` `-0.0012 ±0.0028`; a star where 0 is left out."""
    if one is None:
        return MISSING
    scale, decimals = _scaled(one)
    value, low, high = (signed(scale * x, decimals) for x in (one.difference, one.low, one.high))
    ends = f"±{scale * one.half_width:.{decimals}f}" if half else f"[{low}, {high}]"
    return f"{value} {ends}" + ("*" if one.excludes_zero else "")


def _sd(one: Comparison | None) -> str:
    if one is None or one.sd is None:
        return MISSING
    scale, decimals = _scaled(one)
    return f"{scale * one.sd:.{decimals}f}"


def _luck_grid(found: Mapping[str, Sequence[Comparison]]) -> Grid:
    """At the precision that ships: the error over items, and the spread between seeds beside it."""
    rows = []
    for arm, ones in found.items():
        one = headline(ones)
        if one is None or len(one.by_seed) < 2 or one.sd is None:
            continue
        scale, decimals = _scaled(one)
        texts = [signed(scale * one.difference, decimals)]
        texts += [MISSING if x is None else f"{scale * x:.{decimals}f}" for x in (one.item_se, one.sd)]
        texts.append(", ".join(signed(scale * value, decimals) for value in one.by_seed))
        alone = [MISSING if x is None else signed(scale * x, decimals) for x in (one.item_low, one.item_high)]
        texts += [
            ", ".join(alone),
            f"{signed(scale * one.low, decimals)}, {signed(scale * one.high, decimals)}",
        ]
        rows.append((f"{arm}, {label(one.precision)}", *texts))
    head = (
        "arm", "difference", "SE over items", "SD of seeds", "each seed", "95 % over items alone",
        "95 % with seeds",
    )  # fmt: skip
    caption = (
        "How much is luck: held-out loss, nats per token. Standard error over items beside the standard "
        "deviation between seeds"
    )
    return Grid(head, tuple(rows), caption, (0, 4))


def _all_grid(found: Mapping[str, Sequence[Comparison]]) -> Grid:
    """Every comparison of every arm, p corrected over all of them."""
    rows = []
    for one in holm([one for ones in found.values() for one in ones]):
        scale, decimals = _scaled(one)
        value, low, high = (signed(scale * x, decimals) for x in (one.difference, one.low, one.high))
        way = {True: "better", False: "worse", None: MISSING}[one.gain] if one.survives else "not clear"
        texts = (
            one.arm,
            one.task,
            label(one.precision),
            value,
            f"{low}, {high}",
            _unit(one),
            count(one.documents),
        )
        rows.append((*texts, p_value(one.p), p_value(one.p_holm), way))
    head = (
        "arm", "task", "precision", "difference", "95 % interval", "unit", "documents", "p", "p (Holm)",
        "arm is",
    )  # fmt: skip
    caption = f"All {plural(len(rows), 'comparison')} of all arms; p corrected over all of them"
    return Grid(head, tuple(rows), caption, (0, 1, 2, 5, 9), folded=True)


def _exempt(summary: Summary) -> list[str]:
    names = [arm for arm in others(summary) if changes_forward(summary, arm)]
    if not names:
        return []
    return [
        f"{', '.join(names)}: noise or dropout on the embedding changes the very first loss, so it cannot be "
        "checked there against the baseline's."
    ]


def render_arms(summary: Summary, width: int = 80) -> str:
    """The same for a terminal: each arm at the precision that ships and in torch; empty if not `wanted`."""
    if not wanted(summary):
        return ""
    found = {arm: comparisons(summary, arm) for arm in others(summary)}
    firsts = [one for ones in found.values() if (one := headline(ones))]
    if not firsts:
        return ""
    task = firsts[0].task
    names = sorted({one.precision for ones in found.values() for one in ones if one.task == task}, key=bits)
    names = list(dict.fromkeys((names[0], names[-1])))
    several = seeds(summary) > 1
    head = ["arm", *map(label, names), *([f"seeds' sd, {label(names[0])}"] if several else [])]
    for half in (False, True):
        rows = [head]
        for arm, ones in found.items():
            cells = [_one(ones, task, name) for name in names]
            rows.append([arm, *(_short(cell, half) for cell in cells), *([_sd(cells[0])] if several else [])])
        text = _columns(rows)
        if max(map(len, text)) <= width:
            break
    unit = _unit(firsts[0])
    over = f", {seeds(summary)} seeds" if several else ""
    title = f"{TITLE}: {task}{', ' + unit if unit else ''}{over}"
    return "\n".join([*textwrap.wrap(title, width), *(line[:width] for line in text)])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns and a rule under the head; names are left-aligned and printable."""
    plain = [["".join(char if char.isprintable() else " " for char in text) for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*plain)]
    lines = [
        "  ".join(
            text.rjust(size) if place else text.ljust(size)
            for place, (text, size) in enumerate(zip(row, widths))
        )
        for row in plain
    ]
    return [lines[0].rstrip(), "─" * len(lines[0]), *(line.rstrip() for line in lines[1:])]
