"""What a pilot found, for people: the table, the verdict, and the line to paste into the recipe.

Everything shown is taken from one dict, `result`, which is also pilot.json and `--json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedisp.pilot.candidates import Pilot
from edgedisp.pilot.halving import COSINE_FLOOR, DIVERGES, HURTS, LOSS_FLOOR, NOTHING
from edgedisp.recipe import Dispersion

COLUMNS = ("variant", "layers")  # a column each where the candidates differ in it
FURTHEST = 100  # times its tokens, to which an effect is extrapolated
LEGEND = f"""\
loss: held-out, nats per token; cosine: mean over the pairs of tokens and over the layers; both less the
baseline of the same tokens, with paired 95 % intervals over texts (one seed: not over trainings). A
difference counts if its interval lies on one side of 0 and its size is at least
{LOSS_FLOOR:g} (loss) or {COSINE_FLOOR:g} (cosine).
The better half goes on (>): what lowers the loss, then what lowers the cosine most, last what hurts.
The best of several is a little flattered: it was chosen by text that a build scores as well."""


def result(
    pilot: Pilot, folder: Path, rungs: list[dict[str, Any]], judged_by: dict[str, Any]
) -> dict[str, Any]:
    """Everything there is to say of a pilot, fit for JSON.

    `rungs`: each {steps, tokens, candidates}; `judged_by`: how many windows, documents, tokens, sequences;
    `last`: every candidate's row of the longest rung it reached, with its `tokens`; `chosen`: the name of the
    setting to take, or None; `line`: it as a recipe's line, or None; `sentences`: the verdict.
    """
    last: dict[str, dict[str, Any]] = {}
    for rung in rungs:
        last |= {row["name"]: {**row, "tokens": rung["tokens"]} for row in rung["candidates"]}
    rows = [last[row["name"]] for rung in reversed(rungs) for row in rung["candidates"]]
    ordered = list({row["name"]: row for row in rows}.values())  # best of the longest rung first
    found = {
        "recipe": pilot.recipe.name,
        "run": str(folder),
        "smoke": pilot.recipe.is_smoke,
        "tokens": pilot.tokens(pilot.steps[-1]),
        "recipe_tokens": pilot.recipe_tokens,
        "floors": {"loss": LOSS_FLOOR, "cosine": COSINE_FLOOR},
        "judged_by": judged_by,
        "rungs": rungs,
        "last": ordered,
    }
    best = _chosen(found)
    return {
        **found,
        "chosen": None if best is None else best["name"],
        "line": None if best is None else _line(pilot, best),
        "sentences": _sentences(found, best),
    }


def _chosen(found: dict[str, Any]) -> dict[str, Any] | None:
    """The best setting of the longest rung that does something and does not harm, or None."""
    longest = [row for row in found["last"] if row["tokens"] == found["tokens"]]
    useful = (row for row in longest if row["effect"].startswith(("disperses", "loss better")))
    return next(useful, None)


def _line(pilot: Pilot, best: dict[str, Any]) -> str:
    """`dispersion: {...}` as it belongs under `train:`, with all else that the recipe's section says."""
    plain = Dispersion()
    shared = {
        name: value
        for name, value in pilot.dispersion.model_dump(mode="json").items()
        if value != getattr(plain, name)
    }
    chosen = {**shared, "variant": best["variant"], "weight": best["weight"], "layers": best["layers"]}
    names = [name for name in Dispersion.model_fields if name in chosen]
    return f"dispersion: {{{', '.join(f'{name}: {_yaml(chosen[name])}' for name in names)}}}"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def setting(row: dict[str, Any], found: dict[str, Any]) -> str:
    """`weight 0.3`, with variant and layers where the candidates differ in them."""
    named = [f"{name} {_text(row[name])}" for name in differing(found)]
    return " ".join([f"weight {row['weight']:g}", *(f"({', '.join(named)})" for _ in named[:1])])


def differing(found: dict[str, Any]) -> list[str]:
    """Which of variant and layers the candidates differ in."""
    return [name for name in COLUMNS if len({_text(row[name]) for row in found["last"]}) > 1]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "+".join(map(str, value))


def _sentences(found: dict[str, Any], best: dict[str, Any] | None) -> list[str]:
    idle, harmful = (
        [setting(row, found) for row in found["last"] if row["effect"] == effect]
        for effect in (NOTHING, HURTS)
    )
    if len(idle) == len(found["last"]):
        return [f"No setting does anything measurable within {found['tokens']:,} tokens.", *_needed(found)]
    said = [_acts(row, found) for row in found["last"] if row["effect"] not in (NOTHING, HURTS)]
    if harmful:
        said.append(f"Hurts, as far as each went: {_listed(harmful)}.")
    if idle:
        said.append(f"Nothing measurable, as far as each went: {_listed(idle)}.")
    if best is None:
        all_harm = all(row["effect"] in (HURTS, DIVERGES) for row in found["last"])
        advice = "try smaller weights" if all_harm else "more tokens, or other weights, may show one"
        said.append(f"No setting can be recommended: {advice}.")
    return said + _far(found)


