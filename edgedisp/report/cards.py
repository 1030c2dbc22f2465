"""The README.md of a model folder and of a bundle, in the shape that model hubs expect.

The front matter holds only what is known for certain: a base model is named only when it is a hub id, and no
licence is claimed, because a derived model's licence follows from its base and its text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from edgedisp.core.results import BASELINE
from edgedisp.core.run import Run
from edgedisp.report.formatting import count, leaves, megabytes, setting, short_hash
from edgedisp.report.layout import Grid, escape_markdown, fenced, grid_markdown
from edgedisp.report.result_sections import technique_text
from edgedisp.report.results_table import table, table_markdown
from edgedisp.report.run_sections import sources_text
from edgedisp.report.verdict import verdict

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
Manifest = Mapping[str, Any]


def model_card(run: Run, name: str) -> str:
    """The card of one training's model folder: the arm `name`, or the folder of another seed's training."""
    replica = run.replicas.get(name)
    arm = replica.arm if replica else name
    title = f"{arm} arm" + (f", seed {replica.seed}" if replica else "")
    licences = {"licence": run.model.get("license"), "text_licence": run.corpus.get("license")}
    results = table_markdown(table(run)).rstrip()
    about = _about(run, arm, name)
    return _render("model_card.md.j2", **about, **licences, title=f"{run.title}, {title}", results=results)


def bundle_card(manifest: Manifest, name: str, run: Run | None = None) -> str:
    """The card of the bundle `name` (a folder's name) from its manifest.json, and the run that packed it.

    Without a run, as `edgedisp export` makes it, the card says that nothing was measured.
    """
    base = manifest.get("base") or {}
    provenance = manifest.get("provenance") or {}
    layouts = manifest.get("layouts") or {}
    arm = str(provenance.get("arm") or "")
    plain: dict[str, Any] = {"run": None, "base": str(base.get("base") or ""), "arm": arm}
    parts = _about(run, arm, arm) if run else plain
    parts["library"] = "transformers.js" if list(layouts) == ["transformers.js"] else "onnx"
    parts["tags"] = [*parts.get("tags", ["edgedisp"]), "onnx"]
    results = ""
    if run is not None:
        whole = table(run, all_arms=arm not in table(run).arms)
        rows = tuple(row for row in whole.rows if row.precision == manifest.get("precision"))
        results = table_markdown(replace(whole, rows=rows)).rstrip()
    languages = {"transformers.js": "js"}
    loading = [
        (layout, entry["graph"], entry["weights"], fenced(entry["load"], languages.get(layout, "python")))
        for layout, entry in layouts.items()
    ]
    title = f"{run.title}, {arm} arm" if run else name
    return _render(
        "bundle_card.md.j2",
        **parts,
        title=title,
        manifest=manifest,
        size=megabytes(manifest.get("size_bytes")),
        results=results,
        loading=loading,
        licence=base,
        origin=grid_markdown(Grid(("what", "value"), _origin(manifest))),
    )


def _about(run: Run, arm: str, name: str) -> dict[str, Any]:
    """What both cards say of a training."""
    base = str(run.model.get("base") or "")
    disperses = bool(run.techniques.get(arm, {}).get("dispersion"))
    return {
        "run": run,
        "base": base,
        "arm": arm,
        "is_baseline": arm == BASELINE,
        "adds": technique_text(run, arm),
        "others": "; ".join(technique_text(run, one) for one in run.compared_arms) or "nothing",
        "disperses": disperses,
        "library": "transformers",
        "tags": ["edgedisp", *(["dispersion-loss"] if disperses else [])],
        "sentence": verdict(run).sentence,
        "settings": _settings(run, arm, name),
        "command": fenced(run.command, "sh") if run.command else "",
    }


def _settings(run: Run, arm: str, name: str) -> str:
    """The table of what a model was trained with."""
    training, corpus = run.trainings(arm).get(name), run.corpus
    rows = [
        ("training tokens", count(training.tokens if training else None)),
        ("steps", count(training.steps if training else None)),
        ("context", count(corpus.get("context"))),
        ("documents", count(corpus.get("train_documents"))),
        ("text", sources_text(corpus) or "not recorded"),
        ("tokens file, SHA-256", short_hash(corpus.get("tokens_sha256"))),
        ("weights, SHA-256", short_hash(training.weights_sha256 if training else None)),
        *((key, setting(value)) for key, value in leaves(training.settings if training else {})),
    ]
    return grid_markdown(Grid(("setting", "value"), tuple(rows)))


def _origin(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    provenance = manifest.get("provenance") or {}
    recipe = provenance.get("recipe")
    rows = [
        ("base", (manifest.get("base") or {}).get("base") or "not recorded"),
        ("recipe", f"{recipe['name']} ({recipe['hash8']})" if recipe else "none: exported on its own"),
        ("seed", provenance.get("seed")),
        ("tokens file, SHA-256", provenance.get("data_sha256")),
        ("trained weights, SHA-256", provenance.get("weights_sha256")),
        ("edgedisp", f"{provenance.get('edgedisp')}, commit {provenance.get('git_commit')}"),
        *(provenance.get("versions") or {}).items(),
    ]
    return tuple((key, str(value)) for key, value in rows if value not in (None, ""))


def _render(name: str, **parts: Any) -> str:
    environment = Environment(  # Markdown: every text goes through `md`, JSON strings are YAML strings
        loader=PackageLoader("edgedisp.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": lambda text: escape_markdown(str(text)), "yaml": json.dumps}
    environment.tests["hub_id"] = lambda text: HUB_ID.fullmatch(str(text)) is not None
    return re.sub(r"\n{3,}", "\n\n", environment.get_template(name).render(**parts)).strip() + "\n"
