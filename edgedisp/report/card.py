"""The README.md of an exported model folder, in the shape that model hubs expect.

Front matter holds only what is known for certain: a base model is named there only when it is a hub id,
and no licence is claimed, because a derived model's licence follows from its base and its text.
"""

from __future__ import annotations

import json
import re

from edgedisp.report.before_after import table
from edgedisp.report.claims import verdict
from edgedisp.report.every_arm import added
from edgedisp.report.reading import (
    BASELINE,
    DISPERSED,
    Summary,
    arms,
    at,
    branch,
    leaves,
    number,
    run_title,
    seeds,
    trainings,
)
from edgedisp.report.rendering import escape_markdown, fenced, grid_markdown, render_markdown
from edgedisp.report.wording import count, short_hash

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(summary: Summary, name: str) -> str:
    """Markdown with YAML front matter for the model folder of one training.

    `name`: the arm, or for another seed than the first the folder under `replicas`.
    """
    base = str(at(summary, "model", "base") or "")
    replica = branch(summary, "replicas", name)
    arm = str(replica.get("arm") or name)
    seed = number(replica.get("seed"))
    title = f"{escape_markdown(arm)} arm" + (f", seed {seed:.0f}" if seed is not None else "")
    blocks = [
        front_matter(base, arm, summary),
        f"# {escape_markdown(run_title(summary))}, {title}",
        what(base, arm, summary),
        "## Training",
        training(summary, arm, name),
        "## Results",
        escape_markdown(verdict(summary)["sentence"]),
        render_markdown(table(summary)).rstrip(),
        "## Licence",
        _licence(summary, base),
        "## Limits",
        limits(summary),
    ]
    command = at(summary, "command")
    if command:
        blocks += ["## How it was made", fenced(str(command), "sh")]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _disperses(summary: Summary, arm: str) -> bool:
    """Whether the arm had a dispersion loss; reports of format 1 knew `dispersed` alone."""
    known = at(summary, "techniques", arm)
    return arm == DISPERSED if known is None else bool(at(known, "dispersion"))


def front_matter(base: str, arm: str, summary: Summary, library: str = "transformers") -> str:
    """JSON strings are YAML strings, so that no name can break out of its line."""
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    if HUB_ID.fullmatch(base):
        lines.append(f"base_model: {json.dumps(base)}")
    tags = ["edgedisp", "onnx", *(["dispersion-loss"] if _disperses(summary, arm) else [])]
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def what(base: str, arm: str, summary: Summary) -> str:
    """What was trained, and what it is compared with."""
    name = escape_markdown(base) or "a base model"
    others = [other for other in arms(summary) if other != BASELINE]
    if arm == BASELINE:
        twins = "its twin had" if len(others) < 2 else f"its {len(others)} twins had"
        return (
            f"{name}, mid-trained with plain cross-entropy. It is the control of a paired experiment: "
            f"{twins} the same data, order, initial weights and optimizer, and something on top: "
            f"{'; '.join(escape_markdown(_added(summary, other)) for other in others) or 'nothing'}."
        )
    text = f"{name}, mid-trained with cross-entropy and {escape_markdown(_added(summary, arm))}."
    if _disperses(summary, arm):
        text += (
            " A dispersion loss pushes the token vectors of a sequence apart in every chosen layer "
            "(arXiv 2602.00217)."
        )
    return f"{text} Its twin with plain cross-entropy is the control."


def _added(summary: Summary, arm: str) -> str:
    return "a dispersion loss" if at(summary, "techniques", arm) is None else added(summary, arm)


def training(summary: Summary, arm: str, name: str) -> str:
    """The table of settings."""
    part, corpus = trainings(summary, arm).get(name, {}), branch(summary, "corpus")
    rows = [
        ("training tokens", count(number(part.get("tokens")))),
        ("steps", count(number(part.get("steps")))),
        ("context", count(number(corpus.get("context")))),
        ("documents", count(number(corpus.get("train_documents")))),
        ("text", "; ".join(_names(corpus.get("sources"))) or "not recorded"),
        ("tokens file, SHA-256", short_hash(corpus.get("tokens_sha256"))),
        ("weights, SHA-256", short_hash(part.get("weights_sha256"))),
        *((key, str(value)) for key, value in leaves(branch(part, "settings"))),
    ]
    return grid_markdown(("setting", "value"), rows, (0, 1))


def _names(sources: object) -> list[str]:
    found = sources if isinstance(sources, list) else []
    return [str(at(source, "source") if isinstance(source, dict) else source) for source in found]


def _licence(summary: Summary, base: str) -> str:
    """What is recorded, and what the reader has to look up."""
    known = [
        f"{what}: {escape_markdown(str(at(summary, part, 'license')))}."
        for what, part in (("Base model", "model"), ("Text", "corpus"))
        if at(summary, part, "license")
    ]
    text = (
        f"This model is derived from {escape_markdown(base) or 'its base model'}: the base model's licence "
        "and terms of use "
        "apply to it. The training text has a licence of its own (Wikipedia text: CC BY-SA). Check both "
        "before you "
        "publish it."
    )
    return " ".join([*known, text])


def limits(summary: Summary) -> str:
    """What the figures do not say, as a list."""
    count_ = seeds(summary)
    lines = [
        "- One training seed; the intervals cover the choice of test text, not the luck of training."
        if count_ == 1
        else f"- The results are over {count_} training seeds, of which this model is one.",
        "- Scored on text like its training text; nothing is said about safety, facts or other languages.",
        "- Quantized bundles differ from this folder's weights; the table gives their own scores.",
    ]
    if at(summary, "smoke"):
        lines.insert(0, "- A smoke run: a tiny random model that proves the recipe. It cannot write text.")
    return "\n".join(lines)