def _acts(row: dict[str, Any], found: dict[str, Any]) -> str:
    """What one setting did, in the longest rung it reached."""
    name, within = setting(row, found), f"within {row['tokens']:,} tokens"
    if "diverged" in row:
        return f"{name}: {row['effect']} {within} ({row['diverged'].split('. ')[0]})."
    figures = f"cosine {row['cosine_raw']['difference']:+.4f}, loss {row['loss']['difference']:+.4f}"
    return f"{name}: {row['effect']} {within} ({figures})."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _needed(found: dict[str, Any]) -> list[str]:
    """What more might show something: said of the strongest, and as an extrapolation where it is one."""
    best = found["last"][0]
    cosine = best["cosine_raw"]
    name = setting(best, found)
    if cosine["high"] is None or cosine["high"] >= 0 or -cosine["difference"] * FURTHEST < COSINE_FLOOR:
        return [
            f"Even the strongest, {name}, moved the mean cosine by {cosine['difference']:+.4f}, too little "
            "to be followed further: no number of tokens can be named. Try larger weights, or more tokens."
        ]
    more = _round_up(best["tokens"] * COSINE_FLOOR / -cosine["difference"])
    return [
        f"The strongest, {name}, moved the mean cosine by {cosine['difference']:+.4f}. If that grew in "
        f"proportion to the tokens (an extrapolation, not a measurement) it would count from about {more:,} "
        "on. Try larger weights, or that many."
    ]


def _round_up(number: float) -> int:
    """To two significant digits."""
    step = 10 ** max(0, len(str(int(number))) - 2)
    return int(-(-number // step) * step)


def _far(found: dict[str, Any]) -> list[str]:
    if found["recipe_tokens"] <= 2 * found["tokens"]:
        return []
    times = found["recipe_tokens"] / found["tokens"]
    return [
        f"The recipe trains on {found['recipe_tokens']:,} tokens, {times:.3g} times as many: what is idle "
        "here may act there, and what is harmless here may hurt."
    ]


def announce(left: dict[str, Any], folder: Path) -> str:
    """What a pilot will cost, before it runs."""
    from edgedisp.core.progress import clock

    if not left["trainings"]:
        return f"{folder}: every training is there already"
    took = "" if left["seconds"] is None else f", about {clock(left['seconds'])}"
    trainings = "1 training" if left["trainings"] == 1 else f"at most {left['trainings']} trainings"
    return (
        f"{trainings}, {left['tokens']:,} tokens together{took}; weights are not kept, figures go to {folder}"
    )


def render(found: dict[str, Any]) -> str:
    """Table, verdict and recipe line as text."""
    by = found["judged_by"]
    extra = differing(found)
    same = [f"{name} {_text(found['last'][0][name])}" for name in COLUMNS if name not in extra]
    head = (
        f"{', '.join([found['recipe'], *same])}; judged on {by['tokens']:,} held-out tokens of "
        f"{by['documents']} documents, and {by['sequences']} sequences"
    )
    if found["smoke"]:
        head += "\nA tiny random model: this shows that the pilot runs, and says nothing of the recipe's."
    lines = [head, "", *_table(found, extra), "", LEGEND, "", *found["sentences"]]
    if found["line"]:
        lines += ["", "The setting to build with; in the recipe, under train:", f"  {found['line']}"]
    return "\n".join(lines)


def _table(found: dict[str, Any], extra: list[str]) -> list[str]:
    heads = ["tokens", "weight", *extra, "loss - baseline", "cosine - baseline", "effect"]
    rows = [
        [
            f"{rung['tokens']:,}",
            f"{row['weight']:g}",
            *(_text(row[name]) for name in extra),
            *(_cell(row.get(figure)) for figure in ("loss", "cosine_raw")),
            f"{'> ' if row['goes_on'] else '  '}{row['effect']}",
        ]
        for rung in found["rungs"]
        for row in rung["candidates"]
    ]
    heads[-1] = "  " + heads[-1]
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    return [
        "  ".join(_aligned(cell, width) for cell, width in zip(row, widths)).rstrip()
        for row in [heads, *rows]
    ]


def _aligned(cell: str, width: int) -> str:
    return cell.ljust(width) if cell[0].isalpha() or cell[0] in " >" else cell.rjust(width)


def _cell(part: dict[str, Any] | None) -> str:
    if part is None:
        return "-"
    ends = "" if part["low"] is None else f" [{part['low']:+.4f}, {part['high']:+.4f}]"
    return f"{part['difference']:+.4f}{ends}"
