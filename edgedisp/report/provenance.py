"""The sections that say where figures come from: fairness, stage times, reproduction, limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgedisp.report.claims import RULES
from edgedisp.report.reading import (
    BASELINE,
    Summary,
    arms,
    at,
    branch,
    changes_forward,
    first_losses,
    focus,
    leaves,
    number,
    seeds,
    trainings,
    twins,
)
from edgedisp.report.section import Grid, Section
from edgedisp.report.wording import MISSING, count, fixed, megabytes, plural, seconds, short_hash

LIMITS = (
    "Perplexity is the exponential of the mean loss per token on held-out text of the training text's kind; "
    "lower is "
    "better. It says how well the model predicts such text, not how well it answers.",
    "heldout_cloze asks for the last word of a passage; heldout_continuation for the true next sentence "
    "among four. "
    "Both are made from the held-out text. Higher is better; chance is 25 % for the second.",
    "Intervals are 95 % bootstrap intervals that resample documents, so that sentences of one document "
    "count together.",
    "A small token budget shows what this recipe does, not what dispersion does after 200 million tokens.",
    "Whether dispersion changes what quantization costs is an open question; the table shows this build's "
    "answer.",
    "Timings hold for this machine, these threads and this runtime.",
)

ONE_SEED = (
    "One training seed per arm. Another seed moves both arms; published gains of dispersion (0.7-1.5 points "
    "over ten tasks) are of the size of their own standard error."
)
SEVERAL_SEEDS = (
    "{seeds} training seeds per arm: intervals hold the choice of test text and the spread between seeds. "
    "Two seeds make them wide, as two say little of a spread. A perplexity over seeds is that of the mean "
    "loss."
)


def fairness(summary: Summary) -> Section:
    """What was compared, and what both arms share."""
    model, corpus = branch(summary, "model"), branch(summary, "corpus")
    sources = corpus.get("sources")
    pairs = (
        ("base model", model.get("base")),
        ("architecture", model.get("architecture")),
        ("parameters", _known(at(model, "parameters", "total"))),
        ("source of the text", "; ".join(map(_source, sources)) if isinstance(sources, list) else None),
        ("training text", _tokens(corpus)),
        ("held-out documents", _known(corpus.get("heldout_documents"))),
        ("context", _known(corpus.get("context"))),
    )
    facts = tuple((name, str(value)) for name, value in pairs if value)
    grids = []
    if at(summary, "runs"):
        return Section("fairness", "What was compared", grids=(_runs_grid(summary),))
    if focus(summary) is not None and at(summary, "baseline_is") is None:
        grids.append(
            Grid(("condition", "holds", "evidence"), _shared(summary), "Is the comparison fair?", (0, 1, 2))
        )
    settings = _settings_grid(summary)
    if settings.rows:
        grids.append(settings)
    return Section("fairness", "What was compared", facts=facts, grids=tuple(grids))


def _runs_grid(summary: Summary) -> Grid:
    """The runs of a joint summary: they may differ in anything, and the items that were paired do not."""
    rows = []
    for run in summary["runs"]:
        sizes = (_known(run.get(key)) or MISSING for key in ("context", "heldout_documents"))
        hashes = (short_hash(run.get(key)) for key in ("weights_sha256", "tokens_sha256"))
        rows.append((str(run.get("title")), str(run.get("base") or MISSING), *hashes, *sizes))
    head = ("run", "base model", "its weights", "training text", "context", "held-out documents")
    return Grid(head, tuple(rows), "The runs, joined on the items that both were asked", (0, 1, 2, 3))


def _known(value: Any) -> str | None:
    return None if number(value) is None else count(number(value))


def _source(source: Any) -> str:
    return str(source.get("source", source)) if isinstance(source, dict) else str(source)


def _tokens(corpus: dict[str, Any]) -> str | None:
    if number(corpus.get("train_tokens")) is None:
        return None
    tokens, documents = (count(number(corpus.get(key))) for key in ("train_tokens", "train_documents"))
    text = f"{tokens} tokens from {documents} documents"
    epochs = number(corpus.get("epochs"))
    return text if epochs is None else f"{text}, {fixed(epochs, 2)} epochs used"


def _shared(summary: Summary) -> tuple[tuple[str, str, str], ...]:
    """Each condition of fairness with yes, NO or not recorded, and its evidence."""
    tokens, weights = at(summary, "corpus", "tokens_sha256"), at(summary, "model", "weights_sha256")
    both = "both" if len(arms(summary)) == 2 else "all"
    order = "; the trainings of one seed in the same order" if seeds(summary) > 1 else ""
    rows = [
        (
            "same tokens, same order",
            "yes" if tokens else "not recorded",
            f"one file for {both}, SHA-256 {short_hash(tokens)}{order}",
        ),
        ("same initial weights", "yes" if weights else "not recorded", f"SHA-256 {short_hash(weights)}"),
        _same_first_loss(summary),
        _same_amount(summary),
        _same_settings(summary),
        _trained_apart(summary),
    ]
    return tuple(rows)


Found = tuple[str, str]
"""yes, NO or not recorded; and the evidence."""


def _over_arms(summary: Summary, name: str, look: Callable[[str], Found]) -> tuple[str, str, str]:
    """One condition over all arms: the first that breaks it is told, else the evidence of the first."""
    found = {arm: look(arm) for arm in arms(summary) if arm != BASELINE}
    several = len(found) > 1
    for holds in ("NO", "not recorded"):
        for arm, (answer, evidence) in found.items():
            if answer == holds:
                return name, answer, f"{arm}: {evidence}" if several else evidence
    return name, *next(iter(found.values()))


def _same_first_loss(summary: Summary) -> tuple[str, str, str]:
    """Before the first update the arms are one model on one batch: another loss is a fault."""
    exempt = [arm for arm in arms(summary) if changes_forward(summary, arm)]

    def look(arm: str) -> Found:
        if arm in exempt:
            return "yes", "not to be expected: its technique changes the first loss"
        found = first_losses(summary, arm)
        if found is None:
            return "not recorded", MISSING
        unlike = [pair for pair in found if pair[0] != pair[1]]
        if unlike:
            return "NO", f"{unlike[0][0]:.6f} against {unlike[0][1]:.6f}"
        return "yes", ", ".join(f"{before:.6f}" for before, _ in found)

    name, holds, evidence = _over_arms(summary, "same loss before the first update", look)
    checked = [arm for arm in arms(summary) if arm not in (*exempt, BASELINE)]
    if exempt and not checked:
        return name, "not checked", evidence
    return name, holds, evidence + (f"; not looked at for {', '.join(exempt)}" if exempt else "")


def _same_amount(summary: Summary) -> tuple[str, str, str]:
    def look(arm: str) -> Found:
        found = [
            tuple(number(training.get(key)) for key in ("steps", "tokens"))
            for pair in twins(summary, arm)
            for training in pair
        ]
        if any(None in one for one in found):
            return "not recorded", MISSING
        texts = list(
            dict.fromkeys(f"{count(steps)} steps, {count(tokens)} tokens" for steps, tokens in found)
        )
        return ("yes", texts[0]) if len(texts) == 1 else ("NO", " against ".join(texts))

    return _over_arms(summary, "same steps and tokens", look)


def differing_settings(summary: Summary, arm: str | None = None) -> list[str] | None:
    """Dotted names of the training settings in which an arm differs from the baseline, None if not recorded.

    Without `arm`, of the one that the verdict is about.
    """
    chosen = arm or focus(summary)
    pairs = twins(summary, chosen) if chosen else []
    found: set[str] = set()
    for pair in pairs:
        before, after = (dict(leaves(branch(training, "settings"))) for training in pair)
        if not before or not after:
            return None
        found |= {key for key in {**before, **after} if before.get(key) != after.get(key)}
    return sorted(found) if pairs else None


def _same_settings(summary: Summary) -> tuple[str, str, str]:
    def look(arm: str) -> Found:
        differing = differing_settings(summary, arm)
        if differing is None:
            return "not recorded", MISSING
        unwanted = [key for key in differing if "dispersion" not in key]
        if unwanted:
            return "NO", f"they differ in {', '.join(unwanted)}"
        found = [number(at(part, "settings", "seed")) for part in trainings(summary, BASELINE).values()]
        told = ", ".join(f"{seed:.0f}" for seed in found if seed is not None)
        word = "seeds" if len(found) > 1 else "seed"
        only = (
            "only the dispersion settings differ"
            if len(arms(summary)) == 2
            else "only what an arm adds differs"
        )
        return "yes", only + (f"; {word} {told}" if told else "")

    return _over_arms(summary, "same optimizer, schedule, seed", look)


def _trained_apart(summary: Summary) -> tuple[str, str, str]:
    """The counter-check: the arms must end up different, else nothing was compared."""

    def look(arm: str) -> Found:
        found = [tuple(training.get("weights_sha256") for training in pair) for pair in twins(summary, arm)]
        if not found or any(not sha for pair in found for sha in pair):
            return "not recorded", MISSING
        if any(before == after for before, after in found):
            return "NO", "both arms ended with the same weights: the technique changed nothing"
        return "yes", " and ".join(short_hash(sha) for sha in found[0])

    return _over_arms(summary, "trained weights differ", look)


def _settings_grid(summary: Summary) -> Grid:
    """Every training setting by arm."""
    by_arm = {arm: dict(leaves(branch(summary, "midtrain", arm, "settings"))) for arm in arms(summary)}
    by_arm = {
        arm: {**found, "processes": at(summary, "midtrain", arm, "processes")}
        for arm, found in by_arm.items()
        if found
    }
    keys = list(dict.fromkeys(key for found in by_arm.values() for key in found))
    rows = [(key, *(_setting(found.get(key)) for found in by_arm.values())) for key in keys]
    columns = tuple(range(len(by_arm) + 1))
    return Grid(("setting", *by_arm), tuple(rows), "Training settings", columns, folded=True)


def _setting(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or MISSING
    return "yes" if value is True else "no" if value is False else str(value)


def stages(summary: Summary) -> Section:
    """What took how long, and what was kept from an earlier run."""
    found = at(summary, "stages")
    rows = [branch(row) for row in found] if isinstance(found, list) else []
    fresh = [number(row.get("seconds")) or 0.0 for row in rows if not row.get("kept")]
    longest = max((number(row.get("seconds")) or 0.0 for row in rows), default=0.0) or 1.0
    texts = [
        (str(row.get("name")), seconds(number(row.get("seconds"))), "kept" if row.get("kept") else "made")
        for row in rows
    ]
    bars = tuple((number(row.get("seconds")) or 0.0) / longest for row in rows)
    grids = (Grid(("stage", "time", "this run"), tuple(texts), "", (0, 2), bars),) if rows else ()
    kept = len(rows) - len(fresh)
    notes = (
        f"Made in this run: {seconds(sum(fresh))}."
        + (f" Kept from earlier: {plural(kept, 'stage')}." if kept else ""),
    )
    return Section("stages", "Where the time went", grids=grids, notes=notes if rows else ())


def reproduce(summary: Summary) -> Section:
    """Command, recipe, versions, machine."""
    facts = []
    for name, key in (("created", "created"), ("git commit", "git_commit")):
        if at(summary, key):
            facts.append((name, str(at(summary, key))))
    grids = []
    for title, key in (("Machine", "machine"), ("Versions", "versions")):
        rows = [_property(name, value) for name, value in leaves(branch(summary, key))]
        if rows:
            grids.append(Grid((key, "value"), tuple(rows), title, (0, 1), folded=key == "versions"))
    code = [
        (name, str(at(summary, key)))
        for name, key in (("Command", "command"), ("Recipe", "recipe_yaml"))
        if at(summary, key)
    ]
    return Section("reproduce", "How to reproduce", facts=tuple(facts), grids=tuple(grids), code=tuple(code))


def _property(name: str, value: Any) -> tuple[str, str]:
    """A fact about the machine; bytes as MB."""
    if name.endswith("_bytes") and number(value) is not None:
        return name.removesuffix("_bytes"), f"{megabytes(number(value))} MB"
    return name, _setting(value)


def limits(summary: Summary, lost: list[str]) -> Section:
    """What the numbers mean, the verdict's rules, and figures that were not finite."""
    several = seeds(summary) > 1
    notes = [*LIMITS[:3], SEVERAL_SEEDS.format(seeds=seeds(summary)) if several else ONE_SEED, *LIMITS[3:]]
    if lost:
        named = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
        notes.insert(0, f"{len(lost)} figures were infinite or undefined and are shown as missing: {named}.")
    rules = Grid(
        ("", "rule"), tuple((str(i), rule) for i, rule in enumerate(RULES, 1)), "Rules of the verdict", (0, 1)
    )
    return Section("limits", "What the numbers mean, and their limits", notes=tuple(notes), grids=(rules,))
